"""`GET /trace`: what would happen to a packet here."""
