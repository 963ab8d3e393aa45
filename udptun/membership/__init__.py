"""Our lease and everyone else's: claim, hold, follow, remember."""
