"""A training run or a served model on paper: memory, time and reliability, before any machine is rented."""
