"""What this host says of its peers to the others: docs/mesh.md."""
