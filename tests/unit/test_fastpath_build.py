"""What the compiler makes of the fast path: no GIL in the loop, one description of the shared memory, portable C."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import udptun
from udptun import _fastpath
from udptun._kabi import ffi, lib

SOURCE = Path(udptun.__file__).parent
CSRC = SOURCE / "fastpath" / "csrc"

CHECKSUM_TEST = r"""
#include <stdio.h>
#include <stdlib.h>
#include "checksum.h"
#include "fields.h"

/* RFC 1071 byte by byte, in big-endian words. */
static unsigned slow(const unsigned char *p, size_t n)
{
    unsigned long sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (unsigned long)p[i] << (i & 1 ? 0 : 8);
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (unsigned)sum;
}

int main(void)
{
    static unsigned char data[4096 + 8];
    int rounds = 0;
    srand(1);
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (unsigned char)rand();
    for (size_t at = 0; at < 8; at++)
        for (size_t n = 0; n <= 4096; n += n < 64 ? 1 : 61, rounds++) {
            uint16_t folded = ut_fold(ut_sum(data + at, n, 0));
            unsigned char *bytes = (unsigned char *)&folded;
            if ((unsigned)(bytes[0] << 8 | bytes[1]) != slow(data + at, n))
                return printf("differs at offset %zu length %zu\n", at, n), 1;
        }
    printf("%d rounds, slot %zu, stats %zu\n", rounds, sizeof(struct ut_slot), sizeof(struct ut_stats));
    for (size_t i = 0; i < UT_N_FIELDS; i++) {
        const struct ut_field *f = &ut_fields[i];
        printf("%s.%s %zu %zu\n", f->structure, f->name, f->offset, f->bytes);
    }
    return 0;
}
"""


def compile_and_run(tmp_path: Path, compiler: list[str], runner: list[str]) -> str:
    program = tmp_path / "checksum"
    source = tmp_path / "checksum.c"
    source.write_text(CHECKSUM_TEST)
    subprocess.run(
        [
            *(*compiler, "-std=gnu11", "-D_GNU_SOURCE", "-O3", "-Wall", "-Wextra", "-Werror", "-static"),
            *(f"-I{CSRC}", source, "-o", program),
        ],
        check=True,
    )
    return subprocess.run([*runner, program], check=True, capture_output=True, text=True).stdout


def expected_output(rounds: int) -> str:
    lines = [f"{rounds} rounds, slot {_fastpath.LAYOUT['slot']}, stats {_fastpath.LAYOUT['stats']}"]
    for structure, fields in _fastpath.FIELDS.items():
        lines += [f"{structure}.{name} {offset} {length}" for name, (offset, length) in fields.items()]
    return "\n".join(lines) + "\n"


def test_fields_follow_each_other_within_their_structure() -> None:
    shared = {"peer", "slot", "table", "worker", "peer_stats", "stray", "stats", "in_flight", "ring", "ring_slot"}
    shared |= {"trace", "trace_filter", "trace_ring", "traced"}
    assert set(_fastpath.FIELDS) == shared | {"learned", "length", "read", "remote"}
    # A structure within in_flight, which has an array of them.
    sizes = _fastpath.LAYOUT | {"read": _fastpath.FIELDS["in_flight"]["read"][1]}
    for structure, fields in _fastpath.FIELDS.items():
        end = 0
        for offset, length in fields.values():
            assert end <= offset
            end = offset + length
        assert end <= sizes[structure]


ROUNDS = 8 * (64 + len(range(64, 4097, 61)))


def test_checksum_equals_the_textbook_sum_at_every_alignment_and_length(tmp_path: Path) -> None:
    assert compile_and_run(tmp_path, ["gcc"], []) == expected_output(ROUNDS)


def test_c_parts_give_the_same_results_and_layout_on_arm64(tmp_path: Path) -> None:
    for tool in ("aarch64-linux-gnu-gcc", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: arm64 stays unverified here")
    assert compile_and_run(tmp_path, ["aarch64-linux-gnu-gcc"], ["qemu-aarch64"]) == expected_output(ROUNDS)


def test_fast_path_compiles_for_arm64(cythonized: tuple[Path, str]) -> None:
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.skip("aarch64-linux-gnu-gcc is not installed: arm64 stays unverified here")
    import sysconfig

    generated, _ = cythonized
    # The interpreter's headers are those of the build machine; -fsyntax-only does not look at what differs.
    subprocess.run(
        [
            *("aarch64-linux-gnu-gcc", "-std=gnu11", "-fsyntax-only", "-Wall", "-Wno-unused-function"),
            *(f"-I{CSRC}", f"-I{sysconfig.get_paths()['include']}", generated),
        ],
        check=True,
    )


@pytest.fixture(scope="module")
def cythonized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The generated C, and what Cython said while making it."""
    generated = tmp_path_factory.mktemp("cython") / "_fastpath.c"
    done = subprocess.run(
        [sys.executable, "-m", "cython", "-3", "udptun/_fastpath.pyx", "-o", generated],
        cwd=SOURCE.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    return generated, done.stdout + done.stderr


def test_no_function_of_the_fast_path_can_take_the_gil_once_it_has_let_go_of_it(cythonized: tuple[Path, str]) -> None:
    generated, said = cythonized
    assert "performance hint" not in said
    text = generated.read_text()
    # A nogil function that may raise would ensure the GIL in its body.  Cython's own macros do not match.
    assert re.findall(r"=\s*__Pyx_PyGILState_Ensure\(\)", text) == []
    # The text is that of our functions, so the check can fail.
    assert "encap_turn" in text


LOOP = [SOURCE / "_fastpath.pyx", *sorted((SOURCE / "fastpath").glob("*.pxd"))]


@pytest.mark.parametrize("path", LOOP, ids=lambda path: path.name)
def test_every_function_under_the_loop_is_declared_noexcept_nogil(path: Path) -> None:
    loop, _, _ = path.read_text().partition("Python face")
    functions = re.findall(r"^cdef (?:inline )?(?:const )?\S+ \*?\w+\(.*?\)(.*?):$", loop, re.MULTILINE | re.DOTALL)
    assert set(functions) <= {" noexcept nogil"}
    assert len(functions) == len(re.findall(r"^cdef [^:\n]*\w\(", loop, re.MULTILINE))


def test_the_packet_loop_has_its_functions_where_they_are_looked_for() -> None:
    text = "".join(path.read_text().partition("Python face")[0] for path in LOOP)
    found = set(re.findall(r"^cdef (?:inline )?(?:const )?\S+ \*?(\w+)\(", text, re.MULTILINE))
    assert len(found) >= 80
    assert {"encap_turn", "encap", "send_groups", "decap_turn", "decap", "write_items", "run_loop"} <= found


def test_numbers_in_the_fast_path_are_the_kernel_headers() -> None:
    assert f"VNET = {ffi.sizeof('struct virtio_net_hdr')} " in (SOURCE / "fastpath" / "coalesce.pxd").read_text()
    assert lib.VIRTIO_NET_HDR_F_NEEDS_CSUM == 1
    assert lib.VIRTIO_NET_HDR_GSO_TCPV4 == 1


OFFLOADS_TEST = r"""
#include <linux/udp.h>
#include <linux/virtio_net.h>
#include <stdio.h>
#include "cmsg.h"

static void show(int family, int level, int type)
{
    char room[UT_SEND_CMSG_BYTES];
    struct sockaddr remote = {.sa_family = family};
    struct msghdr message = {.msg_name = &remote};

    _Static_assert(sizeof(room) >= UT_CMSG_BYTES, "the same room does for what the kernel writes");
    ut_put_segment_size(&message, room, 1234);
    ut_put_tos(&message, room, 3);
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&message);
    uint16_t size;
    memcpy(&size, CMSG_DATA(cmsg), sizeof(size));
    printf("%d %d %d", cmsg->cmsg_level, cmsg->cmsg_type, size);
    cmsg = CMSG_NXTHDR(&message, cmsg);
    printf(" %d %d %d", cmsg->cmsg_level, cmsg->cmsg_type, *(int *)CMSG_DATA(cmsg));
    printf(" %d", CMSG_NXTHDR(&message, cmsg) == NULL);

    /* What the kernel writes: an int, and a byte, or with IPv6 another int. */
    int told = 4321, tos = 0x81;
    cmsg = CMSG_FIRSTHDR(&message);
    cmsg->cmsg_type = UDP_GRO;
    cmsg->cmsg_len = CMSG_LEN(sizeof(told));
    memcpy(CMSG_DATA(cmsg), &told, sizeof(told));
    cmsg = CMSG_NXTHDR(&message, cmsg);
    cmsg->cmsg_level = level;
    cmsg->cmsg_type = type;
    cmsg->cmsg_len = CMSG_LEN(family == AF_INET ? 1 : sizeof(tos));
    memcpy(CMSG_DATA(cmsg), &tos, cmsg->cmsg_len - CMSG_LEN(0));
    ut_read_control(&message, &told, &tos);
    printf(" %d %d", told, tos);
    message.msg_controllen = 0;
    ut_read_control(&message, &told, &tos);
    printf(" %d %d\n", told, tos);
}

int main(void)
{
    show(AF_INET, IPPROTO_IP, IP_TOS);
    show(AF_INET6, IPPROTO_IPV6, IPV6_TCLASS);
    return 0;
}
"""


def test_control_messages_are_those_of_the_kernel_headers(tmp_path: Path) -> None:
    (tmp_path / "cmsg.c").write_text(OFFLOADS_TEST)
    program = tmp_path / "cmsg"
    compiler = ("gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}")
    subprocess.run([*compiler, tmp_path / "cmsg.c", "-o", program], check=True)
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert said == "17 103 1234 0 1 3 1 4321 129 0 0\n17 103 1234 41 67 3 1 4321 129 0 0\n"
