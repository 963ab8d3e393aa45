"""Single steps of the datapath, alone: nanoseconds, no lab, no root."""
