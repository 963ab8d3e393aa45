"""A stand-in for the daemon: fixed subnets, host-gw routes, subnet.env, READY=1, then waits for SIGTERM.

Lets the lab be tested without the daemon that the lab is there to test.  `--fail` makes it say why it can't and end.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

own = int(socket.gethostname().removeprefix("h"))
if "--fail" in sys.argv:
    sys.exit("fake daemon: told to fail")
for peer in range(1, 10):
    if peer != own:
        route = ["ip", "route", "replace", f"10.99.{peer}.0/24", "via", f"192.168.77.{10 + peer}", "dev", "eth0"]
        subprocess.run(route, check=True)
env = Path("/run/flannel/subnet.env")
env.parent.mkdir(exist_ok=True)
env.write_text(
    f"FLANNEL_NETWORK=10.99.0.0/16\nFLANNEL_SUBNET=10.99.{own}.1/24\nFLANNEL_MTU=1500\nFLANNEL_IPMASQ=false\n"
)
# What a real daemon leaves running when it ends: a process in a session of its own.
subprocess.Popen(["sleep", "3600"], start_new_session=True)
print("fake daemon: ready", flush=True)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
signal.sigwait([signal.SIGTERM])
