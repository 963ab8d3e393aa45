"""What a container needs to set rules: the reason for NET_RAW in the manifest."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv (util-linux)"),
]


@pytest.mark.parametrize(
    ("tool", "capabilities", "works"),
    [
        # It asks the kernel through a raw socket.
        ("iptables-legacy", "+net_admin", False),
        ("iptables-legacy", "+net_admin,+net_raw", True),
        ("iptables-nft", "+net_admin", True),
    ],
)
def test_legacy_iptables_alone_needs_net_raw(tool: str, capabilities: str, works: bool) -> None:
    if not shutil.which(tool):
        pytest.skip(f"needs {tool}")
    # In a namespace of its own, since the question makes the table where there is none.
    privileges = ["setpriv", f"--bounding-set=-all,{capabilities}", "--no-new-privs"]
    argv = ["unshare", "--net", *privileges, tool, "-w", "5", "-t", "nat", "-N", "FLANNEL-POSTRTG"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert (done.returncode == 0) is works, done.stderr
