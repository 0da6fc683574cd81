"""Propositions D.1 to D.3: exact on the paper's network for all inputs, and bounds on real models, token by token."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from propositions import PaperNetwork, proposition
from stability_families import FAMILIES, PLACEMENTS, VOCABULARY, build

from periln.eval.arguments.bounds import parse
from periln.eval.bounds import command as command
from periln.eval.bounds.token_bounds import SLACK, broken_assumptions, summary, token_bounds
from periln.eval.structure.anatomy import find_anatomy
from periln.runkit.errors import run_command

IDS = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2))


def network(kind, seed, width, hidden, gamma, spread, eps=0.0):
    """A network and a token, in float64."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return spread * torch.randn(*shape, generator=g, dtype=torch.float64)

    return PaperNetwork(kind, draw(width, hidden), draw(hidden), draw(hidden, width), draw(width), gamma, eps), draw(
        width
    )


sizes = {
    "seed": st.integers(0, 2**31),
    "width": st.integers(2, 12),
    "hidden": st.integers(1, 16),
    "gamma": st.floats(0.01, 100),
    "spread": st.floats(0.05, 30),
}


@settings(max_examples=60, deadline=None)
@given(**sizes)
def test_d1_is_an_equation(seed, width, hidden, gamma, spread):
    net, x = network("pre", seed, width, hidden, gamma, spread)
    p = proposition(net, x, seed % width)
    assert torch.allclose(p.gradient, p.formula, rtol=1e-9, atol=1e-12 * (1 + p.formula.abs().max()))
    assert p.paper is None and p.sharp is None  # nothing bounds it but |h|


@pytest.mark.parametrize("kind", ["peri", "post"])
@settings(max_examples=60, deadline=None)
@given(**sizes, eps=st.sampled_from([0.0, 1e-6, 0.1]))
def test_d2_and_d3_hold_for_all_inputs_in_both_forms(kind, seed, width, hidden, gamma, spread, eps):
    net, x = network(kind, seed, width, hidden, gamma, spread, eps)
    p = proposition(net, x, seed % width)
    whole = p.gradient.norm().item()
    assert p.gradient.abs().max().item() <= whole <= p.with_loss * (1 + 1e-9) <= p.sharp * (1 + 1e-8)
    assert p.sharp == pytest.approx(p.paper / (2 * math.sqrt(2)))


def test_the_sharper_bound_is_attained_and_the_papers_is_never_nearer_than_a_factor_of_two_root_two():
    """With p - y orthogonal to a the Jacobian's norm is attained; with all of p on a wrong label |p - y| = sqrt(2)."""
    width = 8
    w2 = torch.zeros(3, width, dtype=torch.float64)
    w2[:, 5] = 1.0  # a lies along channel 5 alone
    x = torch.zeros(width, dtype=torch.float64)
    x[2] = 1e3  # p is all on channel 2, the label is channel 0
    ones = torch.ones(width, 3, dtype=torch.float64)
    net = PaperNetwork(
        "peri", ones, torch.ones(3, dtype=torch.float64), w2, torch.zeros(width, dtype=torch.float64), 0.7
    )
    p = proposition(net, x, 0)
    assert p.gradient.norm().item() == pytest.approx(p.sharp, rel=1e-9)
    assert p.paper == pytest.approx(2 * math.sqrt(2) * p.gradient.norm().item(), rel=1e-9)


def test_a_massive_activation_makes_the_gradient_of_pre_explode_and_leaves_that_of_peri():
    norms = {}
    for kind in ("pre", "peri"):
        for factor in (1.0, 1e4):
            net, x = network(kind, 3, 8, 16, 1.0, 1.0)
            net = PaperNetwork(kind, net.w1 * factor, net.b1 * factor, net.w2, net.b2 * 0)
            norms[kind, factor] = proposition(net, x, 1).gradient.norm().item()
    assert norms["pre", 1e4] > 1e3 * norms["pre", 1.0]
    assert norms["peri", 1e4] == pytest.approx(norms["peri", 1.0], rel=1e-6)


def test_an_unknown_kind_is_named():
    net, x = network("perry", 0, 4, 4, 1.0, 1.0)
    with pytest.raises(ValueError, match="'perry' is none of pre, peri, post"):
        proposition(net, x, 0)


MODELS = [f"peri_llama:{p}" for p in PLACEMENTS] + list(FAMILIES)


@pytest.mark.parametrize("family", MODELS)
def test_on_a_real_model_every_token_keeps_its_bound(family):
    anatomy = find_anatomy(build(family))
    rows = token_bounds(anatomy, [IDS[:2], IDS[2:]])
    watched = [s for s in anatomy.sublayers if s.residual_add is not None]
    assert len(rows) == len(watched) * IDS.numel() and rows["sample"].max() == 2
    assert rows.gradient_error.max() < 1e-4  # the tokens' outer products sum to autograd's gradient
    assert (rows.measured <= rows.bound * (1 + SLACK)).all()
    assert (rows.measured > 0).mean() > 0.8
    for s in watched:
        mine = rows[(rows.layer == s.layer) & (rows.sublayer == s.kind) & (rows.bound > 0)]
        if s.output_norm is None and s.residual_norm is None:  # D.1: an equation
            assert (mine.measured / mine.bound - 1).abs().max() < SLACK
            assert mine.paper_bound.isna().all()
        else:
            assert 0.02 < (mine.measured / mine.bound).median() < 1


def test_the_summary_says_what_held_and_the_model_what_it_breaks():
    anatomy = find_anatomy(build("peri_llama:peri"))
    told = summary(token_bounds(anatomy, [IDS]))
    assert list(told.layer) == [1, 1, 2, 2, 3, 3, 4, 4] and (told.held == 1).all()
    assert (told.tightness > 0.02).all() and told.paper_held.notna().all()
    broken = " ".join(broken_assumptions(anatomy))
    for word in ("head", "final norm", "not a ReLU", "gated", "no bias", "gamma is a vector", "many tokens"):
        assert word in broken
    post = " ".join(broken_assumptions(find_anatomy(build("peri_llama:post"))))
    assert "final norm" not in post
    neox = " ".join(broken_assumptions(find_anatomy(build("neox_sequential"))))
    assert "gated" not in neox and "no bias" not in neox


def test_the_command_writes_tables_and_records_and_overwrites_nothing(tmp_path, capsys):
    build("gemma2").save_pretrained(tmp_path / "model")
    argv = [
        str(tmp_path / "model"),
        "--out",
        str(tmp_path / "out"),
        "--data",
        "random",
        "--samples",
        "2",
        "--tokens",
        "8",
    ]
    assert run_command(command.main, parse(argv)) == 0
    record = json.loads((tmp_path / "out" / "bounds.json").read_text())
    assert len(record["sublayers"]) == 4 and all(row["held"] == 1 for row in record["sublayers"])
    assert any("head" in text for text in record["assumptions_broken"])
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["rows"]
    assert "paper held" in (tmp_path / "out" / "bounds.md").read_text()
    assert run_command(command.main, parse(argv)) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
