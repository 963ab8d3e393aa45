"""What in the host's packet filters keeps the overlay's packets from passing."""
