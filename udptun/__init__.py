"""udptun: a flannel-compatible overlay daemon with a userspace UDP tunnel on a TUN device."""

__version__ = "0.1.0"
