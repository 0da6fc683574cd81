"""Learning rate, parameter groups, skips and divergence."""

import math
from itertools import pairwise

import pytest
import torch

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from periln.scripts.recipe import Divergence, Optimizer
from periln.scripts.steps import StepBook, learning_rate, make_optimizer


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
