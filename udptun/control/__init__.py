"""The daemon: its stages, how it changes while it runs, and what it serves."""
