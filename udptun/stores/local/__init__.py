"""The `local` store: leases of one machine in one SQLite file.  The only owner of sqlite3."""
