"""Charts for pages: Bokeh draws them in the browser, where readers hover and zoom. ``figures`` draws the same as pictures."""
