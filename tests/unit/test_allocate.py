"""Which subnet a host takes: its own, the one before, or a random free one."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udptun.backends.choice import parse_net_conf
from udptun.config.net_conf import NetConf
from udptun.core.errors import SubnetExhaustedError
from udptun.core.lease import Json, Lease, LeaseAttrs, Subnets
from udptun.membership.allocate import CANDIDATES, chooser, left_reservations
from udptun.membership.former import FormerLease, UndecidedError
from udptun.membership.identity import Identity
from udptun.stores.base import SubnetChoice, dropped_by

ME = Identity(IPv4Address("192.0.2.1"), 8285, "me")
DUAL = '"EnableIPv6":true,"IPv6Network":"fc00::/48"'


def conf(keys: str = "") -> NetConf:
    return parse_net_conf('{"Network":"10.244.0.0/16"' + (f",{keys}" if keys else "") + "}", "test")


def subnets(ipv4: str, ipv6: str | None = None) -> Subnets:
    return Subnets(IPv4Network(ipv4), None if ipv6 is None else IPv6Network(ipv6))


def lease(ipv4: str, public_ip: str, ipv6: str | None = None, **data: Json) -> Lease:
    attrs = LeaseAttrs(IPv4Address(public_ip), backend_type="udp" if data else "", backend_data=data or None)
    return Lease(subnets(ipv4, ipv6), attrs, expires_s=2e9)


def reserved(ipv4: str, public_ip: str, ipv6: str | None = None, **data: Json) -> Lease:
    return replace(lease(ipv4, public_ip, ipv6, **data), expires_s=None)


def choose(
    config: NetConf, leases: Iterable[Lease], previous: Subnets | None = None, me: Identity = ME, seed: int = 1
) -> SubnetChoice:
    return chooser(config, me, previous, random.Random(seed))(list(leases))


def test_choice_is_the_own_lease_when_it_fits() -> None:
    leases = [lease("10.244.3.0/24", "192.0.2.9"), lease("10.244.7.0/24", "192.0.2.1")]
    assert choose(conf(), leases, previous=subnets("10.244.9.0/24")) == SubnetChoice(subnets("10.244.7.0/24"))


def test_own_lease_is_known_by_public_ip_and_port() -> None:
    leases = [
        lease("10.244.3.0/24", "192.0.2.1", Port=9000, NodeID="other"),
        lease("10.244.7.0/24", "192.0.2.1", Port=8285, NodeID="me"),
    ]
    assert choose(conf(), leases) == SubnetChoice(subnets("10.244.7.0/24"))


def test_own_lease_without_a_port_has_the_configured_one() -> None:
    flannels = lease("10.244.7.0/24", "192.0.2.1")
    for port in (8285, 9000):
        assert choose(conf(), [flannels], me=Identity(ME.public_ip, port, "me")).subnets == flannels.subnets


def test_a_backend_without_a_port_owns_every_lease_of_its_public_ip() -> None:
    """It may have had another backend in its last run."""
    before = lease("10.244.7.0/24", "192.0.2.1", Port=9000, NodeID="other")
    assert choose(conf(), [before], me=Identity(ME.public_ip, None, "me")).subnets == before.subnets


def test_own_lease_is_reused_when_the_node_id_was_lost() -> None:
    leases = [lease("10.244.7.0/24", "192.0.2.1", Port=8285, NodeID="before the disk was replaced")]
    assert choose(conf(), leases) == SubnetChoice(subnets("10.244.7.0/24"))


@pytest.mark.parametrize(
    "own", ["10.244.7.0/25", "10.244.0.0/24", "10.245.7.0/24", "10.244.0.0/20"], ids=lambda own: own
)
def test_own_lease_is_dropped_when_the_configuration_no_longer_has_it(own: str) -> None:
    choice = choose(conf(), [lease(own, "192.0.2.1")])
    assert choice.drop == (subnets(own).key,)
    assert choice.subnets.ipv4.subnet_of(IPv4Network("10.244.0.0/16"))
    assert choice.subnets.ipv4.prefixlen == 24


def test_first_fitting_own_lease_in_key_order_is_kept_and_the_others_dropped() -> None:
    leases = [lease(f"10.244.{n}.0/{length}", "192.0.2.1") for n, length in ((9, 24), (5, 24), (4, 25), (7, 24))]
    assert choose(conf(), leases) == SubnetChoice(
        subnets("10.244.5.0/24"), ("10.244.4.0-25", "10.244.7.0-24", "10.244.9.0-24")
    )


def test_ground_of_a_dropped_own_lease_is_free_again() -> None:
    config = conf('"SubnetMin":"10.244.5.0","SubnetMax":"10.244.5.0"')
    assert choose(config, [lease("10.244.5.128/25", "192.0.2.1")]) == SubnetChoice(
        subnets("10.244.5.0/24"), ("10.244.5.128-25",)
    )


def test_previous_subnet_is_taken_again_when_it_is_free() -> None:
    others = [lease(f"10.244.{n}.0/24", f"192.0.2.{n}") for n in range(2, 200)]
    assert choose(conf(), others, subnets("10.244.222.0/24")) == SubnetChoice(subnets("10.244.222.0/24"))


@pytest.mark.parametrize("held", ["10.244.222.0/24", "10.244.222.64/26", "10.244.208.0/20"], ids=lambda held: held)
def test_previous_subnet_is_left_alone_when_another_lease_overlaps_it(held: str) -> None:
    choice = choose(conf(), [lease(held, "192.0.2.9")], subnets("10.244.222.0/24"))
    assert not choice.subnets.ipv4.overlaps(IPv4Network(held))
    assert choice.drop == ()


@pytest.mark.parametrize("had", ["10.99.3.0/24", "10.244.222.0/25", "10.244.0.0/24"], ids=lambda had: had)
def test_previous_subnet_is_ignored_when_the_configuration_no_longer_has_it(had: str) -> None:
    choice = choose(conf(), [], subnets(had))
    assert choice.subnets.ipv4.prefixlen == 24
    assert choice.subnets.ipv4.subnet_of(IPv4Network("10.244.0.0/16"))
    assert choice.subnets != subnets(had)


def test_a_host_that_moved_keeps_the_subnet_that_its_node_id_and_subnet_env_both_name() -> None:
    held = lease("10.244.7.0/24", "192.0.2.99", Port=8285, NodeID="me")
    assert choose(conf(), [held], subnets("10.244.7.0/24")) == SubnetChoice(subnets("10.244.7.0/24"))


def test_a_node_id_alone_takes_no_lease_because_a_cloned_disk_has_it_too() -> None:
    held = lease("10.244.7.0/24", "192.0.2.99", Port=8285, NodeID="me")
    choice = choose(conf(), [held])
    assert choice.subnets != held.subnets
    assert choice.drop == ()


# --- a lease that flanneld wrote before our address changed

HAD = subnets("10.244.7.0/24")
FLANNELS = replace(lease("10.244.7.0/24", "192.0.2.99"), revision=5)
KEPT = SubnetChoice(HAD)


def vxlan(public_ip: str, mac: str, **data: Json) -> LeaseAttrs:
    return LeaseAttrs(
        IPv4Address(public_ip), backend_type="vxlan", backend_data={"VNI": 1, "VtepMAC": mac.lower(), **data}
    )


class Link:
    """What ARP says of addresses, and which it was asked about."""

    def __init__(self, *used: str) -> None:
        self.used = used
        self.asked: list[str] = []

    async def is_in_use(self, ip: IPv4Address) -> bool:
        self.asked.append(str(ip))
        return str(ip) in self.used


def former(link: Link | None = None, addresses: Collection[str] = ("192.0.2.1",), mac: str = "") -> FormerLease:
    own = vxlan("192.0.2.1", mac, NodeID="me") if mac else LeaseAttrs(IPv4Address("192.0.2.1"))
    return FormerLease(HAD, own, [IPv4Address(ip) for ip in addresses], (link or Link()).is_in_use)


async def choose_after_asking(leases: Sequence[Lease], it: FormerLease, config: NetConf | None = None) -> SubnetChoice:
    choose = chooser(config or conf(), ME, HAD, random.Random(1), it)
    while True:
        try:
            return choose(leases)
        except UndecidedError as exc:
            await exc.find_out()


async def test_flannels_lease_is_kept_when_nobody_has_its_address_any_more() -> None:
    """The host got another subnet, and its pods, which subnet.env had given addresses, were cut off."""
    link = Link()
    assert await choose_after_asking([FLANNELS], former(link)) == KEPT
    assert link.asked == ["192.0.2.99"]


async def test_flannels_lease_is_left_alone_when_another_host_has_its_address() -> None:
    it = former(Link("192.0.2.99"))
    choice = await choose_after_asking([FLANNELS], it)
    assert choice.subnets != HAD
    assert choice.drop == ()
    own = replace(FLANNELS, subnets=choice.subnets, attrs=LeaseAttrs(ME.public_ip))
    line = it.left_alone([FLANNELS], own)
    assert line.startswith("10.244.7.0/24, which subnet.env names, is left to 192.0.2.99, which may be another host; ")
    assert "`udptun lease reserve 10.244.7.0/24 --public-ip 192.0.2.1`" in line


async def test_flannels_lease_is_kept_without_a_question_when_its_address_or_its_mac_is_ours() -> None:
    link = Link("192.0.2.99")
    assert await choose_after_asking([FLANNELS], former(link, ("192.0.2.1", "192.0.2.99"))) == KEPT
    of_vtep = replace(FLANNELS, attrs=vxlan("192.0.2.99", "02:00:00:00:00:0a"))
    assert await choose_after_asking([of_vtep], former(link, mac="02:00:00:00:00:0A")) == KEPT
    assert link.asked == []
    assert (await choose_after_asking([of_vtep], former(link, mac="02:00:00:00:00:0b"))).subnets != HAD


OTHERS = {
    "a reservation": reserved("10.244.7.0/24", "192.0.2.99"),
    "udptun's": lease("10.244.7.0/24", "192.0.2.99", Port=8285, NodeID="other"),
    "udptun's without NodeID": lease("10.244.7.0/24", "192.0.2.99", Udptun=1),
    "wider": lease("10.244.6.0/23", "192.0.2.99"),
    "a part": lease("10.244.7.0/25", "192.0.2.99"),
    "next to it": lease("10.244.8.0/24", "192.0.2.99"),
}


@pytest.mark.parametrize("held", OTHERS.values(), ids=OTHERS)
async def test_no_other_lease_is_taken_for_one_that_flanneld_left_here(held: Lease) -> None:
    link = Link()
    everything = former(link, ("192.0.2.1", "192.0.2.99"))
    choice = await choose_after_asking([held], everything)
    assert not choice.subnets.ipv4.overlaps(held.subnet)
    assert (choice.drop, link.asked) == ((), [])


async def test_flannels_lease_of_before_is_neither_asked_about_nor_dropped_when_there_is_one_at_our_address() -> None:
    """flannel takes the lease at its address too, whatever subnet.env says."""
    link = Link()
    leases = [FLANNELS, lease("10.244.9.0/24", "192.0.2.1")]
    assert await choose_after_asking(leases, former(link)) == SubnetChoice(subnets("10.244.9.0/24"))
    assert link.asked == []
    # One that the configuration no longer has says nothing against the one before.
    unusable = lease("10.244.9.0/25", "192.0.2.1")
    assert await choose_after_asking([FLANNELS, unusable], former(link)) == SubnetChoice(HAD, (unusable.key,))


async def test_what_is_written_after_the_answer_is_asked_about_anew() -> None:
    """Whoever writes the lease meanwhile is alive."""
    link = Link()
    it = former(link)
    assert await choose_after_asking([FLANNELS], it) == KEPT
    link.used = ("192.0.2.99",)
    assert (await choose_after_asking([replace(FLANNELS, revision=6)], it)).subnets != HAD


async def test_of_two_hosts_that_claim_flannels_lease_the_second_leaves_it_alone() -> None:
    """A machine and its copy, both with the subnet.env: the store lets one be first, and asks the other again."""
    it = former()
    assert await choose_after_asking([FLANNELS], it) == KEPT
    taken = lease("10.244.7.0/24", "192.0.2.2", Port=8285, NodeID="copy")
    assert (await choose_after_asking([taken], it)).subnets != HAD


def test_new_subnet_is_a_uniform_choice_of_the_first_hundred_free() -> None:
    taken = [lease("10.244.1.0/24", "192.0.2.9"), lease("10.244.4.0/23", "192.0.2.8")]
    bases = Counter(
        int(choose(conf(), taken, seed=seed).subnets.ipv4.network_address) >> 8 & 0xFF for seed in range(5_000)
    )
    expected = [n for n in range(2, 200) if n not in (4, 5)][:CANDIDATES]
    assert sorted(bases) == expected
    # 50 expected for each; 5 standard deviations of a binomial are 35.
    assert all(15 < count < 85 for count in bases.values())


def test_last_free_subnet_is_found_between_leases_of_other_lengths() -> None:
    config = conf('"SubnetMin":"10.244.1.0","SubnetMax":"10.244.8.0"')
    taken = [
        lease("10.244.0.0/23", "192.0.2.2"),
        lease("10.244.2.0/24", "192.0.2.3"),
        lease("10.244.3.128/26", "192.0.2.4"),
        lease("10.244.4.0/22", "192.0.2.5"),
    ]
    assert choose(config, taken).subnets == subnets("10.244.8.0/24")


def test_exhaustion_says_how_many_leases_take_how_many_subnets() -> None:
    config = conf('"SubnetMin":"10.244.1.0","SubnetMax":"10.244.3.0"')
    taken = [lease(f"10.244.{n}.0/24", f"192.0.2.{n}") for n in range(1, 6) if n != 4]
    outside = lease("10.245.0.0/16", "192.0.2.7")
    stranger = Identity(IPv4Address("192.0.2.250"), 1, "x")
    with pytest.raises(SubnetExhaustedError) as caught:
        choose(config, [*taken[:3], outside, *taken[3:]], me=stranger)
    assert str(caught.value).startswith(
        "out of subnets: 3 leases take all 3 subnets between 10.244.1.0 and 10.244.3.0 (/24);"
    )


def test_ipv6_is_chosen_on_its_own() -> None:
    config = conf(DUAL)
    taken = [lease("10.244.1.0/24", "192.0.2.9", "fc00:0:0:5::/64")]
    choices = [choose(config, taken, seed=seed).subnets for seed in range(200)]
    assert all(choice.ipv6 is not None and choice.ipv6.prefixlen == 64 for choice in choices)
    assert IPv6Network("fc00:0:0:5::/64") not in {choice.ipv6 for choice in choices}
    offsets = {
        (int(choice.ipv4.network_address) >> 8 & 0xFF) - (int(choice.ipv6.network_address) >> 64 & 0xFFFF)
        for choice in choices
        if choice.ipv6 is not None
    }
    assert len(offsets) > 20


def test_own_lease_keeps_its_ipv4_part_when_ipv6_is_switched_on() -> None:
    choice = choose(conf(DUAL), [lease("10.244.7.0/24", "192.0.2.1")], subnets("10.244.7.0/24"))
    assert choice.drop == ("10.244.7.0-24",)
    assert choice.subnets.ipv4 == IPv4Network("10.244.7.0/24")
    assert choice.subnets.ipv6 is not None


def test_own_lease_is_dropped_when_ipv6_is_switched_off() -> None:
    own = lease("10.244.7.0/24", "192.0.2.1", "fc00:0:0:5::/64")
    assert choose(conf(), [own], own.subnets) == SubnetChoice(subnets("10.244.7.0/24"), (own.key,))


def test_a_reservation_keeps_the_ipv6_subnet_that_fits_when_ipv4_has_to_change() -> None:
    """Before, only its IPv4 subnet was kept: the reservation was left, and a random IPv6 subnet taken."""
    held = reserved("10.99.1.0/24", "192.0.2.1", "fc00:0:0:5::/64")
    choice = choose(conf(DUAL), [held])
    assert choice.drop == (held.key,)
    assert choice.subnets.ipv6 == held.subnets.ipv6
    assert choice.subnets.ipv4 != held.subnets.ipv4
    assert dropped_by(choice, [held]) == ([held], True)


def test_a_reservation_keeps_its_ipv6_subnet_when_ipv4_is_switched_off() -> None:
    held = reserved("10.244.7.0/24", "192.0.2.1", "fc00:0:0:5::/64")
    config = parse_net_conf('{"EnableIPv4":false,' + DUAL + "}", "test")
    choice = choose(config, [held])
    assert choice == SubnetChoice(Subnets(None, held.subnets.ipv6), (held.key,))
    assert dropped_by(choice, [held]) == ([held], True)


def test_a_reservation_by_public_ipv6_is_taken_by_a_host_that_has_ipv4_too() -> None:
    """Before, such a host was known by its PublicIP alone."""
    attrs = LeaseAttrs(None, IPv6Address("2001:db8::1"))
    held = Lease(subnets("10.244.7.0/24"), attrs)
    me = replace(ME, public_ipv6=IPv6Address("2001:db8::1"))
    assert choose(conf(), [held, lease("10.244.8.0/24", "192.0.2.9")], me=me) == SubnetChoice(held.subnets)


def test_dual_stack_lease_and_previous_subnets_are_taken_again() -> None:
    own = lease("10.244.7.0/24", "192.0.2.1", "fc00:0:0:5::/64")
    assert choose(conf(DUAL), [own]) == SubnetChoice(own.subnets)
    assert choose(conf(DUAL), [], own.subnets) == SubnetChoice(own.subnets)


def test_exhaustion_of_ipv6_alone_names_the_ipv6_range() -> None:
    config = conf(DUAL + ',"IPv6SubnetMin":"fc00:0:0:1::","IPv6SubnetMax":"fc00:0:0:1::"')
    with pytest.raises(SubnetExhaustedError, match="between fc00:0:0:1:: and fc00:0:0:1::"):
        choose(config, [lease("10.244.1.0/24", "192.0.2.9", "fc00:0:0:1::/64")])


def test_chooser_may_be_asked_again_after_a_lost_race() -> None:
    choose_again = chooser(conf(), ME, None, random.Random(7))
    taken: list[Lease] = []
    for n in range(2, 250):
        taken.append(Lease(choose_again(taken).subnets, LeaseAttrs(IPv4Address(f"192.0.2.{n}"))))
    assert len({one.key for one in taken}) == 248


def test_choice_is_quick_among_ten_thousand_leases() -> None:
    config = parse_net_conf('{"Network":"10.0.0.0/8"}', "test")
    base = int(config.ipv4.subnet_min)
    taken = [
        Lease(Subnets(IPv4Network((base + n * 256, 24))), LeaseAttrs(IPv4Address(0xC6120000 + n)))
        for n in range(10_000)
    ]
    random.Random(3).shuffle(taken)
    began = time.perf_counter()
    choice = choose(config, taken)
    # 25 ms here; the limit is there to notice a quadratic search, which takes minutes.
    assert time.perf_counter() - began < 2
    assert int(choice.subnets.ipv4.network_address) >= base + 10_000 * 256


@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(20, 28))), st.integers(22, 28), st.integers(0, 1 << 32))
def test_choice_never_overlaps_a_lease_and_is_exhausted_only_when_nothing_is_free(
    held: list[tuple[int, int]], length: int, seed: int
) -> None:
    config = parse_net_conf(f'{{"Network":"10.0.0.0/20","SubnetLen":{length}}}', "test")
    taken = [
        Lease(Subnets(IPv4Network((0x0A000000 + at, bits), strict=False)), LeaseAttrs(IPv4Address("192.0.2.7")))
        for at, bits in held
    ]
    every = [
        IPv4Network((base, length))
        for base in range(int(config.ipv4.subnet_min), int(config.ipv4.subnet_max) + 1, 1 << 32 - length)
    ]
    free = [one for one in every if not any(one.overlaps(other.subnet) for other in taken)]
    if free:
        assert choose(config, taken, seed=seed).subnets.ipv4 in free[:CANDIDATES]
    else:
        with pytest.raises(SubnetExhaustedError):
            choose(config, taken, seed=seed)


def test_of_several_leases_with_our_address_the_one_that_we_wrote_and_used_is_kept() -> None:
    """A stranger's line with our PublicIP, first in key order, moved the host to another subnet at its next start."""
    strangers = lease("10.244.2.0/24", "192.0.2.1")
    others = lease("10.244.3.0/24", "192.0.2.1", NodeID="me")
    used = lease("10.244.7.0/24", "192.0.2.1", NodeID="me")
    leases = [strangers, others, used]
    assert choose(conf(), leases, used.subnets) == SubnetChoice(used.subnets, (others.key, strangers.key))
    assert choose(conf(), leases[:2]).subnets == others.subnets
    assert choose(conf(), leases[:1]).subnets == strangers.subnets


def test_a_lease_without_a_port_is_not_ours_when_only_this_host_has_another_one() -> None:
    """flanneld on the default port, and two of us, behind one address."""
    flannels = lease("10.244.7.0/24", "192.0.2.1")
    mine, others = Identity(ME.public_ip, 9001, "me", 8285), Identity(ME.public_ip, 9002, "other", 8285)
    leases = [
        flannels,
        lease("10.244.8.0/24", "192.0.2.1", Port=9001, NodeID="me"),
        lease("10.244.9.0/24", "192.0.2.1", Port=9002, NodeID="other"),
    ]
    assert choose(conf(), leases, me=mine) == SubnetChoice(leases[1].subnets)
    assert choose(conf(), leases, me=others) == SubnetChoice(leases[2].subnets)
    assert choose(conf(), leases).subnets == flannels.subnets


HELD = {"Port": 8285, "NodeID": "me"}


@pytest.mark.parametrize(
    ("leases", "previous", "config", "choice"),
    [
        pytest.param(
            [lease("10.244.3.0/24", "192.0.2.1", **HELD), reserved("10.244.77.0/24", "192.0.2.1")],
            subnets("10.244.3.0/24"),
            "",
            SubnetChoice(subnets("10.244.3.0/24")),
            id="pods have addresses of another subnet",
        ),
        pytest.param(
            [lease("10.244.3.0/24", "192.0.2.1"), reserved("10.244.77.0/24", "192.0.2.1")],
            subnets("10.244.3.0/24"),
            "",
            SubnetChoice(subnets("10.244.3.0/24")),
            id="pods have addresses of flanneld's subnet",
        ),
        pytest.param(
            [lease("10.244.3.0/24", "192.0.2.1", **HELD), reserved("10.244.77.0/24", "192.0.2.1")],
            None,
            "",
            SubnetChoice(subnets("10.244.77.0/24"), ("10.244.3.0-24",)),
            id="no pod has an address yet",
        ),
        pytest.param(
            [reserved("10.244.3.0/24", "192.0.2.1", **HELD), reserved("10.244.77.0/24", "192.0.2.1")],
            None,
            "",
            SubnetChoice(subnets("10.244.3.0/24")),
            id="two are reserved",
        ),
        pytest.param(
            [reserved("10.244.77.0/24", "192.0.2.9"), lease("10.244.3.0/24", "192.0.2.1")],
            None,
            "",
            SubnetChoice(subnets("10.244.3.0/24")),
            id="another host's",
        ),
        pytest.param(
            [reserved("10.244.1.0/25", "192.0.2.1")],
            None,
            '"SubnetMin":"10.244.1.0","SubnetMax":"10.244.2.0"',
            SubnetChoice(subnets("10.244.2.0/24")),
            id="of another length, in the way",
        ),
        pytest.param(
            [reserved("10.99.1.0/24", "192.0.2.1"), lease("10.99.2.0/24", "192.0.2.1")],
            None,
            '"SubnetMin":"10.244.1.0","SubnetMax":"10.244.1.0"',
            SubnetChoice(subnets("10.244.1.0/24"), ("10.99.2.0-24",)),
            id="of another network",
        ),
        pytest.param(
            [reserved("10.244.7.0/24", "192.0.2.1")],
            None,
            DUAL + ',"IPv6SubnetMin":"fc00:0:0:1::","IPv6SubnetMax":"fc00:0:0:1::"',
            SubnetChoice(subnets("10.244.7.0/24", "fc00:0:0:1::/64"), ("10.244.7.0-24",)),
            id="without the IPv6 that is on now: reserved under the other key",
        ),
        pytest.param(
            [reserved("10.244.7.0/24", "192.0.2.1", "fc00:0:0:1::/64")],
            subnets("10.244.7.0/24"),
            "",
            SubnetChoice(subnets("10.244.7.0/24"), ("10.244.7.0-24&fc00:0:0:1::-64",)),
            id="with the IPv6 that is off now: reserved under the other key",
        ),
    ],
)
def test_a_start_never_deletes_a_reservation(
    leases: list[Lease], previous: Subnets | None, config: str, choice: SubnetChoice
) -> None:
    """A host that had another lease kept that one at its next start, and deleted the reservation without a word.

    One that did not fit the network config was deleted as well.
    """
    assert choose(conf(config), leases, previous) == choice


def test_a_reservation_that_is_left_is_named_with_the_reason() -> None:
    config = conf()
    leases = [
        reserved("10.244.3.0/24", "192.0.2.1", **HELD),
        reserved("10.244.77.0/24", "192.0.2.1"),
        reserved("10.99.1.0/24", "192.0.2.1"),
        reserved("10.244.78.0/24", "192.0.2.9"),
        lease("10.244.79.0/24", "192.0.2.1"),
    ]
    outside = "the network config of 10.244.0.0/16 has no such subnet; `udptun lease release` deletes it"
    assert left_reservations(config, ME, leases, leases[0]) == [
        "10.244.77.0/24 is reserved for this host and is not taken: it has 10.244.3.0/24, which is reserved too; "
        "`udptun lease release` deletes one of them",
        f"10.99.1.0/24 is reserved for this host and is not taken: {outside}",
    ]
    assert left_reservations(config, ME, leases[1:2], leases[4]) == [
        "10.244.77.0/24 is reserved for this host and is not taken: pods may have addresses of 10.244.79.0/24; the "
        "first start after a reboot or `udptun cleanup` takes it"
    ]
    assert left_reservations(config, ME, leases[:1], leases[0]) == []
