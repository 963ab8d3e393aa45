"""How packets travel: each backend says, as data, which links, addresses and routes the kernel shall have."""
