"""Objectives that cannot work are refused when the configuration is read, with the field's name."""

from __future__ import annotations

import pytest

from crosslens.coder import (
    AbsTopK,
    BatchTopK,
    Causal,
    Crosscoder,
    CrossLayer,
    Dedicated,
    DesignatedShared,
    Difference,
    Gated,
    JumpReLU,
    LayerConditioned,
    Layout,
    ReLU,
    TopK,
    Transcoder,
)
from crosslens.config import from_plain, to_plain
from crosslens.errors import UsageError
from crosslens.training import (
    L0,
    AuxK,
    CoderConfig,
    Delta,
    GatedAux,
    GatedL1,
    Matryoshka,
    MultiTopK,
    NormL1,
    Objective,
    PAnneal,
    PreAct,
    QuadraticTanh,
    Recon,
    Tanh,
    TrainConfig,
)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: NormL1(weight=-1.0), r"objective\.l1\.weight must not be negative"),
        (lambda: Recon(weight=float("nan")), r"objective\.recon\.weight"),
        (lambda: Tanh(ramp=1.5), r"objective\.tanh\.ramp"),
        (lambda: AuxK(ramp=3.0), r"objective\.aux\.ramp"),
        (lambda: AuxK(k=0), r"objective\.aux\.k"),
        (lambda: Tanh(c=0.0), r"objective\.tanh\.c must be positive"),
        (lambda: QuadraticTanh(scale=0.0), r"objective\.quadratic_tanh\.scale must be positive"),
        (lambda: NormL1(group_factors=(0.1, -1.0)), r"objective\.l1\.group_factors"),
        (lambda: Tanh(group_factors=(-0.1,)), r"objective\.tanh\.group_factors"),
        (lambda: Recon(site_weights={"a": -1.0}), r"objective\.recon\.site_weights"),
        (lambda: PAnneal(p_end=0.0), r"objective\.p_anneal\.p_end"),
        (lambda: PAnneal(start=1.0), r"objective\.p_anneal\.start"),
        (lambda: L0(target=0.0), r"objective\.l0\.target must be positive"),
        (lambda: L0(density_weight=-1.0), r"objective\.l0 needs density_weight"),
        (lambda: MultiTopK(factor=1), r"objective\.multi_topk\.factor"),
        (lambda: Matryoshka(fractions=(0.5, 0.6)), r"objective\.matryoshka\.fractions"),
        (lambda: Matryoshka(fractions=()), r"objective\.matryoshka\.fractions"),
        (lambda: Matryoshka(fractions=(1.5, -0.5)), r"objective\.matryoshka\.fractions"),
    ],
)
def test_nonsense_in_a_term_is_refused(make, match):
    with pytest.raises(UsageError, match=match):
        make()


BOTH = {"gated_l1": GatedL1(weight=1.0), "gated_aux": GatedAux(weight=1.0)}


@pytest.mark.parametrize(
    ("objective", "activation", "wiring", "match"),
    [
        ({"l0": L0(weight=1.0)}, ReLU(), Crosscoder(), r"objective\.l0 .*JumpReLU"),
        ({"pre_act": PreAct(weight=1.0)}, TopK(k=2), Crosscoder(), r"objective\.pre_act"),
        ({"multi_topk": MultiTopK()}, BatchTopK(k=2), Crosscoder(), r"objective\.multi_topk"),
        (BOTH, ReLU(), Crosscoder(), r"objective\.gated_l1 .*Gated"),
        ({"gated_aux": GatedAux(weight=1.0)}, ReLU(), Crosscoder(), r"objective\.gated_aux"),
        ({}, Gated(), Crosscoder(), r"objective\.gated_l1 and objective\.gated_aux"),
        ({"gated_l1": GatedL1(weight=1.0)}, Gated(), Crosscoder(), "give both a weight"),
        ({"l1": NormL1(weight=1.0)}, AbsTopK(k=2), Crosscoder(), r"objective\.l1 .*negative"),
        ({"tanh": Tanh(weight=1.0)}, TopK(k=2, signed=True), Crosscoder(), r"objective\.tanh"),
        ({"quadratic_tanh": QuadraticTanh(weight=1.0)}, AbsTopK(k=2), Crosscoder(),
         r"objective\.quadratic_tanh"),
        ({"l1": NormL1(weight=1.0, group_factors=(0.1, 1.0))}, ReLU(), Crosscoder(),
         r"objective\.l1\.group_factors has 2 .* 1 group of"),
        ({"tanh": Tanh(weight=1.0, group_factors=(0.1, 1.0))}, ReLU(), Dedicated(),
         r"objective\.tanh\.group_factors has 2 .* 3 groups"),
        ({"delta": Delta(weight=1.0)}, ReLU(), Transcoder(), r"objective\.delta"),
        ({"delta": Delta(weight=1.0)}, ReLU(), Difference(), r"objective\.delta"),
        ({"recon": Recon(site_weights={"a": 2.0})}, ReLU(), LayerConditioned(),
         r"objective\.recon\.site_weights"),
        ({"recon": Recon(weight=0.0)}, ReLU(), Crosscoder(), "Nothing asks for a reconstruction"),
    ],
)  # fmt: skip
def test_terms_that_do_not_fit_are_refused_by_the_configuration(
    objective, activation, wiring, match
):
    with pytest.raises(UsageError, match=match):
        TrainConfig(
            coder=CoderConfig(latents=16, activation=activation),
            wiring=wiring,
            objective=Objective(**objective),
        )


@pytest.mark.parametrize(
    ("objective", "activation", "wiring"),
    [
        (BOTH, Gated(), Crosscoder()),
        ({"l0": L0(weight=1.0), "pre_act": PreAct(weight=1.0)}, JumpReLU.anthropic(), Causal()),
        ({"l1": NormL1(weight=1.0, group_factors=(0.1, 1.0))}, ReLU(), DesignatedShared()),
        ({"l1": NormL1(weight=1.0, group_factors=(0.1, 1.0))}, ReLU(), CrossLayer()),
        ({"l1": NormL1(weight=0.0)}, AbsTopK(k=2), Crosscoder()),
        ({"recon": Recon(weight=0.0), "matryoshka": Matryoshka()}, BatchTopK(k=2), Crosscoder()),
    ],
)
def test_terms_that_fit_are_let_through_and_survive_json(objective, activation, wiring):
    config = TrainConfig(
        coder=CoderConfig(latents=16, activation=activation),
        wiring=wiring,
        objective=Objective(**objective),
    )
    assert from_plain(TrainConfig, to_plain(config), "test") == config


def test_what_needs_the_sites_is_refused_once_they_are_known():
    layout = Layout(("resid_post.1", "resid_post.2"), (4, 4))
    wiring = Crosscoder()(layout, 8)
    for objective, match in [
        (Objective(recon=Recon(site_weights={"resid_post.3": 2.0})), "'resid_post.3'.*Did you"),
        (Objective(recon=Recon(site_weights={"*": 0.0})), "0 for every site"),
        (Objective(delta=Delta(weight=1.0)), r"objective\.delta needs two models"),
        (Objective(l1=NormL1(weight=1.0, group_factors=(1.0, 1.0))), r"objective\.l1"),
    ]:
        with pytest.raises(UsageError, match=match):
            objective.check_wiring(wiring)
    Objective(recon=Recon(site_weights={"*.1": 2.0})).check_wiring(wiring)
    causal = Causal()(layout, 8)
    Objective(l1=NormL1(weight=1.0, group_factors=(1.0, 1.0))).check_wiring(causal)
    unequal = Layout(("a/resid_post.1", "b/resid_post.1"), (4, 5))
    with pytest.raises(UsageError, match="widths"):
        Objective(delta=Delta(weight=1.0)).check_wiring(Crosscoder()(unequal, 8))


def test_a_configuration_file_gives_site_weights_and_spans():
    plain = {"recon": {"site_weights": {"*.1": 2}}, "tanh": {"weight": 1, "ramp": "50 steps"}}
    found = from_plain(Objective, plain, "test")
    assert found.recon == Recon(site_weights={"*.1": 2.0})
    assert found.tanh == Tanh(weight=1.0, ramp="50 steps")
    with pytest.raises(UsageError, match=r"tanh.*no_such"):
        from_plain(Objective, {"tanh": {"no_such": 1}}, "test")
