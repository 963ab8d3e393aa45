"""What is remembered of texts, and how much."""

from __future__ import annotations

import json
import sys

import pytest

from udptun.core.lease import LeaseAttrs, LeaseFormatError, Subnets
from udptun.core.text_cache import TextCache


def test_a_text_is_read_once_and_what_came_of_it_is_the_same_object() -> None:
    made: list[str] = []

    def make(text: str) -> list[str]:
        made.append(text)
        return [text]

    cache = TextCache[list[str]](100_000)
    first = cache.get("a", make)
    assert cache.get("a", make) is first
    assert cache.get("b", make) == ["b"]
    assert made == ["a", "b"]


def test_what_make_raises_is_let_through_and_not_remembered() -> None:
    cache = TextCache[int](100_000)
    for _ in range(2):
        with pytest.raises(ValueError, match="invalid literal"):
            cache.get("x", int)
    assert len(cache) == 0


@pytest.mark.parametrize("length", [1, 100, 900, 5_000, 1_000_000])
def test_texts_are_remembered_within_a_bound_of_bytes_whatever_their_length(length: int) -> None:
    """65,536 texts were remembered, of any length: leases of a megabyte each took all memory."""
    cache = TextCache[str](100_000)
    texts = [f"{number:07}{'x' * length}" for number in range(min(3_000, 1_000_000 // length + 5))]
    for text in texts:
        assert cache.get(text, str.upper) == text.upper()
        assert len(cache) * sys.getsizeof(text) <= 100_000
    is_remembered = sys.getsizeof(texts[0]) <= 1_000
    assert (len(cache) > 0) == is_remembered


def test_a_text_that_is_asked_for_again_and_again_stays() -> None:
    cache, kept = TextCache[object](100_000), "kept"
    first = cache.get(kept, lambda _: object())
    for number in range(10_000):
        cache.get(f"other {number}", lambda _: object())
        assert cache.get(kept, lambda _: object()) is first


def test_leases_of_ten_thousand_hosts_are_remembered_and_a_huge_one_is_not() -> None:
    values = [
        LeaseAttrs.from_json(json.dumps({"PublicIP": "192.0.2.1", "BackendType": "udp", "BackendData": number}))
        for number in range(10_000)
    ]
    again = [
        LeaseAttrs.from_json(json.dumps({"PublicIP": "192.0.2.1", "BackendType": "udp", "BackendData": number}))
        for number in range(10_000)
    ]
    assert all(one is other for one, other in zip(values, again, strict=True))
    keys = [f"10.{number >> 8}.{number & 255}.0-24" for number in range(10_000)]
    assert all(a is b for a, b in zip(map(Subnets.from_key, keys), map(Subnets.from_key, keys), strict=True))
    huge = json.dumps({"PublicIP": "192.0.2.1", "BackendData": "x" * 1_000_000})
    assert LeaseAttrs.from_json(huge) == LeaseAttrs.from_json(huge)
    assert LeaseAttrs.from_json(huge) is not LeaseAttrs.from_json(huge)
    with pytest.raises(LeaseFormatError):
        LeaseAttrs.from_json("junk")
