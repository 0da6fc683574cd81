"""Gradient spikes: what counts as one, and where."""

import json
import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from periln.eval.records.course import happenings, read_course
from periln.eval.records.frames import load
from periln.eval.tables.run_stability import spikes_note, stability
from periln.model_cards.facts import outcome
from periln.model_cards.subject import Subject
from periln.runkit.folder import RunFolder, write_text
from periln.runkit.spikes import SpikeCounter, Spikes, count_spikes, spike_steps


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
    records = pytest.importorskip("periln.eval.records.derived")
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


def test_a_run_is_judged_by_its_own_rule_wherever_it_is_read(tmp_path):
    """Norms with five spikes at 3 sigma and none at 6: table, course, card and counter say five."""
    values, level = [0.9, 1.1] * 100, 1.4  # 1 ± 0.1: four standard deviations
    for step in (40, 80, 110, 150, 190):
        values[step] = level
    run = RunFolder(tmp_path / "run")
    rules = {"sigmas": 3.0, "window": 64}
    run.claim({"stage": "pretrain", "model": {}, "optimizer": {"learning_rate": 1e-3}, "seed": 1, "spikes": rules})
    lines = [{"step": step, "loss": 1.0, "grad_norm": value} for step, value in enumerate(values)]
    write_text(run.metrics_path, "".join(json.dumps(line) + "\n" for line in lines))
    run.set_status("completed", step=200)
    expected = spike_steps(range(200), values, Spikes(**rules))
    assert set(expected) >= {40, 80, 110, 150, 190} and not spike_steps(range(200), values)
    table = stability(load(tmp_path))
    assert table.numbers.spikes.iloc[0] == expected
    assert "exceeds the mean of the 64 steps before it (all there are, at least 16) by 3 of" in table.notes[0]
    assert [e["step"] for e in happenings(read_course(run.path)) if e["kind"] == "spike"] == expected
    assert ("gradient spikes", str(len(expected))) in outcome(Subject(None, run))
    assert count_spikes(values, 200, Spikes(**rules))[0] == len(expected)


def test_the_table_says_which_rule_is_whose():
    frames = SimpleNamespace(
        pretrained=pd.DataFrame({"run": ["a", "b"]}), recipes={"a": {}, "b": {"spikes": {"sigmas": 3.0}}}
    )
    assert spikes_note(frames).endswith("by 6 of their standard deviations; by their recipes 3 of 128 steps in b.")
