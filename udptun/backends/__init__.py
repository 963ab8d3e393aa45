"""How packets travel: each backend says, as data, what links, addresses and routes it wants."""
