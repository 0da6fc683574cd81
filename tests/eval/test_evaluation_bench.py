"""The bench of evaluation speed: what it compares, and that a wrong answer is not measured."""

import numpy as np
import pandas as pd
import pytest
from small_models import make_run

from periln.eval import bench
from periln.eval.scoring.likelihood import ContinuationLM
from periln.runkit.errors import run_command


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def call(run, *words: object) -> int:
    words = [run.path, "--tasks", "mini_piqa", "--limit", 3, "--pairs", 2, "--device", "cpu", *words]
    return run_command(bench.main, bench.parse([str(word) for word in words]))


def test_speeds_and_their_ratio_are_written(run, tmp_path, capsys):
    assert call(run, "--out", tmp_path) == 0
    (row,) = pd.read_csv(tmp_path / "eval_bench.csv").to_dict("records")
    assert (row["task"], row["documents"]) == ("mini_piqa", 3)
    assert row["ratio"] == pytest.approx(row["documents/s"] / row["HFLM's"])
    assert row["low"] <= row["ratio"] <= row["high"]
    assert "equal to the bit" in capsys.readouterr().out


def test_an_answer_that_differs_by_little_is_an_error(run, monkeypatch, capsys):
    real = ContinuationLM._score

    def off(self, collator, batch):
        return [(name, (value * (1 + 1e-7), best)) for name, (value, best) in real(self, collator, batch)]

    monkeypatch.setattr(ContinuationLM, "_score", off)
    assert call(run) == 1
    assert "the log-likelihoods differ from HFLM's" in capsys.readouterr().err


def test_the_interval_holds_the_ratio_of_medians():
    generator = np.random.default_rng(1)
    seconds = np.stack([generator.normal(1, 0.01, 30), generator.normal(1.5, 0.01, 30)], axis=1)
    low, high = bench.interval(seconds)
    assert 1.45 < low <= 1.5 <= high < 1.55 or low < 1.5 < high


def test_mistakes_are_said(run, capsys):
    assert call(run, "--pairs", 0) == 2
    assert call(run, "--batch-size", "auto") == 2
    said = capsys.readouterr().err
    assert "--pairs must be at least 1, not 0" in said
    assert "wants a --batch-size and a --limit in whole numbers" in said
