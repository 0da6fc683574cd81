"""Learning-rate schedules: their values by hand, and that their parts fit."""

import math

import pytest
from tiny import MODEL

from periln.runkit.errors import UsageError
from periln.runkit.recipes import from_mapping
from periln.scripts.recipe import Optimizer, Recipe
from periln.scripts.training.schedules import SCHEDULES, decay_start
from periln.scripts.training.steps import learning_rate


def rates(steps: int = 10, **fields) -> list[float]:
    rules = Optimizer(**{"learning_rate": 2.0, "final_learning_rate": 0.1, "warmup": 0.2} | fields)
    return [learning_rate(step, steps, rules) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_warms_up_to_the_peak_in_a_line(schedule):
    assert rates(schedule=schedule)[:3] == pytest.approx([1.0, 2.0, 2.0])


def test_the_values_of_each_schedule_by_hand():
    low, high = 0.2, 2.0
    cosine = [low + (high - low) * (1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]
    assert rates()[2:] == pytest.approx(cosine)  # the default, as ever
    assert rates(schedule="linear")[2:] == pytest.approx([high - (high - low) * t / 8 for t in range(8)])
    assert rates(schedule="constant")[2:] == [high] * 8
    wsd = rates(schedule="wsd", decay=0.4, decay_shape="linear")
    assert wsd[2:] == pytest.approx([2.0] * 4 + [2.0, 1.55, 1.1, 0.65])
    steep = rates(schedule="wsd", decay=0.4, decay_shape="1-sqrt", final_learning_rate=0.0)
    assert steep[5:] == pytest.approx([2.0, 2.0, 1.0, 2 * (1 - math.sqrt(0.5)), 2 * (1 - math.sqrt(0.75))])


def test_a_longer_wsd_run_has_the_rates_of_a_shorter_one_up_to_its_decay():
    shared = {"schedule": "wsd", "warmup": 0.0}
    short, long = rates(20, **shared, decay=0.5), rates(200, **shared, decay=0.05)
    start = decay_start(20, "wsd", 0.0, 0.5)
    assert start == 10
    assert short[:start] == long[:start]
    assert short[start + 1] < long[start + 1]


def test_runs_of_one_step_and_runs_that_are_all_warm_up_or_all_decay_have_rates():
    for schedule in SCHEDULES:
        for warmup, decay in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
            for steps in (1, 3):
                found = rates(steps, schedule=schedule, warmup=warmup, decay=decay)
                assert all(0 < rate <= 2.0 for rate in found)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"schedule": "wsd", "warmup": 0.5, "decay": 0.6},
            "optimizer.warmup 0.5 and optimizer.decay 0.6 exceed the run",
        ),
        ({"decay": 1.5}, "optimizer.decay is a share of the steps, 0 to 1, not 1.5"),
        ({"schedule": "cosin"}, "optimizer.schedule must be one of 'cosine', 'linear', 'constant', 'wsd', not 'cosin'"),
        ({"decay_shape": "sqrt"}, "optimizer.decay_shape must be one of 'linear', '1-sqrt', not 'sqrt'"),
    ],
)
def test_mistakes_in_a_schedule_are_found_before_the_first_step(fields, message):
    mapping = {"name": "r", "data": "none", "model": dict(MODEL), "steps": 10, "batch_size": 1, "sequence_length": 8}
    with pytest.raises(UsageError, match=message):
        from_mapping(Recipe, mapping | {"optimizer": fields}).check()
