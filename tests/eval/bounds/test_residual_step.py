"""What a residual step can do: bounds that no vector, no token and no searched input exceeds, and that some attain."""

import json
import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stability_families import FAMILIES, PLACEMENTS, VOCABULARY, build

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from periln.eval.arguments.bounds import parse
from periln.eval.bounds import command as bounds
from periln.eval.bounds.certificate import certify
from periln.eval.bounds.residual_step import Step, angle_between, said, steps_of, summary, token_steps
from periln.eval.structure.anatomy import find_anatomy

IDS = torch.randint(0, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(2))


def measured(model, ids=IDS):
    anatomy = find_anatomy(model)
    steps = steps_of(anatomy, certify(model, anatomy=anatomy))
    return steps, token_steps(anatomy, steps, [ids])


def vectors(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Any vectors


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(2, 40),
    seed=st.integers(0, 10**6),
    reach=st.floats(1e-3, 1e3),
    alpha=st.floats(0.1, 3.0),
    aimed=st.sampled_from(["any", "along", "against", "sideways"]),
)
def test_no_vector_leaves_the_bounds_of_a_step(size, seed, reach, alpha, aimed):
    x, d = vectors(64, size, seed=seed) * 10 ** vectors(64, 1, seed=seed + 1), vectors(64, size, seed=seed + 2)
    if aimed != "any":  # where the bounds are closest
        d = {"along": x, "against": -x, "sideways": d - x * (d * x).sum(1, keepdim=True) / x.square().sum(1)[:, None]}[
            aimed
        ]
    d = d / d.norm(dim=1, keepdim=True) * reach
    if aimed == "any":
        d = d * torch.rand(64, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step, y = Step(1, "attn", alpha, reach, size), alpha * x + d
    near = 1e-9 * (alpha * x.norm(dim=1) + reach)
    low, high = step.lengths(x.norm(dim=1))
    assert bool(((low - near <= y.norm(dim=1)) & (y.norm(dim=1) <= high + near)).all())
    assert bool((angle_between(x, y) <= step.angle(x.norm(dim=1)) + 1e-9).all())
    low, high = step.spread(x.std(dim=1, correction=0))
    assert bool(((low - near <= y.std(dim=1, correction=0)) & (y.std(dim=1, correction=0) <= high + near)).all())
    # Over all entries of many tokens, and data-wise, a standard deviation is a length as well.
    for spread in (lambda t: t.std(correction=0), lambda t: t.var(dim=0, correction=0).mean().sqrt()):
        low, high = step.spread(spread(x))
        assert low - near.max() <= spread(y) <= high + near.max()


def test_each_bound_is_attained():
    x = torch.tensor([3.0, -3.0, 0.0, 0.0], dtype=torch.float64)
    step, size = Step(1, "mlp", 1.0, 2.0, 4), x.norm()
    along = x / size * 2.0
    assert (x + along).norm() == pytest.approx(step.lengths(size)[1].item())
    assert (x - along).norm() == pytest.approx(step.lengths(size)[0].item())
    assert (x + along).std(correction=0) == pytest.approx(step.spread(x.std(correction=0))[1].item())  # x has no mean
    # The ray from the origin that touches the ball of radius 2 around x.
    sine, across = 2.0 / size, torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    touching = 2.0 * (across * (1 - sine**2).sqrt() - x / size * sine)
    assert angle_between(x, x + touching) == pytest.approx(step.angle(size).item())
    assert step.angle(torch.tensor(1.9)) == 1.0  # the ball holds the origin: any direction


def test_a_small_angle_is_exact():
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert angle_between(x, torch.tensor([1.0, 1e-9], dtype=torch.float64)) == pytest.approx(1e-9 / math.pi, rel=1e-6)
    assert angle_between(x, -x) == pytest.approx(1.0)


# Models


@pytest.mark.parametrize("family", [*(f for f in FAMILIES if f != "gpt2"), *(f"peri_llama:{p}" for p in PLACEMENTS)])
def test_no_token_of_a_model_leaves_them(family):
    steps, rows = measured(build(family))
    assert rows.held.all() and len(rows) == len(steps) * IDS.numel()
    assert not any(math.isinf(s.reach) for s in steps)
    for step in steps:
        taken = rows[(rows.layer == step.layer) & (rows.sublayer == step.sublayer)].step
        assert 0 < taken.max() <= step.reach * (1 + 1e-5)


def test_a_bound_that_is_too_small_is_seen():
    """The check has teeth: with half the reach tokens of an output norm leave the bounds."""
    model = build("peri_llama:peri")
    anatomy = find_anatomy(model)
    steps = [
        Step(s.layer, s.sublayer, s.alpha, s.reach / 2, s.size) for s in steps_of(anatomy, certify(model))
    ]  # |b| is near |gamma| sqrt(D) always
    assert token_steps(anatomy, steps, [IDS]).held.mean() < 0.9


@pytest.mark.parametrize("placement", ["pre", "peri", "output"])
def test_no_optimized_input_leaves_them(placement):
    """Gradient ascent on the embedding for the longest stream at the end; the bounds follow the new embedding."""
    model = build(f"peri_llama:{placement}")
    anatomy, ids = find_anatomy(model), torch.tensor([[1, 2, 3, 4]])
    table, kept = model.model.embed_tokens.weight, []
    handle, optimizer, lengths = anatomy.end.watch(kept.append), torch.optim.Adam([table], lr=0.1), []
    for _ in range(25):
        kept.clear()
        model(input_ids=ids, use_cache=False)
        grown = (kept[0] - (model.model.embed_norm(table[ids]) if placement == "peri" else table[ids])).norm(dim=-1)
        lengths.append(grown.max().item())
        optimizer.zero_grad()
        (-grown.sum()).backward()
        optimizer.step()
    handle.remove()
    assert lengths[-1] > 1.05 * lengths[0], "the attack found nothing longer, so it would prove nothing"
    assert measured(model, ids)[1].held.all()


@torch.no_grad()
def one_direction(layers: int, placement: str = "peri", **more):
    """Every branch, and token 5, along channel 4; the other tokens as they come."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 2}
    config = PeriLlamaConfig(vocab_size=20, **sizes, norm_placement=placement, norm_eps=1e-14, **more)
    model = PeriLlamaForCausalLM(config).eval()
    model.model.embed_tokens.weight[5] = torch.eye(16)[4]
    anatomy = find_anatomy(model)
    for s in anatomy.sublayers:
        weight = s.output_projection.module.weight
        row = weight.abs().sum(0)
        weight.zero_()
        weight[4] = row
        kept = []
        handle = s.branch.watch(kept.append)
        model(input_ids=torch.tensor([[5]]), use_cache=False)
        handle.remove()
        weight[4] *= kept[0][0, 0, 4].sign()
    return model


def test_the_growth_over_depth_is_attained_linear_in_length_and_quadratic_in_variance():
    layers = 6
    steps, rows = measured(one_direction(layers), torch.tensor([[5]]))
    assert [s.reach for s in steps] == pytest.approx([4.0] * 2 * layers)  # gamma sqrt(D)
    assert rows["sum"].tolist() == pytest.approx([4.0 * (k + 1) for k in range(1, 2 * layers + 1)], rel=1e-4)
    assert rows["sum"].tolist() == pytest.approx(rows.longest_so_far.tolist(), rel=1e-4)
    # One channel of 16: var = |x|^2 / 16 (1 - 1 / 16). The bound allows for a mean of 0.
    variance = rows.std_sum**2
    assert (variance / rows["sum"] ** 2).tolist() == pytest.approx([15 / 256] * 2 * layers, rel=1e-4)


@pytest.mark.parametrize("layers", [2, 8])
def test_a_step_of_one_over_the_depth_bounds_the_growth_at_any_depth(layers):
    model = one_direction(layers, residual_scale="1/L")
    steps, rows = measured(model, torch.tensor([[5]]))
    assert sum(s.reach for s in steps) == pytest.approx(2 * 4.0)
    assert rows["sum"].iloc[-1] == pytest.approx(3 * 4.0, rel=1e-4)


def test_an_unbounded_add_says_so_and_a_norm_on_the_stream_ends_the_growth():
    gpt2 = build("gpt2")  # its matrices are of a kind that the certificate does not know
    steps, rows = measured(gpt2)
    assert all(math.isinf(s.reach) for s in steps) and rows.held.all() and (rows.widest == 1).all()
    assert said(steps, summary(rows, steps)) == ["4 of 4 adds have no bound: see the certificate for the reasons."]
    steps, rows = measured(build("peri_llama:post"))
    assert all(s.after is not None for s in steps)
    ends = rows.groupby(["layer", "sublayer"], sort=False).longest_so_far.max()
    assert ends.iloc[-1] == pytest.approx(steps[-2].after + steps[-1].reach)
    assert "Norms on the stream" in said(steps, summary(rows, steps))[-1]


def test_the_command_sets_measured_beside_bound(tmp_path, capsys):
    build("glm4").save_pretrained(tmp_path / "glm")
    words = [str(tmp_path / "glm"), "--out", str(tmp_path / "out"), "--data", "random", "--samples", "3"]
    bounds.main(parse([*words, "--tokens", "12"]))
    record = json.loads((tmp_path / "out" / "bounds.json").read_text())
    rows = record["residual_steps"]
    assert [(r["layer"], r["sublayer"]) for r in rows] == [(1, "attn"), (1, "mlp"), (2, "attn"), (2, "mlp")]
    assert all(0 < r["largest_step"] <= r["step_bound"] and r["held"] == 1 for r in rows)
    assert len(pd.read_parquet(tmp_path / "out" / "steps.parquet")) == 4 * 36
    shown = capsys.readouterr().out
    assert "what they did to tokens, and what they can do" in shown and "All 4 steps together add at most" in shown
    assert "what they can do" in (tmp_path / "out" / "bounds.md").read_text()
