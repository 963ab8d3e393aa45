from typing import Any

class _Lib:
    TUNSETIFF: int
    TUNGETIFF: int
    TUNSETOFFLOAD: int
    TUNSETPERSIST: int
    TUNSETVNETHDRSZ: int
    TUNGETVNETHDRSZ: int
    TUNGETFEATURES: int
    TUNSETSNDBUF: int
    IFF_TUN: int
    IFF_TAP: int
    IFF_NO_PI: int
    IFF_VNET_HDR: int
    IFF_MULTI_QUEUE: int
    IFF_PERSIST: int
    IFF_NAPI: int
    IFF_NAPI_FRAGS: int
    IFNAMSIZ: int
    TUN_F_CSUM: int
    TUN_F_TSO4: int
    TUN_F_TSO6: int
    TUN_F_TSO_ECN: int
    TUN_F_USO4: int
    TUN_F_USO6: int
    VIRTIO_NET_HDR_F_NEEDS_CSUM: int
    VIRTIO_NET_HDR_F_DATA_VALID: int
    VIRTIO_NET_HDR_GSO_NONE: int
    VIRTIO_NET_HDR_GSO_TCPV4: int
    VIRTIO_NET_HDR_GSO_TCPV6: int
    VIRTIO_NET_HDR_GSO_UDP_L4: int
    VIRTIO_NET_HDR_GSO_ECN: int
    SOL_UDP: int
    UDP_SEGMENT: int
    UDP_GRO: int
    SO_RCVBUFFORCE: int
    SO_SNDBUFFORCE: int
    SO_ATTACH_FILTER: int
    SO_DETACH_FILTER: int
    SO_ATTACH_BPF: int
    IP_MTU: int
    IP_MTU_DISCOVER: int
    IP_PMTUDISC_DONT: int
    IP_PMTUDISC_WANT: int
    IP_PMTUDISC_DO: int
    IP_PMTUDISC_PROBE: int
    IP_PMTUDISC_INTERFACE: int
    IP_PMTUDISC_OMIT: int
    IPV6_MTU: int
    IPV6_MTU_DISCOVER: int
    IP_RECVERR: int
    IP_FREEBIND: int
    CLONE_NEWNS: int
    CLONE_NEWNET: int
    CLONE_NEWPID: int
    CLONE_NEWUTS: int
    PR_SET_PDEATHSIG: int
    MS_BIND: int
    MS_REC: int
    MS_PRIVATE: int
    MS_NOSUID: int
    MS_NODEV: int
    MS_NOEXEC: int
    BPF_MAP_CREATE: int
    BPF_MAP_LOOKUP_ELEM: int
    BPF_MAP_UPDATE_ELEM: int
    BPF_MAP_DELETE_ELEM: int
    BPF_MAP_LOOKUP_BATCH: int
    BPF_PROG_LOAD: int
    BPF_LINK_CREATE: int
    BPF_MAP_TYPE_HASH: int
    BPF_MAP_TYPE_ARRAY: int
    BPF_MAP_TYPE_PERCPU_ARRAY: int
    BPF_PROG_TYPE_SCHED_CLS: int
    BPF_TCX_INGRESS: int
    BPF_TCX_EGRESS: int

    def setns(self, fd: int, nstype: int) -> int: ...
    def unshare(self, flags: int) -> int: ...
    def prctl_pdeathsig(self, signal: int) -> int: ...
    def bpf(self, command: int, attributes: Any, size: int) -> int: ...
    # cffi takes NULL as ffi.NULL, whose type has no name a stub could give.
    def mount(self, source: bytes, target: bytes, type: Any, flags: int, options: Any) -> int: ...

class _FFI:
    NULL: Any
    errno: int
    def sizeof(self, cdecl: str) -> int: ...
    def from_buffer(self, buffer: bytes | bytearray) -> Any: ...
    def cast(self, cdecl: str, value: Any) -> Any: ...
    def offsetof(self, cdecl: str, field: str) -> int: ...

lib: _Lib
ffi: _FFI
