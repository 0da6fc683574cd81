"""The record of a step is declared once, and what is derived from it has one meaning."""

import json
import math
from dataclasses import fields

import pandas as pd
import pytest

from periln.eval.records import derived
from periln.eval.records.frames import _METRICS
from periln.model_cards import facts
from periln.model_cards.subject import Subject
from periln.runkit.folder import RunFolder, write_text
from periln.runkit.steps import STEP_FIELDS, StepRecord, final_loss
from periln.scripts.sweep import table as sweep_table

LOSSES = [3.0] * 17 + [2.0, None, 1.0]  # the last tenth: None and 1.0
STEP = {
    **{"step": 0, "loss": None, "learning_rate": 1e-3, "grad_norm": None, "loss_scale": 1.0, "found_inf": True},
    **{"skip_kind": "forward", "skips_consecutive": 1, "skips_total": 1, "tokens": 8, "tokens_per_second": 1.0},
    **{"step_seconds": 8.0, "data_wait": None, "mfu": None, "peak_memory_bytes": None},
}


def test_every_field_has_a_unit_and_what_readers_take_is_a_field():
    assert all(f.metadata["unit"] for f in fields(StepRecord))
    assert set(_METRICS) - {"run"} <= set(STEP_FIELDS)


def test_a_record_has_every_key_but_those_that_were_not_measured():
    record = StepRecord(**STEP).as_json()
    assert set(STEP_FIELDS) - set(record) == {"spike", "heldout_loss", "distillation"}
    more = {"spike": False, "heldout_loss": 2.0, "distillation": 0.5}
    assert StepRecord(**STEP, **more).as_json() == record | more


def test_the_final_loss_is_one_number_in_tables_sweeps_figures_and_cards(tmp_path):
    run = RunFolder(tmp_path)
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(LOSSES)]
    write_text(run.metrics_path, "".join(json.dumps(line) + "\n" for line in lines))
    frame = pd.DataFrame(lines).astype(float)
    every = (final_loss(LOSSES), derived.final_loss(frame), facts.final_loss(Subject(None, run)))
    assert every == (1.0, 1.0, 1.0) and sweep_table.final_loss is final_loss


@pytest.mark.parametrize("losses", [[], [None], [1.0] * 9 + [None]])
def test_a_final_loss_without_a_finite_one_is_not_a_number(losses):
    assert math.isnan(final_loss(losses))
