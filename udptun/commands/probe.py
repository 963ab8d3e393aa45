"""`udptun status --backends`: which types of backend work on this host."""

from __future__ import annotations

import asyncio
import json

from udptun.backends import probe
from udptun.backends.choice import describe


def show(*, pretend_no_vxlan: bool, as_json: bool) -> int:
    """Print what each type of backend would get here, with its defaults, and why."""
    found = asyncio.run(probe.kernel_support(pretend_no_vxlan=pretend_no_vxlan))
    rows = describe(found)
    if as_json:
        print(json.dumps([{"type": name, "works": works, "reason": reason} for name, works, reason in rows]))
    else:
        print("\n".join(f"{name:<8} {'yes' if works else 'no ':<3}  {reason}" for name, works, reason in rows))
    return 0
