"""Which peers are alive and how long packets to them may be, whatever carries the packets."""
