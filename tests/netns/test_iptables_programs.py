"""Which iptables is taken where none is called that, as in our image: the one in which the host's rules stand."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from namespace import Namespace, namespace, requires_netns

from udptun.core.lease import Subnets
from udptun.core.ownership import Ownership
from udptun.firewall.iptables_programs import programs
from udptun.firewall.obstacles.watch import Obstacles
from udptun.firewall.reconciler import FirewallReconciler, FirewallSettings

pytestmark = [pytest.mark.netns, requires_netns]

SYSTEM = "/usr/sbin:/usr/bin:/sbin:/bin"
NFT, LEGACY = "iptables-nft", "iptables-legacy"


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as ns:
        yield ns


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory of PATH: what our image has."""
    for name in ("iptables-nft", "iptables-nft-restore", "iptables-legacy", "iptables-legacy-restore", "nft"):
        path = shutil.which(name, path=SYSTEM)
        if path is None:
            pytest.skip(f"needs {name}")
        # The program goes by its name.
        (tmp_path / name).symlink_to(path)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def sh(ns: Namespace, script: str) -> str:
    argv = ["/usr/bin/env", f"PATH={SYSTEM}", "ip", "netns", "exec", ns.name, "sh", "-ec", script]
    return subprocess.run(argv, check=True, timeout=30, capture_output=True, text=True).stdout


def chosen(ns: Namespace) -> list[str]:
    """The names of the programs, the one that sets our rules first."""

    async def ask() -> list[str]:
        return [it.name for it in await programs()]

    return ns.call_async(ask)


RULE = "{} -t filter -A INPUT -p tcp --dport 1234 -j ACCEPT\n"
OF_FLANNEL = "{0} -t nat -N FLANNEL-POSTRTG\n{0} -t nat -A POSTROUTING -j FLANNEL-POSTRTG\n"


@pytest.mark.parametrize(
    ("script", "first"),
    [
        ("", NFT),
        (RULE.format(LEGACY), LEGACY),
        (RULE.format(NFT), NFT),
        (RULE.format(LEGACY) + 2 * RULE.format(NFT), NFT),
        (2 * RULE.format(LEGACY) + RULE.format(NFT), LEGACY),
        (3 * RULE.format(NFT) + f"{LEGACY} -t mangle -N KUBE-KUBELET-CANARY", LEGACY),
        (3 * RULE.format(LEGACY) + f"{NFT} -t mangle -N KUBE-IPTABLES-HINT", NFT),
        (OF_FLANNEL.format(LEGACY), NFT),
        (OF_FLANNEL.format(NFT) + RULE.format(LEGACY), LEGACY),
        # iptables-nft cannot list the table mangle then.
        (
            "nft add table ip mangle; "
            "nft add chain ip mangle PREROUTING '{ type filter hook prerouting priority -150; }'; "
            f"nft add rule ip mangle PREROUTING meta length 5 tcp dport '{{ 1, 2 }}' accept; {RULE.format(LEGACY)}",
            LEGACY,
        ),
    ],
    ids=[
        *("no-rules", "legacy-rules", "nft-rules", "more-in-nft", "more-in-legacy", "kubelet-legacy", "kubelet-nft"),
        *("ours-do-not-count", "ours-in-the-other", "unreadable"),
    ],
)
def test_rules_of_the_host_say_which_iptables_it_is(ns: Namespace, tools: Path, script: str, first: str) -> None:
    sh(ns, script)
    before = sh(ns, "nft list ruleset; cat /proc/net/ip_tables_names")
    assert chosen(ns) == [first, LEGACY if first == NFT else NFT]
    assert sh(ns, "nft list ruleset; cat /proc/net/ip_tables_names") == before, "looking has changed something"


def test_hosts_own_iptables_is_taken_whatever_the_rules(ns: Namespace, tools: Path) -> None:
    sh(ns, 3 * RULE.format(NFT))
    for suffix in ("", "-restore"):
        (tools / f"iptables{suffix}").symlink_to((tools / f"iptables-legacy{suffix}").readlink())
    assert chosen(ns) == ["iptables", NFT]


def test_the_only_one_that_is_installed_is_taken(ns: Namespace, tools: Path) -> None:
    sh(ns, 3 * RULE.format(NFT))
    (tools / "iptables-nft-restore").unlink()
    assert chosen(ns) == [LEGACY]


def test_legacy_is_taken_on_a_kernel_without_nf_tables(ns: Namespace, tools: Path) -> None:
    """What iptables-nft says there."""
    (tools / "iptables-nft").unlink()
    said = "iptables: Failed to initialize nft: Protocol not supported"
    (tools / "iptables-nft").write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    (tools / "iptables-nft").chmod(0o755)
    assert chosen(ns) == [LEGACY, NFT]


def test_rules_are_set_with_the_one_that_the_host_has_come_to_use(ns: Namespace, tools: Path) -> None:
    """Those of an earlier start, before the host had any rules, are removed from the other one."""
    settings = FirewallSettings(masquerade=True, forward=None, random_fully=True, nftables=False, resync_s=5)
    network, subnet = IPv4Network("10.244.0.0/16"), IPv4Network("10.244.7.0/24")

    async def set_up() -> None:
        firewall = FirewallReconciler(settings, [Ownership((network,))], Obstacles(list, list))
        await firewall.set_up(Subnets(subnet), None)

    ns.call_async(set_up)
    assert "FLANNEL-POSTRTG" in sh(ns, "iptables-nft-save")
    sh(ns, RULE.format(LEGACY))
    ns.call_async(set_up)
    assert "FLANNEL-POSTRTG" in sh(ns, "iptables-legacy-save")
    assert "FLANNEL" not in sh(ns, "iptables-nft-save")
