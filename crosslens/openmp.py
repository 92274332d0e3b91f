"""Have torch's idle threads give way to those of the kernels."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

SPINS = "GOMP_SPINCOUNT"
"""How often a thread of GNU's OpenMP looks for work before it sleeps; by itself some milliseconds
long, during which a processor is not the kernels'."""
SAID = (SPINS, "OMP_WAIT_POLICY")
"""Environment variables by which a user says how threads wait."""
FEW = "10000"
"""Long enough for torch's next operation, if it follows at once."""


def give_way(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Set it for this process, unless the user has said how threads wait, or torch is loaded and
    has read it already.

    Returns:
        whether it was set.
    """
    if "torch" in sys.modules or any(name in environ for name in SAID):
        return False
    environ[SPINS] = FEW
    return True
