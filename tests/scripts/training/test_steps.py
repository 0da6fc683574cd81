"""Learning rate, parameter groups, skips and divergence."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from periln.runkit.errors import UsageError
from periln.runkit.recipes import from_mapping
from periln.scripts.recipe import Divergence, NormDecay, Optimizer, Recipe
from periln.scripts.training.engine import Engine
from periln.scripts.training.steps import StepBook, learning_rate, make_optimizer


def test_warm_up_is_linear_and_cosine_ends_at_its_share():
    recipe = Optimizer(learning_rate=1.0, final_learning_rate=0.1, warmup=0.1)
    rates = [learning_rate(s, 100, recipe) for s in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (s + 1) for s in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_no_warm_up_and_all_warm_up():
    assert learning_rate(0, 10, Optimizer(learning_rate=1.0, warmup=0.0)) == 1.0
    assert learning_rate(9, 10, Optimizer(learning_rate=1.0, warmup=1.0)) == 1.0


@pytest.mark.parametrize("placement", ["post", "pre", "peri"])
def test_decay_is_decoupled_and_spares_norms(placement):
    config = PeriLlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        norm_placement=placement, attention_bias=True,
    )  # fmt: skip
    model = PeriLlamaForCausalLM(config)
    optimizer = make_optimizer(model, Optimizer(learning_rate=0.5, weight_decay=0.1))
    for p in model.parameters():
        torch.nn.init.constant_(p, 2.0)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        expected = 2.0 if p.ndim < 2 else 2.0 * (1 - 0.5 * 0.1)  # no gradient: only p <- p (1 - rate * decay) moves
        assert torch.all(p == expected), name
    assert {n for n, p in model.named_parameters() if p.ndim < 2} >= {"model.layers.0.self_attn.q_proj.bias"}


def book(**rules) -> StepBook:
    return StepBook(Divergence(**rules))


def test_a_skip_is_named_by_its_cause():
    b = book()
    assert b.record(3.0, True, 65536.0) == "probe"  # the first scale is unproven
    assert b.record(3.0, False, 32768.0) is None
    assert b.record(3.0, True, 65536.0) == "probe"  # doubled
    assert b.record(3.0, True, 32768.0) == "backward"  # proven before, fails now
    assert b.record(math.inf, True, 16384.0) == "forward"
    assert (b.total, b.consecutive) == (4, 3)
    b.record(3.0, False, 8192.0)
    assert (b.total, b.consecutive) == (4, 0)


def test_divergence_by_losses_that_are_not_finite():
    b = book(nonfinite_losses=3)
    for loss in (math.nan, math.inf, 2.0, math.nan, math.nan):
        b.record(loss, not math.isfinite(loss), 1.0)
        assert b.divergence() is None
    b.record(math.nan, True, 1.0)
    assert "not finite for 3 steps" in b.divergence()


def test_divergence_by_endless_skips():
    b = book(consecutive_skips=4)
    for _ in range(3):
        b.record(2.0, True, 1.0)
        assert b.divergence() is None
    b.record(2.0, True, 1.0)
    assert "4 steps in a row were skipped" in b.divergence()


def test_divergence_by_a_rising_loss_but_not_by_one_spike():
    b = book(loss_rise=1.0, window=4)
    for loss in (7.0, 5.0, 5.0, 5.0, 5.0, 8.0, 5.0, 5.0, 5.0):
        b.record(loss, False, 1.0)
        assert b.divergence() is None
    for loss in (6.0, 6.5, 6.5, 6.5):
        b.record(loss, False, 1.0)
    assert "more than 1.0 nats above its lowest, 5.000" in b.divergence()


def test_replay_from_the_records_gives_the_same_book():
    steps = [(7.0, True, 4.0), (6.5, False, 2.0), (math.nan, True, 4.0), (6.0, False, 2.0), (5.5, True, 2.0)]
    lived, replayed = book(window=3), book(window=3)
    records = []
    for loss, skipped, scale in steps:
        lived.record(loss, skipped, scale)
        lived.spike(loss)
        finite = loss if math.isfinite(loss) else None
        records.append({"loss": finite, "grad_norm": finite, "found_inf": skipped, "loss_scale": scale})
    replayed.replay(records)
    spikes = [vars(book).pop("_spikes") for book in (lived, replayed)]
    assert vars(lived) == vars(replayed)
    assert vars(spikes[0]) == vars(spikes[1])


def test_a_scale_that_has_just_doubled_is_a_probe_even_where_it_stood_before():
    b = book()
    b.record(3.0, False, 65536.0)
    assert b.record(3.0, True, 65536.0) == "backward"
    b.record(3.0, False, 32768.0)
    assert b.record(3.0, True, 65536.0) == "probe"
    b.record(3.0, False, 32768.0)
    b.record(3.0, False, 65536.0)
    assert b.record(3.0, True, 65536.0) == "backward"


def test_without_a_loss_scale_nothing_is_a_probe():
    unscaled = StepBook(Divergence(), scaled=False)
    assert unscaled.record(3.0, True, 1.0) == "backward"


SLOTS = {
    "input": 0.01,
    "output": 0.02,
    "residual": 0.03,
    "qk": 0.04,
    "v": 0.07,
    "inner": 0.08,
    "embedding": 0.05,
    "final": 0.06,
}


def decays(model: PeriLlamaForCausalLM, recipe: Optimizer) -> dict[str, float]:
    groups = make_optimizer(model, recipe).param_groups
    found = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
def test_each_norm_decays_as_its_slot_says(norm_type):
    every = dict.fromkeys(("input_norm", "output_norm", "residual_norm", "embedding_norm", "final_norm"), True)
    every |= {"attn_inner_norm": True, "mlp_inner_norm": True, "v_norm": "head"}
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "qk_norm": "full", "norm_type": norm_type, "attention_bias": True}
    model = PeriLlamaForCausalLM(PeriLlamaConfig(**sizes, norm_placement=every))
    found = decays(model, Optimizer(weight_decay=0.1, norm_decay=NormDecay(**SLOTS)))
    layer = {
        "attn_input_norm": 0.01,
        "mlp_output_norm": 0.02,
        "attn_residual_norm": 0.03,
        "self_attn.q_norm": 0.04,
        "self_attn.k_norm": 0.04,
        "self_attn.v_norm": 0.07,
        "self_attn.inner_norm": 0.08,
        "mlp.inner_norm": 0.08,
    }
    for module, expected in layer.items():
        assert found[f"model.layers.1.{module}.weight"] == expected
    assert (found["model.embed_norm.weight"], found["model.final_norm.weight"]) == (0.05, 0.06)
    assert found["model.layers.0.self_attn.q_proj.bias"] == 0.0
    assert {found[name] for name, p in model.named_parameters() if p.ndim == 2} == {0.1}
    plain = decays(model, Optimizer(weight_decay=0.1))
    assert {plain[name] for name, p in model.named_parameters() if p.ndim == 1} == {0.0}
    one = Optimizer(weight_decay=0.1, decay_norms_and_biases=True, norm_decay=NormDecay(output=0.0))
    found = decays(model, one)
    outputs = [name for name in found if "output_norm" in name]
    assert len(outputs) == (8 if norm_type == "layernorm" else 4)
    assert all(decay == (0.0 if name in outputs else 0.1) for name, decay in found.items())


def test_a_negative_decay_is_refused_by_name():
    mapping = {
        "name": "r",
        "data": "none",
        "model": {"norm_placement": "pre"},
        "steps": 10,
        "batch_size": 1,
        "sequence_length": 8,
    }
    for norm_decay, message in (
        ({"qk": -0.1}, "optimizer.norm_decay.qk must be at least 0, or null, not -0.1"),
        ({"inputs": 0.1}, "unknown field optimizer.norm_decay.inputs .did you mean 'input'"),
    ):
        with pytest.raises(UsageError, match=message):
            from_mapping(Recipe, mapping | {"optimizer": {"norm_decay": norm_decay}}).check()


@pytest.mark.parametrize("clip", [None, 1e9, 0.01])
def test_gradients_are_clipped_as_torch_does_and_left_alone_where_the_factor_is_one(clip):
    gradient, weight = torch.randn(4, 3), nn.Parameter(torch.zeros(4, 3))
    weight.grad = gradient.clone()
    expected = nn.Parameter(torch.zeros(4, 3))
    expected.grad = gradient.clone()
    nn.utils.clip_grad_norm_([expected], math.inf if clip is None else clip)
    engine = Engine.__new__(Engine)
    engine.zero, engine.accelerator = None, SimpleNamespace(scaler=None)
    engine._zero_scaler = None
    engine.model = nn.ParameterDict({"weight": weight})
    seen = []
    step = SimpleNamespace(step=lambda: seen.append((weight.grad.clone(), weight.grad._version)))
    engine.optimizer = SimpleNamespace(optimizer=step, zero_grad=lambda set_to_none: None)
    norm = engine.gradient_norm(clip)
    assert norm == torch.linalg.vector_norm(gradient)
    engine.step(False, norm.item())
    assert torch.equal(seen[0][0], expected.grad)
    assert (seen[0][1] == 0) == (clip != 0.01)
