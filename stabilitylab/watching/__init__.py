"""Watch a log while it grows, and tell what it shows the moment it shows it.

A line's way: a follower (``tail``, ``followers``, ``stores``) hands over the rows that are new, wherever they come from; a judge of
its segment (``judge``) chooses columns and feeds the online detector; what it finds becomes an alert (``alerts``, one of
``rules``), which is a line, a command and a webhook (``hooks``); where the watch stands is on disk (``memory``), so that it goes on
after a kill without saying anything twice. ``panel`` is what a terminal shows, ``commands`` the command.
"""
