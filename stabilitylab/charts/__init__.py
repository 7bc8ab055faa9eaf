"""Charts for pages: drawn by Bokeh in the reader's browser, to be hovered and zoomed. ``figures`` draws the same as pictures."""
