"""Look at a coder's latents: gather what is known of them, write a report, show one."""

from crosslens.explore.build import Built, build, rewrite, store_folder
from crosslens.explore.examples import ExamplePlan
from crosslens.explore.gather import gather
from crosslens.explore.report import write_report
from crosslens.explore.store import Example, LatentStore, Manifest

__all__ = [
    "Built",
    "Example",
    "ExamplePlan",
    "LatentStore",
    "Manifest",
    "build",
    "gather",
    "rewrite",
    "store_folder",
    "write_report",
]
