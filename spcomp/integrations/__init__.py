"""Plugs for other people's libraries, one file a library, imported only when asked for."""
