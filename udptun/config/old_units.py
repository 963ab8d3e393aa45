"""What units and start scripts of old give flanneld, of which flanneld, and so we, read nothing.  Pure.

Each line is a warning.  None of them quotes a value, which may be a password.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

_FLAG_WORD = re.compile(r"--?([A-Za-z][\w-]*)")


def ignored_words_warning(words: Sequence[str]) -> str:
    """About `words` of the command line, which begin at the first one that is no flag: Go's flag package stops there.

    systemd makes an empty word of "${FLANNEL_OPTIONS}" when the variable is empty, and the variable's name of one
    without its dollar.  The first word is no value of anything, so it can be quoted.
    """
    first, rest = words[0], [match[1] for word in words[1:] if (match := _FLAG_WORD.match(word))]
    if not first:
        why = "an empty word, as of an empty variable in quotes"
    elif first.lower() in ("true", "false"):
        why = f"a boolean takes its value after =, as in --ip-masq={first.lower()}"
    elif first.isupper():
        why = "the name of a variable without its $"
    else:
        why = "flags end at the first word that is none"
    lost = f"; so ignored are --{', --'.join(rest)}" if rest else ""
    return f"{first!r} and what follows it are ignored, as flannel does ({why}){lost}"


def environment_warnings(environ: Mapping[str, str], argv: Sequence[str], said: Collection[str]) -> list[str]:
    """About variables of Red Hat's /etc/sysconfig/flanneld, which a start script made flags of.

    Such a script may have done so: then the flags are among `said`, the names of those that are given, and there is
    nothing to say.
    """
    warnings = []
    for name, text in sorted(environ.items()):
        flag = _ETCD_VARIABLES.get(name)
        if text and flag is not None and flag not in said:
            warnings.append(f"{name} is not read, as by flannel: give --{flag}, or FLANNELD_{_variable(flag)}")
    missing = [word for word in environ.get("FLANNEL_OPTIONS", "").split() if word not in argv]
    if missing:
        warnings.append("FLANNEL_OPTIONS is not read, as by flannel: put $FLANNEL_OPTIONS on the command line")
    return warnings


def _variable(flag: str) -> str:
    return flag.upper().replace("-", "_")


_ETCD_VARIABLES = {
    "FLANNEL_ETCD": "etcd-endpoints",
    "FLANNEL_ETCD_KEY": "etcd-prefix",
    **{
        f"FLANNEL_{_variable(flag)}": flag
        for flag in ("etcd-endpoints", "etcd-prefix", "etcd-keyfile", "etcd-certfile", "etcd-cafile", "etcd-username")
    },
    "FLANNEL_ETCD_PASSWORD": "etcd-password",
}
"""The flag that each stood for."""
