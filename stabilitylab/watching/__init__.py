"""Watches a log while it grows, and tells at once what it shows.

A line's way: a follower (``tail``, ``followers``, ``stores``) hands over new rows, wherever they come from; a judge of the segment
(``judge``) chooses columns and feeds the online detector; its findings become alerts (``alerts``, each under one of ``rules``),
which go out as a line, to a command and to a webhook (``notifiers``). The watch keeps its state on disk (``kept_state``), so that
it continues after a kill without reporting anything twice. ``panel`` draws the terminal's view, ``commands`` holds the command.
"""
