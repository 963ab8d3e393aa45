"""How a CNI plugin fails: one JSON object on stdout, with a code that runtimes understand."""

from __future__ import annotations

INCOMPATIBLE_VERSION = 1
UNKNOWN_CONTAINER = 3
BAD_ENVIRONMENT = 4
IO_FAILURE = 5
BAD_JSON = 6
BAD_CONFIG = 7
TRY_AGAIN_LATER = 11
NOT_AVAILABLE = 50
"""STATUS only: no ADD can succeed now."""
BAD_SUBNET_FILE = 100
"""From here on the numbers are the plugin's own."""
FOREIGN_BRIDGE = 101
DELEGATE_MISSING = 102
INTERNAL = 999
"""The delegate failed and gave no code of its own, or we have a fault; flannel's plugin answers 999 for every
failure."""


class CniError(Exception):
    """A failure as the runtime sees it.  `message` says what is wrong, `details` what to do about it."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details

    def document(self, cni_version: str) -> dict[str, object]:
        """The object to print.  `details` is left out when it is empty, as Go's library does."""
        found: dict[str, object] = {"cniVersion": cni_version, "code": self.code, "msg": self.message}
        return found | ({"details": self.details} if self.details else {})
