r"""Regular expressions of Go's, one row for each thing that Python writes otherwise."""

from __future__ import annotations

import warnings

import pytest

from udptun.config.flags import parse_daemon_flags
from udptun.config.go_regex import compile_go
from udptun.core.errors import UsageError


@pytest.mark.parametrize(
    ("regex", "matched", "others"),
    [
        (r"^eth\d\z", ["eth0"], ["eth0x", "eth"]),
        (r"^\Qa.b*\E$", ["a.b*"], ["axb*"]),
        (r"\Q[", ["["], ["x"]),
        (r"\Q\\E$", ["\\"], ["x"]),
        (r"^(?i)ETH", ["eth0", "Eth0"], ["x"]),
        (r"x(?i)eth", ["xETH"], ["XETH"]),
        (r"^(?:x(?i)y|z)w$", ["xYw", "Zw"], ["xYW", "Xyw"]),
        (r"x(?i)a|b", ["xA", "B"], ["XA"]),
        (r"(?i)a(?-i)b", ["Ab"], ["AB"]),
        (r"(?i:a)b", ["Ab"], ["AB"]),
        (r"(?i-s:a.)b", ["A.b"], ["A\nb"]),
        (r"(?s).\z", ["\n"], [""]),
        (r"(?U)a+", ["aa"], ["b"]),
        (r"(?m)^b$", ["a\nb"], ["ab"]),
        (r"^(?<name>a)(?P<other>b)$", ["ab"], ["a"]),
        (r"^[[:alpha:]]+$", ["eth"], ["eth0", "ä"]),
        (r"^[^[:alpha:]]$", ["0", "ä"], ["a"]),
        (r"^[[:^digit:]x0]$", ["a", "0", "ä"], ["1"]),
        (r"^[]a]$", ["]", "a"], ["b"]),
        (r"^[^]a]$", ["b"], ["]", "a"]),
        (r"^[\]-]$", ["]", "-"], ["a"]),
        (r"^[[]$", ["["], ["a"]),
        (r"^\w\d\s$", ["a1 "], ["ä1 ", "a1\v", "a\u0661 "]),
        (r"^[\W]$", ["ä", "-"], ["a", "_"]),
        (r"^[^\D]$", ["1"], ["a"]),
        (r"^\x{65}\145\x65$", ["eee"], ["e"]),
        (r"^\0$", ["\0"], ["0"]),
        (r"^a{,2}$", ["a{,2}"], ["aa"]),
        (r"^a{2}b{1,}$", ["aab"], ["ab"]),
        (r"^{$", ["{"], [""]),
        (r"192\.168\.1\.\d+", ["192.168.1.7"], ["192.16811.7"]),
        ("ä|", ["ä", ""], []),
    ],
)
def test_a_regular_expression_means_what_it_means_to_go(regex: str, matched: list[str], others: list[str]) -> None:
    """Before, the flag was read by Python's rules: `\\z`, `\\Q..\\E` and `(?i)` inside were refused, and flanneld takes
    them; `\\Q`, a `(?i)` behind something and [[:^digit:]] were refused or misread later, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pattern = compile_go(regex)
        assert parse_daemon_flags([f"--iface-regex={regex}"], {}).iface_regex == (regex,)
    assert [text for text in (*matched, *others) if pattern.search(text)] == matched


@pytest.mark.parametrize(
    ("regex", "reason"),
    [
        ("(", r"missing \)"),
        (")", "unbalanced parenthesis"),
        ("(?i))", "unbalanced parenthesis"),
        ("[a", "unterminated character set"),
        ("*a", "nothing to repeat"),
        ("a\\", "bad escape"),
        (r"\pL", r"bad escape \\p"),
        (r"\1", "invalid group reference"),
        (r"\x{110000}", "is no character"),
        ("(?x)a", "unknown flag x"),
        ("[[:smile:]]", r"no character class \[:smile:\]"),
        ("a{99999999999}", "too large"),
        ("(" * 20000, "recursion|missing"),
    ],
)
def test_what_is_no_regular_expression_is_refused_with_the_flag(regex: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        compile_go(regex)
    with pytest.raises(UsageError, match=r"^--iface-regex=.*: must be a regular expression \(") as refused:
        parse_daemon_flags(["--iface-regex", regex], {})
    assert refused.value.exit_status == 2
