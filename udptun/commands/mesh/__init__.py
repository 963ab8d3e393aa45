"""`udptun mesh`: which host reaches which, as the hosts themselves see it (docs/mesh.md)."""
