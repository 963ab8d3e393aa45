"""The shortcut: the kernel carries the packets that need no thought (docs/shortcut.md)."""
