"""The targets of `python -m tests.fuzz`.

A module of tests/fuzz/targets has `check`, which raises when an input breaks a promise of the code under test,
`mutate`, which makes another input of the same form, SEEDS to begin with, and FOUND: what has broken a promise once.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

CORPUS = Path(__file__).parent / "corpus"
LONGEST_INPUT = 8192
"""Bytes."""


@dataclass(frozen=True, slots=True)
class Target:
    """`instrumented`: packages whose coverage leads the search.  `needs`: modules that may be missing.

    `has_sanitizers`: it runs C code that is to be built with AddressSanitizer and UndefinedBehaviorSanitizer.
    """

    name: str
    about: str
    instrumented: tuple[str, ...] = ("udptun",)
    needs: tuple[str, ...] = ()
    has_sanitizers: bool = False

    def load(self) -> ModuleType:
        return importlib.import_module(f"tests.fuzz.targets.{self.name}")

    @property
    def corpus_file(self) -> Path:
        return CORPUS / f"{self.name}.jsonl"

    def corpus(self) -> list[bytes]:
        """The inputs that are kept: few small ones that reach all that was reached so far."""
        if not self.corpus_file.exists():
            return []
        return [json.loads(line).encode("latin-1") for line in self.corpus_file.read_text().splitlines()]

    def keep(self, inputs: Sequence[bytes]) -> None:
        """Replace the corpus: an input a line, its bytes as the characters of a JSON text."""
        CORPUS.mkdir(exist_ok=True)
        self.corpus_file.write_text("".join(f"{json.dumps(data.decode('latin-1'))}\n" for data in inputs))


TARGETS = {
    target.name: target
    for target in (
        Target("config", "net-conf.json"),
        Target("lease", "keys and values of leases, and the table that they make"),
        Target("files", "subnet.env, the leases file, the saved table"),
        Target("etcd", "what etcd answers", needs=("grpc", "google.protobuf")),
        Target("kube", "nodes and events of the API server", needs=("msgspec",)),
        Target("http", "the API server's answers, byte by byte", ("udptun", "h11"), ("h11", "lightkube", "msgspec")),
        Target("hello", "messages between control plane and datapath processes, both ways"),
        Target("rings", "shared memory that somebody has overwritten", ("udptun", "tests.reference"), (), True),
        Target("cni", "what a runtime and earlier plugins leave to the CNI plugin"),
        Target("flags", "command line, environment, and what they quote"),
        Target("control", "requests to the daemon's HTTP server"),
    )
}
