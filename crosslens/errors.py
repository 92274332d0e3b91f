"""The errors a user can meet. Each says what, the value found, the likely cause, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CrosslensError(Exception):
    """Something the user can mend; printed as one sentence, without a traceback."""

    exit_code = 1


class UsageError(CrosslensError):
    """The command or its configuration is wrong."""

    exit_code = 2


class Diverged(CrosslensError):
    """Training produced a number that is not finite."""

    exit_code = 3


class Interrupted(CrosslensError):
    """Stopped on request with everything saved; `crosslens resume` goes on."""

    exit_code = 75


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """' Did you mean a, b?' when names near `wrong` exist, else an empty string."""
    near = difflib.get_close_matches(wrong, list(known), n=4, cutoff=0.5)
    return f" Did you mean {', '.join(near)}?" if near else ""
