"""What still works for a coder and models whose MLPs cannot be looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from crosslens.coder import Coder
from crosslens.errors import CrosslensError, UsageError
from crosslens.interactions.attention.view import attention_sites, heads_view
from crosslens.interactions.neurons.effective import effective
from crosslens.interactions.study.sites import Sites
from crosslens.lm import LanguageModel


@contextmanager
def offering(
    coder: Coder, models: Mapping[str, LanguageModel], sites: Sites | None = None
) -> Iterator[None]:
    """Adds to a refusal what can be asked for in its place, if there is anything.

    Args:
        sites: some of which the MLPs were looked at.

    Raises:
        UsageError: the refusal.
    """
    try:
        yield
    except UsageError as refusal:
        offers = [_other_sites(coder, models, sites or {}), _attention(coder, models)]
        raise UsageError(" ".join(filter(None, [str(refusal), *offers]))) from refusal


def _other_sites(coder: Coder, models: Mapping[str, LanguageModel], sites: Sites) -> str:
    known = [
        site
        for name, each in sites.items()
        for site in each
        if _works(partial(effective, coder, models[name], site))
    ]
    return f"Others can be looked at: --sites {','.join(known)}." if known else ""


def _attention(coder: Coder, models: Mapping[str, LanguageModel]) -> str:
    def views() -> None:
        for model in models.values():
            for site in attention_sites(coder, model):
                heads_view(coder, model, site)

    if not _works(views):
        return ""
    return "Attention still can: --parts attention. (A screen of pairs needs the MLP as well.)"


def _works(look: Callable[[], object]) -> bool:
    try:
        look()
    except CrosslensError:
        return False
    return True
