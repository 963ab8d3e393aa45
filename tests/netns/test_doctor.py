"""udptun doctor: each fault of a host is named with its cause and a remedy, and a host that is well is not troubled.

    pod h1/p1 -- cni0 - flannel0 [h1] eth0 -- underlay -- eth0 [h2] flannel0 - cni0 -- pod h2/p1

Each fault is done to h1, or to what lies between it and h2, one after the other.  The doctor on h1 is one process for
all of them: to start Python for each look would cost more than the looks.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from container_runtimes import mount_cgroups
from faults import Act, Background, StoppedStandby, lease_of_type, on_pod, shell
from traffic import listener_at, read_status

from udptun.lab.host import UNDERLAY, Host
from udptun.lab.machine import SOURCE_ROOT, wait_until
from udptun.lab.topology import DUAL_STACK_NET_CONF, KUBE_PORT, LEASES, NET_CONF, Lab

pytestmark = pytest.mark.netns

Document = dict[str, Any]

SOON_S = 30
"""For what the daemon says, and for peers that answer again.  The machine may be busy."""

_SERVE = """if True:
    import io, json, os, sys
    from contextlib import redirect_stdout
    from udptun.commands import doctor

    path = os.environ["PATH"]
    for line in sys.stdin:
        asked = json.loads(line)
        os.environ["PATH"] = asked["path"] or path
        with redirect_stdout(io.StringIO()) as out:
            status = doctor.run([*asked["argv"], "--json"], os.environ)
        print(json.dumps({"status": status, "said": json.loads(out.getvalue())}), flush=True)
"""


class Doctor:
    """`udptun doctor --json` on one host, again and again."""

    def __init__(self, host: Host) -> None:
        environ = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT)}
        self._process = host.machine.popen(
            [sys.executable, "-c", _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ
        )

    def look(self, *argv: str, path: str = "") -> Document:
        """What it says with these flags.  `path` stands for PATH."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"argv": argv, "path": path}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        said: Document = answer["said"]
        assert answer["status"] == said["exit_status"]
        return said

    def close(self) -> None:
        self._process.communicate()


@dataclass(frozen=True)
class Fault:
    """`check` finds it.  `cause` and `remedy` are regular expressions, to be found in the finding's."""

    name: str
    check: str
    cause: str
    remedy: str
    inflict: Act
    heal: Act
    argv: tuple[str, ...] = ()
    path: str = ""
    """PATH of the doctor."""
    severity: str = "error"

    def is_in(self, findings: Sequence[Document]) -> bool:
        """Whether one of them names it."""
        return any(
            it["check"] == self.check
            and re.search(self.cause, it["cause"])
            and re.search(self.remedy, it["remedy"])
            and it["severity"] == self.severity
            for it in findings
        )


def nothing(_: Host) -> None:
    """The fault lies in the doctor's flags or environment."""


def at_peer(*commands: str) -> Act:
    """Run the commands on h2."""
    return lambda host: shell(*commands)(host.lab.host(2))


def at_switch(*commands: str) -> Act:
    """Run the commands at the underlay's switch."""

    def act(host: Host) -> None:
        for command in commands:
            host.lab.switch.run(["sh", "-c", command])

    return act


def on_peers_subnet(command: str) -> Act:
    return lambda host: shell(command.format(host.lab.host(2).subnet))(host)


class Named:
    """A program that calls itself so, and does nothing."""

    def __init__(self, name: str) -> None:
        self._program = Background(f"cp /bin/sleep /run/{name} && exec /run/{name} 1000")
        self._name = name

    def start(self, host: Host) -> None:
        self._program.start(host)
        wait_until("the program", lambda: host.run(["pidof", self._name], check=False).returncode == 0, SOON_S)

    def stop(self, host: Host) -> None:
        self._program.stop(host)


class Limited:
    """The daemon in a cgroup with a limit, as a container's: of the version of cgroups that has the controller here."""

    _LIMITS: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "memory": {"memory.limit_in_bytes": "94371840", "memory.max": "94371840"},
        "cpu": {"cpu.cfs_quota_us": "90000", "cpu.max": "90000 100000"},
    }
    """Files of version 1 and 2."""

    def __init__(self, controller: str) -> None:
        self._controller = controller

    def start(self, host: Host) -> None:
        if not any(host.path("/sys/fs/cgroup").iterdir()):
            mount_cgroups(host)
        top = Path("/sys/fs/cgroup")
        self._parent = top / self._controller if host.path(top / self._controller).is_dir() else top
        pid = read_status(host)["pid"]
        cgroup = self._parent / f"udptun-{os.getpid()}-{self._controller}"
        limits = " || ".join(
            f"echo {value} 2>/dev/null >{cgroup}/{file}" for file, value in self._LIMITS[self._controller].items()
        )
        shell(f"mkdir {cgroup}", limits, f"echo {pid} >{cgroup}/cgroup.procs")(host)

    def stop(self, host: Host) -> None:
        cgroup = self._parent / f"udptun-{os.getpid()}-{self._controller}"
        # What the daemon starts meanwhile, a tool of the firewall for example, begins in there too.
        move = f"for pid in $(cat {cgroup}/cgroup.procs); do echo $pid >{self._parent}/cgroup.procs; done"
        leave = ["sh", "-c", f"{move}; rmdir {cgroup}"]
        wait_until("the end of the cgroup", lambda: host.run(leave, check=False).returncode == 0, SOON_S)


class NodeWithoutPodCidr:
    """The lab's API server, with the host's node, to which nobody has given a podCIDR."""

    def __init__(self) -> None:
        self._undo = ExitStack()

    def start(self, host: Host) -> None:
        from udptun.lab.kube_api.server import ApiServer

        api = self._undo.enter_context(ApiServer(listen=lambda: listener_at(host.lab)))
        api.do(lambda it: it.add_node(host.name))

    def stop(self, host: Host) -> None:
        self._undo.close()


def filtered(hook: str, rule: str) -> tuple[Act, Act]:
    """A rule of nftables on h2."""
    chain = f"add chain inet doctor c {{ type filter hook {hook} priority 0; }}"
    add = f"nft 'add table inet doctor; {chain}; add rule inet doctor c {rule}'"
    return at_peer(add), at_peer("nft delete table inet doctor")


def refused(match: str) -> tuple[Act, Act]:
    """h2 refuses each such packet: else the kernel says so once in a second, and most often to the daemon."""
    reject, accept = filtered("input", f"{match} reject")

    def inflict(host: Host) -> None:
        at_peer("sysctl -qw net.ipv4.icmp_ratelimit=0")(host)
        reject(host)

    def heal(host: Host) -> None:
        accept(host)
        at_peer("sysctl -qw net.ipv4.icmp_ratelimit=1000")(host)

    return inflict, heal


def forbidden(policy: str) -> tuple[Act, Act]:
    """A chain of nftables on h1 that forwarded packets pass."""
    add = "add chain inet fw c { type filter hook forward priority 10; policy accept; }"
    return shell(f"nft 'add table inet fw; {add}; add rule inet fw c {policy}'"), shell("nft delete table inet fw")


def leases(statement: str, *values: str) -> Act:
    """Change the leases of the lab."""
    script = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute(*sys.argv[2:3], sys.argv[3:]); db.commit()"
    )
    return lambda host: shell(shlex.join([sys.executable, "-c", script, str(LEASES), statement, *values]))(host)


def leases_with(key: str, value: str) -> Act:
    return leases("insert into leases (key, value) values (?, ?)", key, value)


def leases_without(key: str) -> Act:
    return leases("delete from leases where key = ?", key)


PEER = "192.168.77.12"
RUN_DIR, SUBNET_ENV = "/run/udptun", "/run/flannel/subnet.env"
WORKER = SOURCE_ROOT / "udptun/datapath/worker.py"
CNI, BIN = "/run/doctor-cni", "/run/doctor-bin"
CNI_FLAGS = (f"--cni-conf-dir={CNI}", f"--cni-bin-dir={BIN}")
FLANNELS = '{"cniVersion": "1.0.0", "name": "cbr0", "plugins": [{"type": "flannel", "delegate": {"type": "bridge"}}]}'
OTHERS = '{"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "ptp"}]}'
STANDBY, DHCPCD, FLANNELD = StoppedStandby(), Named("dhcpcd"), Named("flanneld")
NETWORKD, NETWORK_MANAGER = Named("systemd-networkd"), Named("NetworkManager")
MEMORY_LIMIT, CPU_LIMIT = Limited("memory"), Limited("cpu")
API = NodeWithoutPodCidr()

FAULTS = [
    # The kernel.
    Fault(
        "no TUN device",
        "tun-device",
        r"/dev/net/tun cannot be opened \(ENOENT\)",
        "modprobe tun",
        shell("mount -t tmpfs none /dev/net"),
        shell("umount /dev/net"),
    ),
    Fault(
        "ip_forward off",
        "forwarding",
        r"net\.ipv4\.ip_forward is 0",
        r"sysctl -w net\.ipv4\.ip_forward=1",
        shell("sysctl -qw net.ipv4.ip_forward=0"),
        shell("sysctl -qw net.ipv4.ip_forward=1"),
    ),
    Fault(
        "IPv6 forwarding off",
        "forwarding",
        r"net\.ipv6\.conf\.all\.forwarding is 0",
        r"sysctl -w net\.ipv6\.conf\.all\.forwarding=1",
        shell("sysctl -qw net.ipv6.conf.all.forwarding=0"),
        shell("sysctl -qw net.ipv6.conf.all.forwarding=1"),
    ),
    Fault(
        "an address by router advertisements, which are heeded no longer",
        "forwarding",
        "eth0 heeds no router advertisements while net/ipv6/conf/eth0/forwarding is 1",
        "sysctl -w net/ipv6/conf/eth0/accept_ra=2",
        shell("ip -6 address add 2001:db8::5/64 dev eth0 valid_lft 600 preferred_lft 600 nodad"),
        shell("ip -6 address del 2001:db8::5/64 dev eth0"),
        severity="warning",
    ),
    Fault(
        "IPv6 of the pods' bridge off",
        "ipv6-in-kernel",
        "net/ipv6/conf/cni0/disable_ipv6 is 1, so the pods behind cni0 have no IPv6",
        "sysctl -w net/ipv6/conf/cni0/disable_ipv6=0.*make the pods anew",
        shell("sysctl -qw net.ipv6.conf.cni0.disable_ipv6=1"),
        shell(
            "sysctl -qw net.ipv6.conf.cni0.disable_ipv6=0",
            ". /run/flannel/subnet.env; ip -6 address add $FLANNEL_IPV6_SUBNET dev cni0 nodad",
        ),
        severity="warning",
    ),
    Fault(
        "forwarding of the pods' bridge off",
        "forwarding",
        r"net/ipv4/conf/cni0/forwarding is 0",
        "sysctl -w net/ipv4/conf/cni0/forwarding=1",
        shell("sysctl -qw net.ipv4.conf.cni0.forwarding=0"),
        shell("sysctl -qw net.ipv4.conf.cni0.forwarding=1"),
    ),
    Fault(
        "strict rp_filter with another way back",
        "reverse-path",
        rf"rp_filter of eth0 is strict, and the route to {PEER} leads through other0",
        "sysctl -w net/ipv4/conf/eth0/rp_filter=2",
        shell(
            "sysctl -qw net.ipv4.conf.eth0.rp_filter=1",
            "ip link add other0 type veth peer name other1; ip link set other0 up; ip link set other1 up",
            f"ip route add {PEER}/32 dev other0",
        ),
        shell("ip link del other0", "sysctl -qw net.ipv4.conf.eth0.rp_filter=0"),
    ),
    Fault(
        "no carrier",
        "underlay",
        "the interface eth0 has no carrier",
        "cable",
        at_switch("ip link set h1 down"),
        at_switch("ip link set h1 up"),
    ),
    Fault(
        "packets between pods pass no rules, in Kubernetes",
        "bridge-netfilter",
        r"net\.bridge\.bridge-nf-call-ip6tables is 0, so pods of one host do not reach services by IPv6",
        "modprobe br_netfilter",
        shell("sysctl -qw net.bridge.bridge-nf-call-ip6tables=0"),
        shell("sysctl -qw net.bridge.bridge-nf-call-ip6tables=1"),
        argv=("--store=kube", "--kube-api-url=http://127.0.0.1:1"),
        severity="warning",
    ),
    Fault(
        "a kernel without IPv6",
        "ipv6-in-kernel",
        "IPv6 is enabled in the network config, and this kernel has none",
        r"ipv6\.disable=1",
        shell("mount -t tmpfs none /proc/sys/net/ipv6"),
        shell("umount /proc/sys/net/ipv6"),
    ),
    # Packet filters.
    Fault(
        "this host's own firewall drops the tunnel",
        "packet-filters",
        r"rule 1 of INPUT \(iptables-legacy, table filter\) drops packets of peers to UDP port 8285 here",
        r"iptables-legacy -I INPUT -p udp --dport 8285 -j ACCEPT",
        shell("iptables-legacy -I INPUT -p udp --dport 8285 -j DROP"),
        shell("iptables-legacy -D INPUT -p udp --dport 8285 -j DROP"),
    ),
    Fault(
        "iptables drops",
        "packet-filters",
        r"rule 1 of FORWARD \(iptables-nft, table filter\) drops packets between pods",
        r"iptables-nft -I FORWARD -s 10\.244\.0\.0/16 -j ACCEPT",
        shell("iptables-nft -I FORWARD -j DROP"),
        shell("iptables-nft -D FORWARD -j DROP"),
    ),
    Fault(
        "the other iptables drops by its policy",
        "packet-filters",
        r"the policy of FORWARD \(iptables-legacy, table filter\) drops packets",
        "flannel's rules are not there",
        shell("iptables-legacy -P FORWARD DROP"),
        shell("iptables-legacy -P FORWARD ACCEPT"),
    ),
    Fault(
        "nftables drops IPv6",
        "packet-filters",
        r"chain c \(nft, table inet fw\) drops IPv6 packets",
        "nft insert rule inet fw c ip6 saddr fd00:244::/48 accept",
        *forbidden("meta nfproto ipv6 drop"),
    ),
    Fault(
        "Docker's rule for a container in table raw",
        "packet-filters",
        r"rule 1 of PREROUTING \(iptables-nft, table raw\) drops some packets",
        "allow-direct-routing",
        on_pod("iptables-nft -t raw -A PREROUTING -d {}/32 ! -i cni0 -j DROP"),
        shell("iptables-nft -t raw -F PREROUTING"),
    ),
    Fault(
        "no iptables",
        "firewall-tools",
        "there is no program iptables",
        "install the package iptables",
        nothing,
        nothing,
        path="/nowhere",
        severity="warning",
    ),
    # The peer.
    Fault(
        "nobody listens at the peer",
        "reachability",
        "nobody listens on its UDP port 8285",
        "start the daemon there",
        *refused("udp dport 8285"),
    ),
    Fault(
        "a firewall at the peer drops the tunnel both ways",
        "reachability",
        "it answers a ping of its own address, and nothing comes from it through the tunnel",
        "let UDP port 8285 in at both hosts",
        at_switch(
            "nft 'add table bridge d; add chain bridge d c { type filter hook forward priority 0; }; "
            "add rule bridge d c udp dport 8285 drop'"
        ),
        at_switch("nft delete table bridge d"),
    ),
    Fault(
        "the peer is cut off",
        "reachability",
        "it answers neither through the tunnel nor to a ping",
        "is it up",
        at_switch("ip link set h2 down"),
        at_switch("ip link set h2 up"),
    ),
    Fault(
        "this host may not send to the peer",
        "reachability",
        r"packets to it cannot be sent \(EPERM\)",
        "OUTPUT",
        shell(f"iptables-nft -I OUTPUT -d {PEER} -j DROP"),
        shell(f"iptables-nft -D OUTPUT -d {PEER} -j DROP"),
    ),
    Fault(
        "pods with another MTU",
        "mtu",
        r"cni0 has an MTU of 1500, and packets to other hosts may have \d+ bytes",
        r"ip link set cni0 mtu \d+",
        shell("ip link set cni0 mtu 1500"),
        shell("ip link set cni0 mtu 1472"),
        severity="warning",
    ),
    # The store.
    Fault(
        "no such store",
        "store",
        "/run/nowhere.db",
        "a daemon with these flags makes it",
        nothing,
        nothing,
        argv=("--store=local:/run/nowhere.db",),
    ),
    Fault(
        "a store that is none",
        "store",
        r"/run/junk\.db",
        r"\w",
        shell("head -c 9000 /dev/urandom > /run/junk.db"),
        shell("rm -f /run/junk.db*"),
        argv=("--store=local:/run/junk.db",),
    ),
    Fault(
        "an etcd that nobody serves",
        "store",
        "connection refused|no answer",
        "is the server up",
        nothing,
        nothing,
        argv=("--store=etcd", "--etcd-endpoints=http://127.0.0.1:1"),
    ),
    Fault(
        "a broken network config",
        "network-config",
        "net-conf.json",
        r"mend it",
        shell(f"echo '{{' > /run/broken; mount --bind /run/broken {NET_CONF}"),
        shell(f"umount {NET_CONF}"),
    ),
    Fault(
        "another network config",
        "network-config",
        r"it has the Network 10\.99\.0\.0/16, and the daemon runs with 10\.244\.0\.0/16",
        "restart the daemons",
        shell(f'echo \'{{"Network": "10.99.0.0/16"}}\' > /run/other; mount --bind /run/other {NET_CONF}'),
        shell(f"umount {NET_CONF}"),
        severity="warning",
    ),
    Fault(
        "a lease that is another host's",
        "own-lease",
        r"says that 192\.0\.2\.9 has 10\.244\.\d+\.0/24",
        "lease list",
        lambda host: edited_leases(host, "update leases set value = replace(value, '192.168.77.11', '192.0.2.9')"),
        nothing,
        argv=("--store=local:/run/edited.db",),
    ),
    Fault(
        "a lease that is gone",
        "own-lease",
        r"has no lease for 10\.244\.\d+\.0/24",
        "writes it again",
        lambda host: edited_leases(host, "delete from leases where value like '%192.168.77.11%'"),
        nothing,
        argv=("--store=local:/run/edited.db",),
    ),
    Fault(
        "a lease that cannot be used",
        "unused-leases",
        "a lease is not used: .*10.244.201.0-24",
        "udptun lease release",
        leases_with("10.244.201.0-24", "junk"),
        leases_without("10.244.201.0-24"),
        severity="warning",
    ),
    Fault(
        "a host with another backend type",
        "problem-lines",
        r"peer 192\.168\.77\.200 leases 10\.244\.200\.0/24 for vxlan",
        "give both hosts one Backend.Type",
        lease_of_type("vxlan"),
        leases_without("10.244.200.0-24"),
    ),
    # Files.
    Fault(
        "no subnet.env",
        "subnet-env",
        f"{SUBNET_ENV} is missing",
        "restart the daemon",
        shell(f"mv {SUBNET_ENV} /run/kept.env"),
        shell(f"mv /run/kept.env {SUBNET_ENV}"),
    ),
    Fault(
        "a subnet.env of another subnet",
        "subnet-env",
        r"FLANNEL_SUBNET is 10\.244\.99\.1/24, and the daemon runs with",
        "restart the daemon",
        shell(
            f"cp {SUBNET_ENV} /run/kept.env; sed -i 's|^FLANNEL_SUBNET=.*|FLANNEL_SUBNET=10.244.99.1/24|' {SUBNET_ENV}"
        ),
        shell(f"mv /run/kept.env {SUBNET_ENV}"),
    ),
    Fault(
        "a subnet.env of another IPv6 subnet",
        "subnet-env",
        r"FLANNEL_IPV6_SUBNET is fd00:1::1/64, and the daemon runs with",
        "restart the daemon",
        shell(
            f"cp {SUBNET_ENV} /run/kept.env",
            f"sed -i 's|^FLANNEL_IPV6_SUBNET=.*|FLANNEL_IPV6_SUBNET=fd00:1::1/64|' {SUBNET_ENV}",
        ),
        shell(f"mv /run/kept.env {SUBNET_ENV}"),
    ),
    Fault(
        "a subnet.env of another MTU",
        "subnet-env",
        r"FLANNEL_MTU is 9000, and the daemon carries \d+ bytes",
        "restart the daemon",
        shell(f"cp {SUBNET_ENV} /run/kept.env; sed -i 's|^FLANNEL_MTU=.*|FLANNEL_MTU=9000|' {SUBNET_ENV}"),
        shell(f"mv /run/kept.env {SUBNET_ENV}"),
        severity="warning",
    ),
    Fault(
        "another CNI configuration comes first",
        "cni-configuration",
        "05-other.conflist comes before 10-flannel.conflist",
        f"delete {CNI}/05-other.conflist",
        shell(f"mkdir {CNI}; echo '{OTHERS}' > {CNI}/05-other.conflist; echo '{FLANNELS}' > {CNI}/10-flannel.conflist"),
        shell(f"rm -r {CNI}"),
        argv=CNI_FLAGS,
    ),
    Fault(
        "CNI plugins are missing",
        "cni-plugins",
        "the plugin flannel is in none of",
        f"udptun cni install {BIN}",
        shell(f"mkdir {CNI} {BIN}; echo '{FLANNELS}' > {CNI}/10-flannel.conflist"),
        shell(f"rm -r {CNI} {BIN}"),
        argv=CNI_FLAGS,
    ),
    Fault(
        "others may write the run directory",
        "directories",
        f"others may write to {RUN_DIR}",
        f"chmod go-w {RUN_DIR}",
        shell(f"chmod 0777 {RUN_DIR}"),
        shell(f"chmod 0700 {RUN_DIR}"),
    ),
    Fault(
        "a full disk",
        "directories",
        "the file system of /run/full is full",
        "df -h",
        shell("mkdir -p /run/full; mount -t tmpfs -o size=64k none /run/full; head -c 64k /dev/zero > /run/full/x"),
        shell("umount /run/full"),
        argv=("--state-dir=/run/full",),
    ),
    # Others.
    Fault(
        "flanneld beside us",
        "two-daemons",
        r"flanneld runs here too \(pid \d+\)",
        "stop one of them",
        FLANNELD.start,
        FLANNELD.stop,
    ),
    Fault(
        "a device of flannel's",
        "leftover-devices",
        r"flannel7 is a device as flannel makes them, and not ours",
        "ip link delete flannel7",
        shell("ip tuntap add flannel7 mode tun"),
        shell("ip link del flannel7"),
        severity="warning",
    ),
    Fault(
        "a device of an earlier Network",
        "leftover-devices",
        r"old0 was left by the udptun daemon of 10\.99\.0\.0/16",
        "udptun cleanup",
        shell("ip link add old0 type bridge; ip link set old0 alias 'udptun 10.99.0.0/16'"),
        shell("ip link del old0"),
        severity="warning",
    ),
    Fault(
        "a route of an earlier Network",
        "leftover-routes",
        r"the route 10\.99\.1\.0/24 dev eth0 proto 158 was left",
        r"ip route delete 10\.99\.1\.0/24",
        shell("ip route add 10.99.1.0/24 dev eth0 proto 158"),
        shell("ip route del 10.99.1.0/24"),
        severity="warning",
    ),
    Fault(
        "an IPv6 route of an earlier Network",
        "leftover-routes",
        r"the route fd00:99::/64 dev eth0 metric \d+ proto 158 was left",
        "ip route delete fd00:99::/64",
        shell("ip -6 route add fd00:99::/64 dev eth0 proto 158"),
        shell("ip -6 route del fd00:99::/64"),
        severity="warning",
    ),
    Fault(
        "a VPN's route to the peer's pods",
        "foreign-routes",
        r"the route 10\.244\.\d+\.0/25 dev eth0 proto 3 is not ours and takes packets to pods of",
        r"ip route delete 10\.244\.\d+\.0/25",
        on_peers_subnet("ip route add $(echo {} | sed s/24$/25/) dev eth0"),
        on_peers_subnet("ip route del $(echo {} | sed s/24$/25/)"),
    ),
    Fault(
        "a route into the IPv6 Network",
        "foreign-routes",
        r"the route fd00:244:0:9999::/64 dev eth0 metric \d+ proto 3 is not ours",
        "ip route delete fd00:244:0:9999::/64",
        shell("ip -6 route add fd00:244:0:9999::/64 dev eth0"),
        shell("ip -6 route del fd00:244:0:9999::/64"),
        severity="warning",
    ),
    Fault(
        "a bridge of an earlier lease",
        "overlapping-networks",
        r"the bridge cni9 has 10\.244\.250\.1/24, which is not of this host's subnet any more",
        "ip link delete cni9",
        shell("ip link add cni9 type bridge; ip addr add 10.244.250.1/24 dev cni9"),
        shell("ip link del cni9"),
    ),
    Fault(
        "an address in the IPv6 Network",
        "overlapping-networks",
        r"vpn0 has fd00:244:0:9999::1, an address in fd00:244::/48",
        "choose another Network",
        shell("ip tuntap add vpn0 mode tap; ip addr add fd00:244:0:9999::1/128 dev vpn0 nodad"),
        shell("ip link del vpn0"),
    ),
    Fault(
        "dhcpcd",
        "network-managers",
        "dhcpcd runs and may give flannel0 an address",
        "denyinterfaces",
        DHCPCD.start,
        DHCPCD.stop,
        severity="warning",
    ),
    Fault(
        "the standby stopped",
        "problem-lines",
        r"the standby datapath process \d+ is stopped by a signal",
        r"kill -CONT \d+",
        STANDBY.start,
        STANDBY.stop,
        severity="warning",
    ),
    # The last one, as hosts remember a narrow path for minutes.
    Fault(
        "a narrow path",
        "path-mtu",
        r"packets of \d+ bytes do not reach it",
        "mend the path",
        *filtered("input", "udp dport 8285 meta length > 1300 drop"),
        severity="warning",
    ),
]


STATEFUL = "iptables-nft -{} INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
BEHIND = "iptables-nft -{} INPUT -i eth0 -p udp -j REJECT"
NETWORKD_FILE = "/run/systemd/network/99-all.network"

AT_ONCE = [
    Fault(
        "a memory limit",
        "cgroup-limits",
        "the memory limit of this cgroup is 90 MiB",
        r"resources\.limits\.memory",
        MEMORY_LIMIT.start,
        MEMORY_LIMIT.stop,
        severity="warning",
    ),
    Fault(
        "a CPU limit",
        "cgroup-limits",
        r"the CPU limit of this cgroup is 0\.9 processors",
        r"resources\.limits\.cpu",
        CPU_LIMIT.start,
        CPU_LIMIT.stop,
        severity="warning",
    ),
    Fault(
        "networkd has all interfaces",
        "network-managers",
        f"systemd-networkd runs, and {NETWORKD_FILE} is for every interface, flannel0 among them",
        "Unmanaged=yes",
        shell(f"mkdir -p /run/systemd/network; printf '[Match]\\nName=*\\n' >{NETWORKD_FILE}"),
        shell(f"rm {NETWORKD_FILE}"),
        severity="warning",
    ),
    Fault(
        "networkd",
        "network-managers",
        "systemd-networkd runs",
        "Unmanaged=yes",
        NETWORKD.start,
        NETWORKD.stop,
        severity="warning",
    ),
    Fault(
        "NetworkManager",
        "network-managers",
        "NetworkManager runs, and no file of it leaves flannel0 alone",
        "unmanaged-devices=interface-name:flannel",
        NETWORK_MANAGER.start,
        NETWORK_MANAGER.stop,
        severity="note",
    ),
    Fault(
        "a firewall that lets in what this host has asked for",
        "packet-filters",
        r"rule 2 of INPUT \(iptables-nft, table filter\) rejects packets of peers to UDP port 8285 here unless",
        "iptables-nft -I INPUT -p udp --dport 8285 -j ACCEPT",
        shell(STATEFUL.format("A"), BEHIND.format("A")),
        shell(BEHIND.format("D"), STATEFUL.format("D")),
        severity="warning",
    ),
    Fault(
        "a node without podCIDR",
        "pod-cidr",
        r"node h1: it has no (IPv4 |IPv6 )?podCIDR",
        "allocate-node-cidrs=true",
        API.start,
        API.stop,
    ),
]
"""Faults that do not disturb each other: one look has to name them all.  A look costs more than a fault."""


def edited_leases(host: Host, statement: str) -> None:
    """A copy of the lab's leases, changed, at /run/edited.db."""
    script = (
        "import sqlite3, sys, pathlib; pathlib.Path('/run/edited.db').unlink(missing_ok=True); "
        "db = sqlite3.connect('/run/edited.db'); sqlite3.connect(sys.argv[1]).backup(db); "
        "db.execute(sys.argv[2]); db.commit()"
    )
    host.run([sys.executable, "-c", script, str(LEASES), statement])


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two hosts with a pod each and both families, shared by the faults."""
    with Lab(f"y{os.getpid()}", net_conf=DUAL_STACK_NET_CONF, ipv6=True) as lab:
        lab.daemon_command.append("--iptables-resync=1")
        lab.start()
        for host in lab.hosts:
            wait_until("the peer", lambda host=host: len(read_status(host)["peers"]) == 1, SOON_S)
        yield lab


@pytest.fixture(scope="module")
def doctor(lab: Lab) -> Iterator[Doctor]:
    """On h1."""
    doctor = Doctor(lab.host(1))
    yield doctor
    doctor.close()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: re.sub(r"\W+", "_", fault.name))
def test_fault_is_named_with_cause_and_remedy_and_gone_with_its_cause(lab: Lab, doctor: Doctor, fault: Fault) -> None:
    wait_for_health(doctor)
    find(lab.host(1), doctor, fault)


def test_faults_at_the_same_time_are_all_named(lab: Lab, doctor: Doctor) -> None:
    host = lab.host(1)
    lacking = [it.name for it in AT_ONCE]
    seen: list[Document] = []

    def are_named() -> bool:
        """On a busy machine a check may take longer than one look waits."""
        seen[:] = doctor.look("--store=kube", f"--kube-api-url=http://{UNDERLAY[1]}:{KUBE_PORT}")["findings"]
        lacking[:] = [it.name for it in AT_ONCE if it.name in lacking and not it.is_in(seen)]
        return not lacking

    with ExitStack() as undo:
        for fault in AT_ONCE:
            fault.inflict(host)
            undo.callback(fault.heal, host)
        assert is_soon(are_named), (lacking, seen)


def test_a_route_that_leads_the_tunnel_into_itself_is_named(lab: Lab, doctor: Doctor) -> None:
    """Behind all others: the kernel learns a path MTU that is none."""
    fault = Fault(
        "the route to the peer leads into the tunnel",
        "peer-routes",
        rf"the route to {PEER} leads into flannel0",
        f"ip route get {PEER}",
        shell(f"ip route add default dev flannel0 table 100; ip rule add to {PEER} lookup 100"),
        shell(f"ip rule del to {PEER} lookup 100; ip route flush table 100"),
    )
    find(lab.host(1), doctor, fault)


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_a_kernel_that_corrupts_what_is_sent_and_a_clock_that_is_wrong_are_named(lab: Lab, tmp_path: Path) -> None:
    """Of another machine, as far as the doctor's process hears: this one has one kernel and one clock for all."""
    library = tmp_path / "other_machine.so"
    source = Path(__file__).with_name("other_machine.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    other = {"OTHER_RELEASE": "7.1.0", "OTHER_TIME_S": "172800", "OTHER_NTP": "no", "LD_PRELOAD": str(library)}
    argv = [sys.executable, "-m", "udptun", "doctor", "--json", "--store=etcd", "--etcd-endpoints=http://127.0.0.1:1"]
    command = ["env", *(f"{name}={value}" for name, value in other.items()), *argv]
    said = json.loads(lab.host(1).run(command, check=False).stdout)
    by_check = {check: [it for it in said["findings"] if it["check"] == check] for check in ("kernel-version", "clock")}
    (kernel,) = by_check["kernel-version"]
    assert "Linux 7.1.0" in kernel["cause"]
    assert "kernel" in kernel["remedy"]
    ahead, unkept = by_check["clock"]
    assert re.search(r"our lease has expired \d+ min ago by this host's clock: it is ahead", ahead["cause"])
    assert "date" in ahead["remedy"]
    assert (unkept["severity"], "no NTP" in unkept["cause"], "chrony" in unkept["remedy"]) == ("note", True, True)


def find(host: Host, doctor: Doctor, fault: Fault) -> None:
    """Do it to the host, see that the doctor names it, and undo it."""
    seen: list[Document] = []

    def is_named() -> bool:
        seen[:] = doctor.look(*fault.argv, path=fault.path)["findings"]
        return fault.is_in(seen)

    fault.inflict(host)
    try:
        assert is_soon(is_named), f"not named: {seen}"
    finally:
        fault.heal(host)


def wait_for_health(doctor: Doctor) -> None:
    found: list[Document] = []

    def is_well() -> bool:
        found[:] = doctor.look()["findings"]
        return not found

    assert is_soon(is_well), f"found on a host that is well: {found}"


def is_soon(holds: Callable[[], bool]) -> bool:
    """Whether it holds within SOON_S; each look is some milliseconds of work."""
    deadline_s = time.monotonic() + SOON_S
    while not (is_there := holds()) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return is_there


# --- without a daemon, and what it takes another one to see


@pytest.fixture(scope="module")
def bare(lab: Lab) -> Iterator[tuple[Host, Doctor]]:
    """A third host, on which no daemon has run, and its doctor with the flags of the others' daemons."""
    host = lab.add_host()
    doctor = Doctor(host)
    yield host, doctor
    doctor.close()
    host.down()


FLAGS = (f"--store=local:{LEASES}", f"--net-config-path={NET_CONF}")


def test_without_a_daemon_that_is_the_only_finding_and_nothing_is_changed(bare: tuple[Host, Doctor]) -> None:
    host, doctor = bare
    before = host.run(["sh", "-c", "ip addr; ip route; ls -lR /run/udptun /run/flannel /var/lib/udptun"], check=False)
    said: Document = {}

    def is_alone() -> bool:
        said.update(doctor.look(*FLAGS))
        found = [it["check"] for it in said["findings"]]
        # On a busy machine the store, or a check, may take longer than a look waits.
        return found == ["daemon"] and {"store", "network-config", "tun-device", "unused-leases"} <= set(said["fine"])

    assert is_soon(is_alone), said
    assert "no udptun daemon answers at /run/udptun/udptun.sock" in said["findings"][0]["cause"]
    assert said["exit_status"] == 2
    assert said["peers"] == "2 peers"
    after = host.run(["sh", "-c", "ip addr; ip route; ls -lR /run/udptun /run/flannel /var/lib/udptun"], check=False)
    assert after.stdout == before.stdout


def test_without_any_store_it_makes_none(bare: tuple[Host, Doctor]) -> None:
    host, doctor = bare
    seen: list[list[str]] = []

    def are_both_named() -> bool:
        seen.append([it["check"] for it in doctor.look()["findings"]])
        return seen[-1] == ["daemon", "store"]

    assert is_soon(are_both_named), seen
    assert not host.path("/var/lib/udptun/leases.db").exists()


def test_a_program_that_has_our_port_is_named(bare: tuple[Host, Doctor]) -> None:
    host, doctor = bare
    script = 'import signal, socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(("", 8285)); signal.pause()'
    holder = Background(f"exec {sys.executable} -c '{script}'")
    holder.start(host)
    try:
        wait_until("the port", lambda: ":8285 " in host.run(["ss", "-Hlun"]).stdout, SOON_S)
        named: list[Document] = []

        def is_named() -> bool:
            named[:] = [it for it in doctor.look(*FLAGS)["findings"] if it["check"] == "tunnel-port"]
            return bool(named)

        assert is_soon(is_named)
        (found,) = named
        assert re.fullmatch(
            r"UDP port 8285 belongs to python\S* \(pid \d+\), so the daemon cannot start", found["cause"]
        )
        assert "ss -ulpn" in found["remedy"]
    finally:
        holder.stop(host)


def test_capabilities_that_are_missing_are_named(lab: Lab) -> None:
    """Those of this process, where no daemon can be seen."""
    drop = ["setpriv", "--bounding-set=-net_admin,-net_raw", sys.executable, "-m", "udptun", "doctor", "--json"]
    said = json.loads(lab.host(2).run([*drop, "--run-dir=/run/none", *FLAGS], check=False).stdout)
    found = [it["subject"] for it in said["findings"] if it["check"] == "capabilities"]
    assert found == ["CAP_NET_ADMIN", "CAP_NET_RAW"]
    assert "run as root" in said["not_looked_at"]["reachability"]


def test_a_daemon_that_hangs_is_named_within_seconds(lab: Lab, doctor: Doctor) -> None:
    host = lab.host(1)
    pid = str(read_status(host)["pid"])
    host.run(["kill", "-STOP", pid])
    try:
        began_s = time.monotonic()
        (found,) = [it for it in doctor.look()["findings"] if it["check"] == "daemon"]
        assert "does not answer within 5 s" in found["cause"]
        assert time.monotonic() - began_s < 20
    finally:
        host.run(["kill", "-CONT", pid])


def test_a_person_reads_two_lines_for_a_fault_and_a_summary(lab: Lab) -> None:
    """As a command, with its exit status; --all adds what is fine."""
    host = lab.host(2)
    command = [sys.executable, "-m", "udptun", "doctor"]
    looks: list[subprocess.CompletedProcess[str]] = []

    def is_first() -> bool:
        # What was done to h1 before may still be an error here.
        looks[:] = [host.run([*command, "-v"], check=False)]
        return looks[0].stdout.startswith("error    forwarding: net.ipv4.ip_forward is 0")

    host.run(["sysctl", "-qw", "net.ipv4.ip_forward=0"])
    try:
        assert is_soon(is_first), looks
    finally:
        host.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
    (done,) = looks
    lines = done.stdout.splitlines()
    assert done.returncode == 2
    assert lines[1].startswith("         -> run `sysctl -w net.ipv4.ip_forward=1`")
    assert "ok       clock: the clock, NTP, and what leases say of it" in lines
    assert re.match(r"\d+ checks, 2 peers asked: \d error", lines[-1])
    assert "\33" not in done.stdout


def test_a_datapath_without_a_standby_is_named(lab: Lab, doctor: Doctor) -> None:
    """Behind all others: that processes have died is a problem line for a minute."""

    def inflict(host: Host) -> None:
        # What begins from now on ends at once.
        shell(f"mount --bind /dev/null {WORKER}")(host)
        (standby,) = read_status(host)["datapath"]["standby_pids"]
        shell(f"kill -9 {standby}")(host)

    fault = Fault(
        "no standby",
        "datapath",
        "no datapath process is on standby, so packets are lost when the active one dies",
        "the daemon starts one; if it does not, its log says why",
        inflict,
        shell(f"umount {WORKER}"),
        severity="warning",
    )
    find(lab.host(1), doctor, fault)


def test_after_the_daemon_has_ended_its_datapath_is_looked_at_all_the_same(lab: Lab, doctor: Doctor) -> None:
    host = lab.host(1)
    assert host.stop_daemon() == 0
    seen: list[Document] = []

    def is_looked_at() -> bool:
        seen[:] = [doctor.look(*FLAGS)]
        is_alone = [it["check"] for it in seen[0]["findings"]] == ["daemon"]
        return is_alone and {"forwarding", "packet-filters", "reachability"} <= set(seen[0]["fine"])

    assert is_soon(is_looked_at), seen
