"""How features interact through a model's nonlinearities."""

from crosslens.interactions.study.measure import Interactions, interact
from crosslens.interactions.study.plan import PARTS, InteractPlan, Part, parse_parts
from crosslens.interactions.study.run import interact_run
from crosslens.interactions.study.tables import plain, save, tables

__all__ = [
    "PARTS",
    "InteractPlan",
    "Interactions",
    "Part",
    "interact",
    "interact_run",
    "parse_parts",
    "plain",
    "save",
    "tables",
]
