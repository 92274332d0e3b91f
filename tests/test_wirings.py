"""Every wiring against loops over its published definition, causality, and rows in and out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch

from crosslens.coder import (
    BatchTopK,
    Causal,
    Coder,
    Crosscoder,
    CrossLayer,
    Dedicated,
    DesignatedShared,
    Difference,
    JumpReLU,
    LayerConditioned,
    Layout,
    ReLU,
    Transcoder,
    Wiring,
    all_rows,
    fold,
    load,
    save,
    train_pass,
    training_rows,
    unfold,
)
from crosslens.errors import UsageError
from crosslens.training import AuxK, Objective


@dataclass(frozen=True)
class Case:
    """A wiring on a layout, and by hand: how many latents read and write which sites."""

    config: object
    sites: dict[str, int]
    table: tuple[tuple[int, str, str], ...]
    tied: int | None = None
    """The number of the group whose decoder the two models have in common."""

    @property
    def layout(self) -> Layout:
        return Layout(tuple(self.sites), tuple(self.sites.values()))

    @property
    def wiring(self) -> Wiring:
        return self.config(self.layout, sum(n for n, _, _ in self.table))


MLPS = {"mlp_in.1": 3, "mlp_out.1": 2, "mlp_in.4": 4, "mlp_out.4": 3}
PAIRS = {"a/resid_mid.1": 3, "a/resid_post.2": 2, "b/resid_mid.1": 3, "b/resid_post.2": 2}
UNLIKE = {"a/resid_mid.1": 3, "a/resid_post.2": 2, "b/resid_mid.1": 4, "b/resid_post.2": 5}
ALL_PAIRS = " ".join(PAIRS)
FIRST, SECOND = "a/resid_mid.1 a/resid_post.2", "b/resid_mid.1 b/resid_post.2"
MADE = "b-a/resid_mid.1 b-a/resid_post.2"

CASES = {
    "sae": Case(Crosscoder(), {"resid_post.2": 4}, ((5, "resid_post.2", "resid_post.2"),)),
    "over layers": Case(
        Crosscoder(), {"embed": 3, "final": 2}, ((6, "embed final", "embed final"),)
    ),
    "over both": Case(Crosscoder(), UNLIKE, ((6, ALL_PAIRS, ALL_PAIRS),)),
    "transcoder": Case(
        Transcoder(), {"mlp_in.1": 3, "mlp_out.1": 2}, ((5, "mlp_in.1", "mlp_out.1"),)
    ),
    "skip transcoder": Case(
        Transcoder(skip=True), {"mlp_in.1": 3, "mlp_out.1": 2}, ((5, "mlp_in.1", "mlp_out.1"),)
    ),
    "transcoder from the stream": Case(
        Transcoder(), {"resid_mid.1": 3, "mlp_out.1": 2}, ((5, "resid_mid.1", "mlp_out.1"),)
    ),
    "clt": Case(
        CrossLayer(), MLPS, ((4, "mlp_in.1", "mlp_out.1 mlp_out.4"), (4, "mlp_in.4", "mlp_out.4"))
    ),
    "skip clt": Case(
        CrossLayer(skip=True),
        MLPS,
        ((4, "mlp_in.1", "mlp_out.1 mlp_out.4"), (4, "mlp_in.4", "mlp_out.4")),
    ),
    "per layer": Case(
        CrossLayer(writes="same", skip=True),
        MLPS,
        ((4, "mlp_in.1", "mlp_out.1"), (4, "mlp_in.4", "mlp_out.4")),
    ),
    "clt of two models": Case(
        CrossLayer(),
        {"a/mlp_in.1": 2, "a/mlp_out.1": 2, "b/mlp_in.1": 3, "b/mlp_out.1": 1},
        ((5, "a/mlp_in.1 b/mlp_in.1", "a/mlp_out.1 b/mlp_out.1"),),
    ),
    "weakly causal": Case(
        Causal(),
        {"resid_mid.0": 3, "mlp_out.0": 2, "resid_post.3": 4},
        (
            (3, "resid_mid.0", "resid_mid.0 mlp_out.0 resid_post.3"),
            (3, "mlp_out.0", "mlp_out.0 resid_post.3"),
            (3, "resid_post.3", "resid_post.3"),
        ),
    ),
    "weakly causal from end to end": Case(
        Causal(),
        {"embed": 2, "resid_pre.0": 2, "final": 3},
        (
            (2, "embed", "embed resid_pre.0 final"),
            (2, "resid_pre.0", "resid_pre.0 final"),
            (2, "final", "final"),
        ),
    ),
    "strictly causal": Case(
        Causal(strict=True),
        {"resid_mid.1": 3, "mlp_out.1": 2, "resid_post.1": 2, "mlp_out.2": 4},
        ((4, "resid_mid.1", "mlp_out.1 mlp_out.2"), (4, "resid_post.1", "mlp_out.2")),
    ),
    "dedicated": Case(
        Dedicated(exclusive=0.2),
        UNLIKE,
        ((2, FIRST, FIRST), (2, SECOND, SECOND), (6, ALL_PAIRS, ALL_PAIRS)),
    ),
    "designated shared": Case(
        DesignatedShared(shared=0.3),
        PAIRS,
        ((3, ALL_PAIRS, ALL_PAIRS), (7, ALL_PAIRS, ALL_PAIRS)),
        tied=0,
    ),
    "dedicated, shared ones tied": Case(
        Dedicated(exclusive=0.2, tied_decoders=True),
        PAIRS,
        ((2, FIRST, FIRST), (2, SECOND, SECOND), (6, ALL_PAIRS, ALL_PAIRS)),
        tied=2,
    ),
    "difference": Case(Difference(), PAIRS, ((6, MADE, MADE),)),
    "sinusoidal": Case(
        LayerConditioned(), {f"resid_post.{i}": 5 for i in range(3)}, ((6, "any", "any"),)
    ),
    "learnt code": Case(
        LayerConditioned(code="learnt"),
        {f"resid_post.{i}": 4 for i in range(2)},
        ((6, "any", "any"),),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(wiring: Wiring, activation=None, seed: int = 0) -> Coder:
    """A coder with every tensor random; a fixed code of the site stays what it is."""
    coder = Coder(wiring, activation or ReLU()).double()
    random = generator(seed)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.normal_(generator=random)
        for scale in (coder.scale_read, coder.scale_write):
            scale.uniform_(0.4, 2.5, generator=random)
        if coder.threshold is not None:
            coder.threshold.fill_(0.3)
    return coder.float().eval()


def rows_of(case: Case, n: int = 5, seed: int = 9) -> torch.Tensor:
    return torch.randn(n, sum(case.sites.values()), generator=generator(seed))


def parts_of(row, sites: dict[str, int]) -> dict[str, list[float]]:
    """A flat row cut up by hand."""
    values, found = row.tolist(), {}
    for site, width in sites.items():
        found[site], values = values[:width], values[width:]
    return found


def widths(case: Case) -> dict[str, int]:
    """Width of each site that a coder itself knows."""
    match case.config:
        case Difference():
            return {s.replace("a/", "b-a/"): w for s, w in case.sites.items() if s[0] == "a"}
        case LayerConditioned():
            return {"any": next(iter(case.sites.values()))}
        case _:
            return case.sites


def sinusoid(position: int, width: int) -> list[float]:
    """sin and cos of position / 10000^(2i/width), one after the other."""
    from math import cos, sin

    return [
        (cos if i % 2 else sin)(position / 10000 ** ((i - i % 2) / width)) for i in range(width)
    ]


def seen_by(case: Case, coder: Coder, row) -> list[tuple[dict, dict, float | None]]:
    """What the coder gets of one harvested row: scaled inputs, and each site's scale to undo."""
    parts = parts_of(row, case.sites)
    if isinstance(case.config, LayerConditioned):
        found = []
        for p, values in enumerate(parts.values()):
            code = sinusoid(p, len(values))
            if case.config.code == "learnt":
                code = coder.site_code[p].tolist()
            factor = float(coder.scale_read[p])
            x = [v * factor + c for v, c in zip(values, code, strict=True)]
            found.append(({"any": x}, {"any": float(coder.scale_write[p])}))
        return found
    if isinstance(case.config, Difference):
        parts = {
            made: [b - a for a, b in zip(parts[f"a/{s}"], parts[f"b/{s}"], strict=True)]
            for made in widths(case)
            for s in [made.partition("/")[2]]
        }
    reads = [s for s in parts if any(s in r.split() for _, r, _ in case.table)]
    writes = [s for s in parts if any(s in w.split() for _, _, w in case.table)]
    scale_in = dict(zip(reads, coder.scale_read.tolist(), strict=True))
    scale_out = dict(zip(writes, coder.scale_write.tolist(), strict=True))
    return [({s: [v * scale_in[s] for v in parts[s]] for s in reads}, scale_out)]


def block(weights, sites: list[str], width: dict[str, int]) -> dict[str, list[float]]:
    """One row of a weight block by site."""
    return parts_of(weights, {s: width[s] for s in sites})


def by_loops(case: Case, coder: Coder, x: dict[str, list[float]]) -> tuple[list, dict]:
    """Code and scaled output of one row, weight by weight."""
    width, code = widths(case), []
    written = [s for s in width if any(s in w.split() for _, _, w in case.table)]
    out = parts_of(coder.b_dec, {s: width[s] for s in written})
    for g, (n, reads, writes) in enumerate(case.table):
        for i in range(n):
            encoder = block(coder.W_enc[g][i], reads.split(), width)
            pre = float(coder.b_enc[len(code)])
            for site in reads.split():
                pre += sum(w * v for w, v in zip(encoder[site], x[site], strict=True))
            stored = coder.W_dec[g][i]
            decoder = block(
                torch.cat([stored, stored]) if g == case.tied else stored,
                writes.split(),
                width,
            )
            code.append(max(0.0, pre))
            for site in writes.split():
                for c, weight in enumerate(decoder[site]):
                    out[site][c] += code[-1] * weight
        if getattr(case.config, "skip", False):
            inputs = [v for site in reads.split() for v in x[site]]
            places = [(site, c) for site in writes.split() for c in range(width[site])]
            for (site, c), weights in zip(places, coder.W_skip[str(g)].tolist(), strict=True):
                out[site][c] += sum(w * v for w, v in zip(weights, inputs, strict=True))
    return code, out


@every_case
def test_groups_are_as_published(case):
    wiring = case.wiring
    found = [(g.n_latents, " ".join(g.reads), " ".join(g.writes)) for g in wiring.groups]
    assert found == list(case.table)
    assert [i for i, g in enumerate(wiring.groups) if g.copies == 2] == (
        [] if case.tied is None else [case.tied]
    )
    assert all(g.copies in (1, 2) for g in wiring.groups)
    assert all(g.skip == getattr(case.config, "skip", False) for g in wiring.groups)
    assert wiring.harvest == case.layout


@every_case
def test_a_coder_is_the_loop(case):
    coder = filled(case.wiring).requires_grad_(False)
    rows = rows_of(case)
    given = all_rows(case.wiring, rows)
    code_BL, out_BY = coder.encode(given.x_BX, given.site_B), coder(given.x_BX, given.site_B)
    at = 0
    for row in rows:
        for x, scale_out in seen_by(case, coder, row):
            code, out = by_loops(case, coder, x)
            assert code_BL[at].tolist() == pytest.approx(code, rel=1e-4, abs=1e-4)
            flat = [v / scale_out[s] for s, values in out.items() for v in values]
            assert out_BY[at].tolist() == pytest.approx(flat, rel=1e-4, abs=1e-4)
            at += 1
    assert at == len(code_BL)


@every_case
@pytest.mark.parametrize("activation", [ReLU(), BatchTopK(k=3), JumpReLU(initial_threshold=0.3)])
def test_saved_loaded_and_folded_it_is_the_same(case, activation, tmp_path):
    coder = filled(case.wiring, activation)
    given = all_rows(case.wiring, rows_of(case, 7))
    code, out = coder.encode(given.x_BX, given.site_B), coder(given.x_BX, given.site_B)
    save(coder, tmp_path / "coder")
    again = load(tmp_path / "coder")
    assert again.wiring == case.wiring
    assert torch.equal(again(given.x_BX, given.site_B), out)
    if isinstance(case.config, LayerConditioned):
        with pytest.raises(UsageError, match="Use it unfolded"):
            fold(again)
        return
    folded = fold(again)
    for same in (folded, unfold(folded)):
        save(same, tmp_path / "coder")
        same = load(tmp_path / "coder")
        torch.testing.assert_close(same(given.x_BX), out, rtol=1e-4, atol=1e-4)
        assert torch.equal(same.encode(given.x_BX) != 0, code != 0)
        torch.testing.assert_close(same.decoder_norms(), coder.decoder_norms())


def train_a_little(coder: Coder, case: Case, steps: int = 4) -> Coder:
    """Adam on reconstruction and AuxK with half of the latents dead: every weight moves."""
    objective = Objective(aux=AuxK(weight=1.0, k=4))
    optimizer = torch.optim.Adam(coder.parameters(), lr=0.05)
    dead_L = torch.arange(coder.wiring.n_latents) % 2 == 0
    for step in range(steps):
        rows = training_rows(case.wiring, rows_of(case, 32, step), generator(step))
        loss, parts = objective(train_pass(coder.train(), rows, dead_L))
        assert parts["aux"] > 0
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return coder.eval()


def paths(case: Case, coder: Coder) -> set[tuple[str, str]]:
    """Pairs (site read, site written) with an effect, from the coder's Jacobian on some rows."""
    found = set()
    for row in rows_of(case, 12, seed=3):
        given = all_rows(case.wiring, row[None])

        site_1 = None if given.site_B is None else given.site_B[:1]

        def output(x_X, site_1=site_1):
            return coder(x_X[None], site_1)[0]

        jacobian_YX = torch.autograd.functional.jacobian(output, given.x_BX[0])
        read, write = case.wiring.read, case.wiring.write
        for source, target in product(read.sites, write.sites):
            if jacobian_YX[write.slice(target)][:, read.slice(source)].any():
                found.add((source, target))
    return found


@every_case
def test_effects_run_only_where_a_group_leads_also_after_training(case):
    leading = {
        (source, target)
        for _, reads, writes in case.table
        for source, target in product(reads.split(), writes.split())
    }
    coder = filled(case.wiring)
    assert paths(case, coder) == leading
    assert paths(case, train_a_little(coder, case)) == leading


@pytest.mark.parametrize(
    "name",
    [
        "clt",
        "skip clt",
        "per layer",
        "weakly causal",
        "weakly causal from end to end",
        "strictly causal",
    ],
)
def test_nothing_earlier_is_written(name):
    """From the weights: the columns of a decoder block are sites at the reader's depth or deeper.

    The order of computation is the language model's own list of its sites.
    """
    from crosslens.lm.sites import all_sites

    depth = all_sites(6).index
    wiring = CASES[name].wiring
    coder = filled(wiring)
    for g, group in enumerate(wiring.groups):
        reader = max(map(depth, group.reads))
        allowed = [s for s in wiring.write.sites if depth(s) >= reader]
        assert coder.W_dec[g].shape[1] <= sum(wiring.write.pick(allowed).widths)
        assert set(group.writes) <= set(allowed)
        norms = coder.decoder_norms()[wiring.slices[g]]
        earlier = [p for p, s in enumerate(wiring.write.sites) if depth(s) < reader]
        assert not norms[:, earlier].any()


def test_dedicated_latents_never_touch_the_other_model():
    case = CASES["dedicated"]
    coder = train_a_little(filled(case.wiring), case, steps=20)
    a = sum(w for s, w in UNLIKE.items() if s.startswith("a/"))
    rows = rows_of(case, 16).requires_grad_()
    for own, other in ((slice(0, 2), slice(a, None)), (slice(2, 4), slice(None, a))):
        (grad,) = torch.autograd.grad(coder.encode(rows)[:, own].sum(), rows)
        assert grad.any()
        assert not grad[:, other].any()
        code = torch.zeros(3, 10)
        code[:, own] = 1.0
        written = coder.decode_scaled(code).detach()
        assert written.any()
        assert not written[:, other].any()


def test_only_exclusive_latents_write_a_difference_beside_tied_ones():
    case = CASES["dedicated, shared ones tied"]
    coder = train_a_little(filled(case.wiring), case, steps=20)
    written = coder.decode_scaled(torch.eye(10)).detach()
    differs = (written[:, :5] != written[:, 5:]).any(-1)
    assert differs.tolist() == [True] * 4 + [False] * 6
    assert coder.W_dec[2].shape == (6, 5)


def test_shared_decoders_are_stored_once_and_stay_tied():
    case = CASES["designated shared"]
    coder = filled(case.wiring)
    before = coder.W_dec[0].detach().clone()
    train_a_little(coder, case)
    assert coder.W_dec[0].shape == (3, 5)
    assert coder.W_enc[0].shape == (3, 10)
    assert not torch.equal(before, coder.W_dec[0])
    one_of_each = torch.zeros(3, 10)
    one_of_each[range(3), range(3)] = 1.0
    written = coder.decode_scaled(one_of_each)
    assert torch.equal(written[:, :5], written[:, 5:])
    norms = coder.decoder_norms()
    assert torch.equal(norms[:3, :2], norms[:3, 2:])
    assert not torch.equal(norms[3:, :2], norms[3:, 2:])
