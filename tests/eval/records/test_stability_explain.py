"""Tests of `explain`: planted courses of a run, each told rightly, and what the records do not tell left open."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from periln.eval.records.explain import explain
from periln.runkit.errors import UserError

COLUMNS = ["step", "layer", "sublayer", "tensor", "stat", "value"]
TENSORS = ("branch", "residual_add", "stream")
LAYERS = 4


def step_rows(
    step: int, lost: dict | None = None, peak: dict | None = None, gradient: dict | None = None
) -> list[tuple]:
    """A step's rows: max |x| is 2 everywhere but at `peak`, infinite at `lost`; the gradient's norm is 0.1."""
    rows = [(step, 0, "embedding", "stream", "max_abs", 1.0)]
    for layer in range(1, LAYERS + 1):
        for sublayer in ("attn", "mlp"):
            for tensor in TENSORS:
                place = (layer, sublayer, tensor)
                value = math.inf if place in (lost or ()) else (peak or {}).get(place, 2.0)
                rows.append((step, *place, "max_abs", value))
            norm = (gradient or {}).get((layer, sublayer), 0.1)
            rows.append((step, layer, sublayer, "gradient", "norm", norm))
    return rows


def write(run: Path, rows: list[tuple], folder: str = "flight") -> str:
    (run / folder).mkdir(parents=True, exist_ok=True)
    name = f"step_{rows[-1][0]:08d}.parquet"
    pd.DataFrame(rows, columns=COLUMNS).to_parquet(run / folder / name)
    return name


def write_events(run: Path, *events: dict) -> None:
    blank = {"skip_kind": None, "module": None, "reason": None, "file": None}
    (run / "flight").mkdir(parents=True, exist_ok=True)
    (run / "flight" / "events.jsonl").write_text("".join(json.dumps(blank | event) + "\n" for event in events))


def write_metrics(run: Path, steps: int, **at: dict) -> None:
    """A falling loss; `at` replaces fields of steps (`s12={...}`)."""
    run.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(steps):
        record = {"step": step, "loss": 5.0 - 0.01 * step, "grad_norm": 1.0, "skip_kind": None, "spike": False}
        lines.append(json.dumps(record | at.get(f"s{step}", {})))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def write_summary(run: Path, **fields) -> None:
    (run / "summary.json").write_text(json.dumps(fields))


def after(layer: int, sublayer: str) -> set[tuple]:
    """Every place from a module's output on."""
    order = [(n, s, t) for n in range(1, LAYERS + 1) for s in ("attn", "mlp") for t in TENSORS]
    return set(order[order.index((layer, sublayer, "branch")) :])


@pytest.fixture
def overflow(tmp_path) -> Path:
    """Layer 3's MLP grows eightfold a step and overflows at step 12; the run is stopped two steps later."""
    run, place = tmp_path / "run", (3, "mlp", "branch")
    skip = {"loss": None, "grad_norm": None, "skip_kind": "forward", "skip_module": "model.layers.2.mlp.down_proj"}
    write_metrics(run, 14, s0={"skip_kind": "probe"}, s12=skip, s13=skip)
    rows = [row for step in range(8, 12) for row in step_rows(step, peak={place: 50_000 / 8.0 ** (11 - step)})]
    rows += [row for step in (12, 13) for row in step_rows(step, lost=after(3, "mlp"))]
    name = write(run, rows)
    event = {"kind": "skip", "skip_kind": "forward", "module": "model.layers.2.mlp.down_proj", "file": name}
    write_events(
        run, event | {"step": 12}, event | {"step": 13}, {"step": 13, "kind": "diverged", "reason": "2 in a row"}
    )
    write_summary(run, status="diverged", step=14, reason="2 in a row")
    return run


def line(text: str, label: str) -> str:
    found = [words for words in text.splitlines() if words.startswith(label)]
    assert len(found) == 1, text
    return found[0]


def test_a_forward_overflow_is_told_with_module_place_growth_and_spread(overflow):
    text = explain(overflow)
    assert text.splitlines()[0] == "run: diverged at step 14: 2 in a row."
    assert "model.layers.2.mlp.down_proj (layer 3, MLP)" in line(text, "First: step 12 was skipped")
    assert "at step 12" in line(text, "Where:")
    assert line(text, "Where:").endswith("that of layer 3, MLP: the module's output (before any output norm).")
    before = line(text, "Before:")
    assert "50,000 (0.4 bits below 65504) at step 11, so that it passed 65504, 1.31 times as much, within one" in before
    assert "At step 8 it was 97.7 (9.4 bits below 65504): a factor of 512 in 3 steps, 8 a step." in before
    spread = line(text, "Spread:")
    assert "at steps 12 to 13: layer 3 and every layer after it, to 4" in spread and "At most 2 of 4 layers" in spread
    assert "1 of 25 recorded places grew 10-fold or more, in layer 3." in line(text, "Growth from step 8 to step 11")
    assert "step 13: skipped for forward overflow" in line(text, "Then:")
    assert "1 skipped step (step 0)" in line(text, "Not counted:")
    assert "Not known" not in text


def test_the_spread_from_layer_to_layer_is_told_by_steps(tmp_path):
    run = tmp_path / "run"
    rows = [*step_rows(5), *step_rows(6, lost=after(4, "mlp")), *step_rows(7, lost=after(2, "attn"))]
    name = write(run, rows)
    write_events(run, {"step": 6, "kind": "skip", "skip_kind": "forward", "file": name})
    spread = line(explain(run), "Spread:")
    assert "at step 6: layer 4 (the last); at step 7: layer 2 and every layer after it, to 4." in spread


def test_a_backward_overflow_is_told_apart_and_traced_from_the_last_layer_on(tmp_path):
    run = tmp_path / "run"
    gradient = {(1, "attn"): math.inf, (1, "mlp"): math.inf, (2, "attn"): math.nan, (4, "mlp"): 60.0}
    name = write(
        run, [*step_rows(8), *step_rows(9), *step_rows(10, gradient=gradient, peak={(2, "mlp", "stream"): 350.0})]
    )
    write_events(run, {"step": 10, "kind": "skip", "skip_kind": "backward", "file": name})
    write_metrics(run, 12, s10={"grad_norm": None, "skip_kind": "backward"})
    text = explain(run)
    assert "a gradient was not finite" in line(text, "First:")
    forward = line(text, "Forward:")
    assert "every recorded value was finite" in forward and "layer 2, MLP" in forward and "350" in forward
    assert "in layers 1 to 2;" in line(text, "Gradient:") and "reached layer 2, attention first" in line(
        text, "Gradient:"
    )
    grown = line(text, "Gradient norm at step 10")
    assert "layer 4, MLP, from 0.1 (median of the recorded steps before) to 60, a factor of 600" in grown
    assert "Where:" not in text and "Spread:" not in text


def test_a_spike_names_the_layer_whose_gradient_grew(tmp_path):
    run = tmp_path / "run"
    name = write(run, [*step_rows(1), *step_rows(2), *step_rows(3, gradient={(2, "mlp"): 5.0})])
    write_events(run, {"step": 3, "kind": "spike", "reason": "gradient norm 5", "file": name})
    text = explain(run)
    assert line(text, "First:") == "First: a gradient spike at step 3: gradient norm 5."
    assert "layer 2, MLP" in line(text, "Gradient norm at step 3") and "in 1 of 4 layers" in text


def test_without_a_flight_record_the_layer_statistics_are_read_and_the_gap_is_told(tmp_path):
    run = tmp_path / "run"
    write_metrics(run, 70, s64={"loss": None, "skip_kind": "forward"})
    write(run, step_rows(0), "layers")
    write(run, step_rows(50, peak={(2, "attn", "residual_add"): 900.0}), "layers")
    write_summary(run, status="diverged", step=65, reason="gone")
    text = explain(run)
    assert "which module it was is not known" in line(text, "Where:")
    assert "layers/ has no statistics of step 64 (the last before it is step 50)" in line(text, "Not known:")
    assert "layer 2, attention: the residual sum, to 900" in line(text, "Growth from step 0 to step 50")


def test_statistics_long_before_are_no_growth_within_a_step(tmp_path):
    run = tmp_path / "run"
    place = (2, "mlp", "branch")
    write(run, [*step_rows(50, peak={place: 100.0}), *step_rows(64, lost=after(2, "mlp"))], "layers")
    write_metrics(run, 65, s64={"loss": None, "skip_kind": "forward"})
    before = line(explain(run), "Before:")
    assert "the 13 steps between are not recorded" in before and "within one step" not in before


def test_a_rising_loss_is_told_with_its_turn(tmp_path):
    run = tmp_path / "run"
    write_metrics(run, 80, **{f"s{i}": {"loss": 5.0 + 0.1 * (i - 40)} for i in range(40, 80)})
    write_summary(run, status="diverged", step=80, reason="the mean loss rose")
    text = explain(run)
    assert "its mean over 16 steps was lowest" in line(text, "The loss:")
    assert "stopped as diverged after step 79: the mean loss rose" in line(text, "First:")
    assert "there are no layer statistics" in line(text, "Not known:")


def test_old_records_without_spikes_are_searched_for_them(tmp_path):
    run = tmp_path / "run"
    write_metrics(run, 60)
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    for record in lines:
        del record["spike"]
        record["grad_norm"] = 30.0 if record["step"] == 41 else 1.0 + 0.01 * (record["step"] % 5)
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "a gradient spike at step 41" in line(explain(run), "First:")


def test_a_calm_run_is_called_calm(tmp_path):
    run = tmp_path / "run"
    write_metrics(run, 20, s1={"skip_kind": "probe"})
    assert "The records show no incident" in explain(run)


def test_an_empty_or_missing_folder_is_an_error_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="nowhere is missing"):
        explain(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a run folder"):
        explain(tmp_path)
    write_metrics(tmp_path / "run", 3)
    (tmp_path / "run" / "layers").mkdir()
    (tmp_path / "run" / "layers" / "step_00000000.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"cannot read .*step_00000000"):
        explain(tmp_path / "run")


def test_a_line_cut_by_a_crash_ends_the_events(overflow):
    whole = explain(overflow)
    with open(overflow / "flight" / "events.jsonl", "a") as file:
        file.write('{"step": 14, "ki')
    assert explain(overflow) == whole


def test_the_command_tells_the_same(overflow, capsys):
    from periln.eval.arguments.stability import parse
    from periln.eval.stability.command import main

    main(parse(["--explain", str(overflow)]))
    assert capsys.readouterr().out.strip() == explain(overflow)
