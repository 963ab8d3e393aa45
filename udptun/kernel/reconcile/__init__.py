"""Compare what the kernel has with what it shall have, and apply the difference."""
