"""Tests of the report's answer: three sentences at most, each from the records."""

import json
from pathlib import Path

import pandas as pd
import pytest
from synthetic_bench import write_any

from periln.eval.figures.outcomes import outcomes_of
from periln.eval.figures.selection import view_of
from periln.eval.records.frames import load
from periln.eval.report.answer import answer


def write_loss(run: Path, loss: float) -> None:
    (run / "eval").mkdir(exist_ok=True)
    results = [{"task": "heldout", "metric": "loss", "value": loss, "stderr": None, "n": 100}]
    (run / "eval" / "heldout.json").write_text(json.dumps({"results": results}))


def grid(root: Path, losses: dict[str, tuple[float, ...]], rate: float = 0.002, **settings) -> None:
    """A run a seed for each placement, with these held-out losses; NaN: it diverged."""
    for placement, values in losses.items():
        for seed, loss in enumerate(values, start=1):
            lost = loss != loss
            name, status = f"{placement}-{rate:g}-{seed}", "diverged" if lost else "completed"
            run = write_any(
                root, name, rate=rate, seed=seed, status=status, model={"norm_placement": placement}, **settings
            )
            if not lost:
                write_loss(run, loss)


NAN = float("nan")


def test_the_answer_names_the_lowest_loss_the_least_headroom_and_the_survivors(tmp_path):
    grid(tmp_path, {"post": (5.51, 5.53), "pre": (5.60, 5.62)})
    grid(tmp_path, {"peri": (5.58, 5.59)}, growth=1.6)
    grid(tmp_path, {"post": (NAN, NAN), "pre": (6.0, NAN), "peri": (6.1, 6.2)}, rate=0.07)
    said = answer(load(tmp_path))
    assert len(said) == 3
    assert said[0] == (
        "At learning rate 0.002 Post-LN had the lowest held-out loss, 5.520 nats a token (Peri-LN 5.585, Pre-LN 5.610; "
        "mean of 2 seeds each)."
    )
    # The largest |x| is 1.6^8 there and 1.3^8 elsewhere, of two layers at step 40.
    assert said[1] == (
        "Peri-LN had the least FP16 headroom, 10.6 bits, and Post-LN the most, 13.0 bits (the least of 2 seeds, at the "
        "recorded steps)."
    )
    assert said[2] == (
        "At 0.07 Pre-LN (1 of 2 seeds) and Peri-LN (2 of 2) finished; Post-LN (2 of 2 seeds) and Pre-LN (1 of 2) "
        "diverged."
    )


def test_a_single_survivor_is_said_to_be_the_only_one(tmp_path):
    grid(tmp_path, {"post": (NAN,), "peri": (6.1,)}, rate=0.07)
    assert answer(load(tmp_path))[-1] == "At 0.07 only Peri-LN (1 of 1 seed) finished; Post-LN (1 of 1 seed) diverged."


def test_a_lead_within_the_seeds_spread_or_of_one_seed_is_said_to_be_so(tmp_path):
    grid(tmp_path, {"pre": (5.50, 5.60), "peri": (5.52, 5.60)})
    assert answer(load(tmp_path))[0].endswith(
        "; its lead over Peri-LN, 0.010, is within the 0.100 by which seeds differ."
    )
    grid(tmp_path / "one", {"pre": (5.5,), "peri": (5.6,)})
    assert answer(load(tmp_path / "one"))[0].endswith("; one seed does not tell a placement from chance.")


def test_runs_that_never_share_a_rate_are_not_said_to(tmp_path):
    grid(tmp_path, {"pre": (5.5,)}, rate=0.001)
    grid(tmp_path, {"peri": (5.6,)}, rate=0.004)
    found = outcomes_of(view_of(load(tmp_path)))
    assert not found.same_rate and set(found.compared.series) == {"pre", "peri"}
    assert answer(load(tmp_path))[0].startswith("Each at its own best rate Pre-LN had the lowest held-out loss, 5.500")


def test_a_heldout_loss_is_not_compared_with_one_of_training(tmp_path):
    grid(tmp_path, {"pre": (5.5,), "peri": (5.6,)})
    (tmp_path / "peri-0.002-1" / "eval" / "heldout.json").unlink()
    assert "had the lowest final training loss" in answer(load(tmp_path))[0]


def test_runs_that_are_not_finished_are_counted_and_not_compared(tmp_path):
    write_any(tmp_path, "a", status="running")
    write_any(tmp_path, "b", status="failed", seed=2)
    assert answer(load(tmp_path))[-1] == "No run has finished: 1 failed, 1 running."
    grid(tmp_path, {"pre": (5.5,)}, rate=0.01)
    assert answer(load(tmp_path))[-1] == (
        "No run diverged: 1 of 3 runs finished, at learning rates 0.002 to 0.01; 2 of 3 runs not finished (1 failed, "
        "1 running)."
    )


def test_an_overflow_is_not_a_number_of_bits(tmp_path):
    grid(tmp_path, {"pre": (5.5,)}, growth=1e9)
    grid(tmp_path, {"peri": (5.6,)})
    said = answer(load(tmp_path))[1]
    assert said.startswith("Pre-LN had the least FP16 headroom, none (overflow), and Peri-LN the most, 13.0 bits")


@pytest.mark.parametrize("count", [1, 6])
def test_there_are_never_more_than_three_sentences_nor_a_list_of_all(tmp_path, count):
    names = ("post", "pre", "peri", "output", "deepnorm", "keel")[:count]
    grid(tmp_path, {name: (5.0 + i / 10,) for i, name in enumerate(names)})
    said = answer(load(tmp_path))
    assert len(said) <= 3 and ("2 more above" in said[0]) == (count == 6)
    assert isinstance(outcomes_of(view_of(load(tmp_path))).rows, pd.DataFrame)
