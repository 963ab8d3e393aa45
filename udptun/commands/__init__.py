"""What a user runs, one module a command."""
