"""The datapath process (worker.py), what it shares with the control plane, and the control plane's side of it."""
