"""A question's results as one HTML page, its charts, and the sentences at its head."""
