"""Where leases live.  `base` has the contract; each other module is one store."""
