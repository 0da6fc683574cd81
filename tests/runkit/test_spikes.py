"""Gradient spikes: what counts as one, and where."""

import math

import pandas as pd
import pytest
import torch

from runkit.spikes import SpikeCounter, Spikes, count_spikes


def norms(count: int) -> list[float]:
    return [1.0 + 0.01 * (i % 5) for i in range(count)]


def test_a_spike_stands_six_sigmas_above_the_steps_before_it():
    counter = SpikeCounter()
    assert not any(counter.record(x) for x in norms(200))
    window = norms(200)[-128:]
    mean = sum(window) / 128
    sigma = (sum((x - mean) ** 2 for x in window) / 128) ** 0.5
    for sigmas, spike in ((5.99, False), (6.01, True)):
        fresh = SpikeCounter()
        for x in norms(200):
            fresh.record(x)
        assert fresh.record(mean + sigmas * sigma) is spike
        assert fresh.steps == ([200] if spike else [])


def test_spikes_begin_to_count_after_sixteen_finite_norms():
    assert SpikeCounter().rules.window == 128
    for before, spike in ((15, False), (16, True)):
        counter = SpikeCounter()
        for x in [None, float("inf"), float("nan"), *norms(before)]:
            assert not counter.record(x)
        assert counter.record(9.0) is spike
    short = SpikeCounter(Spikes(sigmas=6.0, window=4))
    assert [short.record(x) for x in (1.0, 1.1, 1.0, 1.1, 9.0, 9.0)] == [False] * 4 + [True, False]


def test_spikes_are_counted_over_the_run_and_its_first_tenth():
    values = norms(1000)
    for step in (30, 99, 100, 700):
        values[step] = 5.0
    assert count_spikes(values, 1000) == (4, 2)
    assert count_spikes(values, 990) == (4, 1)


def test_the_report_counts_the_same_spikes():
    records = pytest.importorskip("eval.records.derived")
    random = torch.Generator().manual_seed(0)
    values = (0.1 * torch.randn(600, generator=random)).exp().tolist()
    for step in (20, 250, 251, 500):
        values[step] = 7.0
    frame = pd.DataFrame({"step": range(600), "grad_norm": values})
    frame.loc[[5, 300], "grad_norm"] = math.nan
    counter = SpikeCounter()
    for value in frame.grad_norm:
        counter.record(value)
    assert counter.steps == records.spikes(frame) and len(counter.steps) >= 3
