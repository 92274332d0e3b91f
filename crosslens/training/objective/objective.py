"""What is minimised: a weighted sum of terms, summed in one place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import Tensor

from crosslens.coder import Activation, Gated, Pass, Wiring, WiringConfig
from crosslens.errors import UsageError
from crosslens.training.objective.delta import Delta
from crosslens.training.objective.interaction import Beside, Interaction
from crosslens.training.objective.reconstruction import AuxK, Matryoshka, MultiTopK, Recon
from crosslens.training.objective.sparsity import NormL1, PAnneal, QuadraticTanh, Tanh
from crosslens.training.objective.term import Term, weight_at
from crosslens.training.objective.threshold import L0, GatedAux, GatedL1, PreAct


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The terms; a weight of 0 switches one off."""

    recon: Recon = Recon()
    matryoshka: Matryoshka = Matryoshka(weight=0.0)
    l1: NormL1 = NormL1()
    tanh: Tanh = Tanh()
    pre_act: PreAct = PreAct()
    quadratic_tanh: QuadraticTanh = QuadraticTanh()
    p_anneal: PAnneal = PAnneal()
    l0: L0 = L0()
    aux: AuxK = AuxK()
    multi_topk: MultiTopK = MultiTopK(weight=0.0)
    gated_l1: GatedL1 = GatedL1()
    gated_aux: GatedAux = GatedAux()
    delta: Delta = Delta()
    interaction: Interaction = Interaction()

    def __call__(
        self, step: Pass, beside: Beside | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and each term's unweighted value: what is logged is what is trained.

        Args:
            beside: what `interaction` needs of the models; no other term does.
        """
        loss = step.recon_BY.new_zeros(())
        parts = {}
        for name, term in self.active():
            value = term(step, beside) if isinstance(term, Interaction) else term(step)
            loss = loss + weight_at(term, step.progress) * value
            parts[name] = value.detach()
        return loss, parts

    def active(self) -> Iterator[tuple[str, Term]]:
        """The terms that are switched on, with their fields' names."""
        for field in fields(self):
            term: Term = getattr(self, field.name)
            if term.weight > 0:
                yield field.name, term

    @property
    def needs_all_latents(self) -> bool:
        """Whether a term has a gradient to pre-activations of latents that are far from firing."""
        return self.pre_act.weight > 0

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        """Refuse, with a UsageError that names the field, a coder that cannot be trained so."""
        on = dict(self.active())
        if not {"recon", "matryoshka"} & set(on):
            raise UsageError(
                "Nothing asks for a reconstruction: objective.recon.weight and "
                "objective.matryoshka.weight are both 0."
            )
        if isinstance(activation, Gated) and not {"gated_l1", "gated_aux"} <= set(on):
            raise UsageError(
                "A Gated activation's gate learns only from objective.gated_l1 and "
                "objective.gated_aux: give both a weight."
            )
        for term in on.values():
            term.check(activation, wiring)

    def check_wiring(self, wiring: Wiring) -> None:
        """The same once the sites are known."""
        for _, term in self.active():
            term.check_wiring(wiring)
