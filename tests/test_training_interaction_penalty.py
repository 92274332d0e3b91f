"""The interaction penalty as a term: what it reads of a model, what it moves, how it resumes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crosslens.coder import (
    AbsTopK,
    BatchTopK,
    Coder,
    Crosscoder,
    Difference,
    LayerConditioned,
    Layout,
    ReLU,
    Rows,
    TopK,
    Transcoder,
    train_pass,
)
from crosslens.config import from_plain, to_plain
from crosslens.errors import Interrupted, UsageError
from crosslens.functional.interaction_penalty import Neurons
from crosslens.interactions.neurons.effective import effective
from crosslens.training import (
    CoderConfig,
    FitConfig,
    Interaction,
    NormL1,
    Objective,
    TrainConfig,
    create_run,
    open_models,
    open_run,
    train,
)
from crosslens.training.fit import fit
from crosslens.training.objective import Beside
from crosslens.training.probe import step_seconds
from crosslens.training.readers import Reader, read_sites, readers_of
from crosslens.training.row_steps import Gathered
from tests.interaction_sites import coder_at, model_of, source_at
from tests.objective_pass import LOG, WIDE, a_coder, a_pass
from tests.sparse_runs import SILENT
from tests.test_training import Table, interrupting_once, run_config, state_of, tiny_coder

ALL = {"share": 1.0, "neurons": 1.0, "weight": 1.0}


def beside(readers, seed=0) -> Beside:
    return Beside(tuple(readers), torch.Generator().manual_seed(seed))


def a_reader(site="resid_post.1", width=6, *, gated=True, n_blocks=1) -> Reader:
    """Random neurons, five of them, without a norm."""
    generator = torch.Generator().manual_seed(3)
    columns = 5 * (1 + gated)
    through = torch.randn(width, columns, generator=generator).double()
    fixed = torch.randn(columns, generator=generator).double()
    norms = torch.rand(5, generator=generator).double()
    parts = [(through[:, :5], fixed[:5])] + [(through[:, 5:], fixed[5:])] * gated
    blocks = tuple(
        Neurons(
            kind="silu",
            through_DW=torch.cat([E[:, i::n_blocks] for E, _ in parts], -1),
            fixed_W=torch.cat([c[i::n_blocks] for _, c in parts]),
            out_norm_N=norms[i::n_blocks],
        )
        for i in range(n_blocks)
    )
    return Reader(site=site, norm=None, blocks=blocks)


PENALTY = {"W_enc.0", "b_enc", "W_dec.0"}


@pytest.mark.parametrize("form", ["exact", "paper"])
@pytest.mark.parametrize(
    ("activation", "case", "site", "moves"),
    [
        (BatchTopK(k=3), "crosscoder", "resid_post.1", PENALTY),
        (ReLU(), "crosscoder", "resid_post.1", PENALTY),
        (WIDE, "crosscoder", "resid_post.1", PENALTY | {"threshold"}),
        (LOG, "crosscoder", "resid_post.1", PENALTY | {"log_threshold"}),
        # Only the first group of a causal coder writes the first site.
        (TopK(k=3), "causal", "resid_post.1", {"W_enc.0", "b_enc", "W_dec.0"}),
        (TopK(k=6), "causal", "resid_post.2",
         {"W_enc.0", "W_enc.1", "b_enc", "W_dec.0", "W_dec.1"}),
        (ReLU(), "dedicated", "b/resid_post.1",
         {"W_enc.1", "W_enc.2", "b_enc", "W_dec.1", "W_dec.2"}),
        (ReLU(), "shared", "b/resid_post.1",
         {"W_enc.0", "W_enc.1", "b_enc", "W_dec.0", "W_dec.1"}),
    ],
)  # fmt: skip
def test_it_moves_exactly_these_parameters(activation, case, site, moves, form):
    coder = a_coder(activation, case)
    write = coder.wiring.write
    reader = a_reader(site, write.widths[write.index(site)])
    if case == "dedicated":
        writing = [i for i, g in enumerate(coder.wiring.groups) if site in g.writes]
        moves = {f"W_{x}.{i}" for x in ("enc", "dec") for i in writing} | {"b_enc"}
    moves = moves | ({"b_dec"} if form == "exact" else set())
    Interaction(form=form, **ALL)(a_pass(coder), beside([reader])).backward()
    assert {n for n, p in coder.named_parameters() if p.grad is not None and p.grad.any()} == moves


@pytest.mark.parametrize("form", ["exact", "paper"])
@pytest.mark.parametrize("case", ["crosscoder", "causal", "shared", "two models"])
def test_gradients(case, form):
    coder = a_coder(ReLU(), case)
    write = coder.wiring.write
    reader = a_reader(write.sites[-1], write.widths[-1])
    term = Interaction(form=form, **ALL)
    moved = [*coder.W_enc, *coder.W_dec, coder.b_enc]
    moved += [coder.b_dec] * (form == "exact")  # the paper's form does not count biases
    assert torch.autograd.gradcheck(lambda *_: term(a_pass(coder), beside([reader])), moved)


def gradients(coder: Coder, term: Interaction, readers, below: float) -> dict[str, torch.Tensor]:
    """Of every parameter, wherever they were left."""
    x = torch.randn(40, coder.wiring.read.width, generator=torch.Generator().manual_seed(1))
    coder.zero_grad()
    coder.sparse_below = below
    shown = train_pass(coder, Rows(x, x))
    assert (shown.known is not None) == (below > 0)
    Objective(interaction=term)(shown, beside(readers))[0].backward()
    found = {name: p.grad for name, p in coder.named_parameters() if p.grad is not None}
    if shown.gradients is not None:
        gathered = Gathered(shown.gradients.by_latent())
        for name, p in coder.named_parameters():
            assert not (p in gathered.gradients and name in found), "a row step is kept"
            if p in gathered.gradients:
                found[name] = gathered.summed(p)
    return found


@pytest.mark.parametrize("form", ["exact", "paper"])
@pytest.mark.parametrize("case", ["crosscoder", "causal", "shared", "dedicated"])
@pytest.mark.parametrize("activation", [TopK(k=4), BatchTopK(k=4)], ids=["topk", "batchtopk"])
def test_sparse_passes_have_the_gradients_of_whole_ones(activation, case, form):
    coder = a_coder(activation, case)
    write = coder.wiring.write
    readers = [a_reader(site, write.widths[write.index(site)]) for site in write.sites]
    term = Interaction(form=form, weight=3.0, ramp=0.0, share=0.5, neurons=1.0)
    want, got = (gradients(coder, term, readers, below) for below in (0.0, 1.1))
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-9, msg=name)


def drawn_by(seed: int) -> tuple[int, int]:
    """The row and the block that a step with this seed looks at."""
    generator = torch.Generator().manual_seed(seed)
    row = int(torch.randperm(7, generator=generator)[0])
    return row, int(torch.randint(2, (), generator=generator))


@pytest.mark.parametrize("form", ["exact", "paper"])
@torch.no_grad()
def test_what_a_step_looks_at_is_an_unbiased_sample(form):
    """One row of seven and one block of neurons of two: the mean of all fourteen is the whole."""
    shown, reader = a_pass(a_coder(BatchTopK(k=5))), a_reader(n_blocks=2)
    term = Interaction(form=form, weight=1.0, share=1 / 7, neurons=0.5)
    known = {drawn_by(seed): float(term(shown, beside([reader], seed))) for seed in range(200)}
    assert len(known) == 14
    assert len(set(known.values())) > 10
    whole = [
        float(Interaction(form=form, **ALL)(shown, beside([replace(reader, blocks=(block,))])))
        for block in reader.blocks
    ]
    assert sum(known.values()) / 14 == pytest.approx(sum(whole) / 2, rel=1e-9)


@pytest.mark.parametrize("name", ["relu", "relu2", "llama", "gpt2"])
@pytest.mark.parametrize("site", ["mlp_in.1", "resid_mid.1", "resid_post.0"])
@torch.no_grad()
def test_it_reads_the_model_s_own_mlp(name, site):
    """Against the latents seen from the neurons as `crosslens.interactions` has them, by loops."""
    model = model_of(name)
    source = source_at(model, "resid_mid.0", site)
    coder = coder_at(source.layout)
    known = effective(coder, model, site)
    x_BX = torch.cat([chunk.rows() for chunk in source]).float()
    shown = train_pass(coder.train(), Rows(x_BX, x_BX))
    readers = readers_of({model.name: model}, coder.wiring, (site,))
    found = float(Interaction(**ALL, sites=(site,))(shown, beside(readers)))

    rows_BD = x_BX[:, source.layout.slice(site)]
    shares, power = [], 2 if name == "relu2" else 1

    def phi_of(value):
        return torch.relu(value) ** power

    for z_L, row_D in zip(shown.code, rows_BD, strict=True):
        r = 1.0 if known.norm is None else float(known.norm.scalar(row_D))
        branches = [known.value] + [known.gate] * (known.gate is not None)
        parts = [
            torch.cat([r * z_L[:, None] * b.E_LN, (r * b.moving_N + b.fixed_N)[None]])
            for b in branches
        ]
        u_KN, g_KN = parts[0], parts[-1]
        gated = len(parts) == 2
        each_KN = phi_of(g_KN) * (u_KN if gated else 1)
        whole_N = phi_of(g_KN.sum(0)) * (u_KN.sum(0) if gated else 1)
        constant_N = each_KN[-1]
        apart_N, together_N = each_KN.sum(0) - constant_N, whole_N - constant_N
        made_N, most_N = (apart_N - together_N).abs(), apart_N.abs() + together_N.abs()
        shares.append(float(made_N @ known.out_norm_N / (most_N @ known.out_norm_N)))
    assert found == pytest.approx(sum(shares) / len(shares), rel=1e-4)
    assert found > 0.001


def test_the_sites_it_looks_at():
    model = model_of("llama")
    wiring = Crosscoder()(Layout(("resid_mid.1", f"resid_post.{model.n_layers - 1}"), (8, 8)), 4)
    models = {model.name: model}
    assert [r.site for r in readers_of(models, wiring, ())] == ["resid_mid.1"]
    with pytest.raises(UsageError, match=r"no MLP reads resid_post\."):
        readers_of(models, wiring, ("resid_post.*",))
    assert len(readers_of(models, wiring, (), 4)[0].blocks) == 4
    wide = Crosscoder()(Layout(("mlp_in.1", "resid_mid.0", "mlp_out.1"), (8, 8, 8)), 4)
    assert read_sites(wide, ()) == ("mlp_in.1", "resid_mid.0")
    assert read_sites(wide, ("resid_*",)) == ("resid_mid.0",)


def penalised(folder, **changes) -> TrainConfig:
    """A short run with the penalty on; its coder's entries only where `sparse_below` says so."""
    term = {"weight": 5.0, "ramp": 0.2, "share": 0.3, "neurons": 0.5}
    config = run_config(folder, **changes.pop("fit", {}))
    return replace(config, objective=Objective(interaction=Interaction(**term, **changes)))


@pytest.mark.parametrize("below", [0.0, 1.1], ids=["whole", "sparse"])
@pytest.mark.parametrize("form", ["exact", "paper"])
def test_interrupted_and_resumed_is_uninterrupted(tiny_model_folder, tmp_path, form, below):
    config = penalised(tiny_model_folder, form=form, fit={"sparse_below": below})
    models = open_models(config)
    whole, stopped = (create_run(tmp_path / name, config) for name in ("whole", "stopped"))
    train(whole, models)
    with pytest.raises(Interrupted):
        train(stopped, models, interrupting_once(at=16))
    train(open_run(stopped.folder), models)
    kept = [line for line in stopped.metrics() if line["step"] != 17]
    assert kept == whole.metrics()
    assert all("interaction" in line for line in kept if "loss" in line)


def test_it_lowers_what_it_looks_at_and_only_the_paper_s_form_by_smaller_norms():
    left = {}
    for form in ("exact", "paper"):
        coder, term, reader = a_coder(ReLU()), Interaction(form=form, **ALL), a_reader()
        optimizer = torch.optim.Adam(coder.W_dec, lr=0.02)
        before = float(coder.decoder_norms().detach().mean())
        values = []
        for _ in range(40):
            value = term(a_pass(coder), beside([reader]))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(float(value.detach()))
        left[form] = values[-1] / values[0], float(coder.decoder_norms().detach().mean()) / before
    assert left["exact"][0] < 0.7
    assert left["exact"][1] > 0.9
    assert left["paper"][0] < 0.7
    assert left["paper"][1] < 0.9


def test_a_loop_without_the_models_says_so():
    config = TrainConfig(
        objective=Objective(interaction=Interaction(weight=1.0)),
        fit=FitConfig(steps=2, batch=4, dtype="float32"),
        optimizer=replace(TrainConfig().optimizer, warmup=0),
    )
    coder = tiny_coder()
    with pytest.raises(UsageError, match="readers_of"):
        fit(config, state_of(config, coder), Table(lambda: torch.randn(4, 10)), SILENT)


def test_the_probe_goes_without(tiny_model_folder):
    config = penalised(tiny_model_folder)
    layout = Layout(("resid_mid.1", "resid_mid.2"), (32, 32))
    assert step_seconds(config, layout, 2) > 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weight": -1.0}, r"objective\.interaction\.weight"),
        ({"share": 0.0}, r"objective\.interaction\.share"),
        ({"neurons": 1.5}, r"objective\.interaction\.neurons"),
        ({"ramp": 2.0}, r"objective\.interaction\.ramp"),
    ],
)
def test_nonsense_is_refused(changes, match):
    with pytest.raises(UsageError, match=match):
        Interaction(**changes)


@pytest.mark.parametrize(
    ("activation", "wiring", "match"),
    [
        (TopK(k=2, signed=True), Crosscoder(), "negative"),
        (AbsTopK(k=2), Crosscoder(), "negative"),
        (ReLU(), Difference(), "Difference"),
        (ReLU(), LayerConditioned(), "LayerConditioned"),
    ],
)
def test_coders_that_do_not_fit_are_refused(activation, wiring, match):
    with pytest.raises(UsageError, match=match):
        TrainConfig(
            coder=CoderConfig(latents=16, activation=activation),
            wiring=wiring,
            objective=Objective(interaction=Interaction(weight=1.0)),
        )


def test_sites_that_do_not_fit_are_refused():
    term = Objective(interaction=Interaction(weight=1.0))
    transcoder = Transcoder()(Layout(("mlp_in.1", "mlp_out.1"), (4, 4)), 8)
    with pytest.raises(UsageError, match=r"writes what an MLP reads.*mlp_out\.1"):
        term.check_wiring(transcoder)
    two = Crosscoder()(Layout(("a/resid_mid.1", "b/resid_mid.1"), (4, 4)), 8)
    with pytest.raises(UsageError, match=r"several models.*a/resid_mid\.1, b/resid_mid\.1"):
        term.check_wiring(two)
    Objective(interaction=Interaction(weight=1.0, sites=("b/*",))).check_wiring(two)
    wrong = Objective(interaction=Interaction(weight=1.0, sites=("b/resid_mid.2",)))
    with pytest.raises(UsageError, match=r"names 'b/resid_mid\.2'.*Did you mean b/resid_mid\.1"):
        wrong.check_wiring(two)


def test_it_survives_a_file_and_a_run_refuses_at_once(tiny_model_folder, tmp_path):
    plain = {"interaction": {"weight": 2, "form": "paper", "ramp": "50 steps", "sites": ["*.1"]}}
    found = from_plain(Objective, plain, "test")
    want = Interaction(weight=2.0, form="paper", ramp="50 steps", sites=("*.1",))
    assert found.interaction == want
    config = penalised(tiny_model_folder, sites=("resid_mid.9",))
    assert from_plain(TrainConfig, to_plain(config), "test") == config
    with pytest.raises(UsageError, match=r"resid_mid\.9"):
        train(create_run(tmp_path / "run", config), open_models(config))


def test_other_terms_need_nothing_beside():
    shown = a_pass(a_coder(ReLU()))
    _, parts = Objective(l1=NormL1(weight=1.0, ramp=0.0))(shown)
    assert "l1" in parts
