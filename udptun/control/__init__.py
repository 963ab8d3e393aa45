"""The daemon: its stages and what it serves."""
