"""Sweeps: what the cells are, how they are run, and what the tables say of them."""

import json
import math
import shlex
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from tiny import MODEL, make_data

from periln.runkit import placements
from periln.runkit.errors import StoppedBySignal, UsageError, UserError, run_command
from periln.runkit.folder import RunFolder
from periln.runkit.process import StopRequest
from periln.runkit.recipes import dump_yaml, read_yaml
from periln.scripts.arguments.sweep import parse
from periln.scripts.sweep import command as command
from periln.scripts.sweep.cells import Sweep, load_sweep
from periln.scripts.sweep.run import Way, run_sweep
from periln.scripts.sweep.table import best_rates, describe_best, frame_of, markdown, summarize, write_tables

SHIPPED = Path(__file__).resolve().parents[2] / "scripts" / "recipes" / "sweeps"
BASE = {
    "name": "base",
    "data": "none",
    "model": MODEL | {"vocab_size": 300},
    "steps": 100,
    "batch_size": 4,
    "sequence_length": 32,
}
GRID = {"model.norm_placement": ["pre", "peri"], "optimizer.learning_rate": [1e-3, 2e-3], "seed": [1, 2]}


def write_sweep(folder: Path, grid: dict, **more) -> Path:
    (folder / "base.yaml").write_text(dump_yaml(BASE))
    file = folder / "sweep.yaml"
    file.write_text(dump_yaml({"base": "base.yaml", "name": "s", **more, "grid": grid}))
    return file


def make_sweep(folder: Path, grid: dict, **more) -> Sweep:
    return load_sweep(write_sweep(folder, grid, **more), folder / "runs")


# --- cells ---------------------------------------------------------------------------------------------------


def test_every_combination_is_a_cell_with_a_recipe_file(tmp_path):
    sweep = make_sweep(tmp_path, GRID, steps=50)
    names = [cell.name for cell in sweep.cells]
    assert len(set(names)) == 8 and names[:3] == ["pre_lr0.001_seed1", "pre_lr0.001_seed2", "pre_lr0.002_seed1"]
    cell = sweep.cells[6]
    assert (cell.recipe.model["norm_placement"], cell.recipe.seed, cell.recipe.steps) == ("peri", 1, 50)
    assert cell.recipe.optimizer.learning_rate == 2e-3 and cell.recipe.model["hidden_size"] == MODEL["hidden_size"]
    sweep.write_recipes()
    written = read_yaml(tmp_path / "runs" / "s" / "recipes" / f"{cell.name}.yaml")
    assert written["name"] == cell.name and written["optimizer"]["learning_rate"] == 2e-3
    assert "grid" not in written and "base" not in written


def test_a_grid_value_may_be_a_section(tmp_path):
    values = [{"norm_placement": "peri"}, {"norm_placement": "output", "qk_norm": "full"}]
    sweep = make_sweep(tmp_path, {"model": values, "activation_checkpointing": [True, False]})
    cell = sweep.cells[2]
    assert cell.name == "output-full_activation_checkpointingtrue" and cell.placement == "output"
    assert cell.recipe.model_config().qk_norm == "full" and cell.recipe.model["hidden_size"] == MODEL["hidden_size"]


def test_a_sweep_may_grow_but_not_change(tmp_path):
    make_sweep(tmp_path, {"seed": [1]}, steps=9).write_recipes()
    make_sweep(tmp_path, {"seed": [1]}).write_recipes()  # nothing had begun
    sweep = make_sweep(tmp_path, {"seed": [1, 2]})
    sweep.write_recipes()
    pretend(sweep.cells[1], "interrupted", 3.0)
    with pytest.raises(UserError, match=r"belongs to another sweep \(seed1: steps: 100 -> 7\)"):
        make_sweep(tmp_path, {"seed": [3, 1]}, steps=7).write_recipes()
    recipes = tmp_path / "runs" / "s" / "recipes"
    assert sorted(p.stem for p in recipes.iterdir()) == ["seed1", "seed2"]


def test_what_does_not_decide_a_cell_may_change_and_is_told_once(tmp_path):
    sweep, told = make_sweep(tmp_path, {"seed": [1, 2]}), []
    sweep.write_recipes()
    pretend(sweep.cells[0], "interrupted", 3.0)
    old = read_yaml(sweep.recipe_file(sweep.cells[0]))
    del old["flight"]  # of a version that had none
    sweep.recipe_file(sweep.cells[0]).write_text(dump_yaml(old))
    make_sweep(tmp_path, {"seed": [1, 2]}, data="moved/none", keep_last=5).write_recipes(told.append)
    assert [line.partition(": ")[2] for line in told] == [
        "data: 'none' -> 'moved/none' (only the place differs)",
        "keep_last: 2 -> 5 (this does not decide the result)",
    ]
    new = read_yaml(sweep.recipe_file(sweep.cells[0]))
    assert (new["data"], new["keep_last"], new["flight"]) == ("moved/none", 5, {"steps": 16, "files": 32})


def test_no_cell_is_run_and_no_folder_made_where_the_data_are_missing_or_others(tmp_path, capsys):
    file = write_sweep(tmp_path, {"seed": [1, 2]}, data=str(tmp_path / "nowhere"))
    words = ["run", str(file), "--runs", str(tmp_path / "runs")]
    assert run_command(command.main, parse(words)) == 2
    assert "cell seed1: data: " in capsys.readouterr().err and not (tmp_path / "runs").exists()
    sweep = make_sweep(tmp_path, {"seed": [1, 2]}, data=str(make_data(tmp_path)), model={"vocab_size": 300})
    sweep.check_data()
    sweep.cells[1].run.claim({"data_fingerprint": "0123456789"})
    pretend(sweep.cells[1], "completed", 3.0)
    with pytest.raises(UserError, match=r"cell seed2: .*/data holds other data \(.*\) than the cell began with"):
        sweep.check_data()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "a sweep needs a grid"),
        ({"sed": [1]}, r"unknown field sed \(did you mean 'seed'\?\)"),
        ({"optimizer.learning_rat": [1]}, r"unknown field optimizer\.learning_rat \(did you mean 'learning_rate'"),
        ({"seed": 1}, r"grid\.seed must be a list of values, not 1"),
        ({"seed": [1, 2, 1]}, r"grid\.seed has the value 1 twice"),
        ({"name": ["a"]}, r"grid\.name cannot be varied"),
        ({"optimizer.warmup": [0.1, 1.5]}, r"cell warmup1\.5: optimizer\.warmup is a share of the steps"),
        ({"model.norm_placement": ["peri", "perry"]}, "cell perry: model: .*did you mean 'peri'"),
        ({"steps": ["ten"]}, r"cell stepsten: steps must be int, not 'ten'"),
    ],
)
def test_a_mistake_in_the_grid_is_found_before_any_cell_is_run(tmp_path, grid, message):
    with pytest.raises(UsageError, match=message):
        make_sweep(tmp_path, grid)


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_sweeps_load(file):
    sweep = load_sweep(file)
    assert len(sweep.cells) == math.prod(len(values) for values in sweep.grid.values())


def test_the_papers_exploration_is_the_papers():
    sweep = load_sweep(SHIPPED / "paper-400m.yaml")
    rates = sweep.grid["optimizer.learning_rate"]
    assert (min(rates), max(rates), sweep.grid["seed"]) == (1e-4, 5e-3, [1, 2, 3, 4, 5]) and 2e-3 in rates
    assert {cell.recipe.steps for cell in sweep.cells} == {14400}
    assert "GPU-hours" in command.describe_plan(sweep)


# --- running, with a trainer that only pretends --------------------------------------------------------------

PRETENDER = """
import json, pathlib, signal, sys, time
recipe, runs = (pathlib.Path(sys.argv[sys.argv.index(w) + 1]) for w in ("--config", "--runs"))
folder = runs / recipe.stem
folder.mkdir(exist_ok=True)
with open(folder / "calls", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
calls = len((folder / "calls").read_text().splitlines())

def finish(status, code=0):
    (folder / "summary.json").write_text(json.dumps({"status": status, "reason": f"exit {code}" if code else None}))
    sys.exit(code)

signal.signal(signal.SIGTERM, lambda *_: finish("interrupted", 143))
signal.signal(signal.SIGINT, lambda *_: finish("interrupted", 130))
seed = recipe.stem.removeprefix("seed")
if seed == "2":
    finish("diverged")
if seed == "3" and calls < 3:
    print("error: the disk is full") if calls == 1 else None
    finish("failed", 1)
if seed == "4":
    print("error: no such field")
    sys.exit(2)
if seed == "5" and calls == 1:
    (folder / "started").write_text("")
    time.sleep(60)
finish("completed")
"""


def pretending(folder: Path, **way) -> Way:
    (folder / "pretender.py").write_text(PRETENDER)
    return Way(launch=shlex.join([sys.executable, str(folder / "pretender.py")]), **way)


def calls(sweep: Sweep) -> list[int]:
    files = [cell.run.path / "calls" for cell in sweep.cells]
    return [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]


def test_finished_cells_are_skipped_failed_ones_tried_again_and_diverged_ones_kept(tmp_path):
    sweep, told = make_sweep(tmp_path, {"seed": [1, 2, 3]}), []
    run_sweep(sweep, pretending(tmp_path, jobs=2, threads=1, retries=2), StopRequest(), told.append)
    assert [cell.state for cell in sweep.cells] == ["completed", "diverged", "completed"]
    assert calls(sweep) == [1, 1, 3]
    assert "seed3 failed: the disk is full (will be tried again)" in told
    assert "seed3 failed: exit code 1 (will be tried again)" in told  # not the error of the attempt before
    run_sweep(sweep, pretending(tmp_path), StopRequest(), told.append)
    assert calls(sweep) == [1, 1, 3] and told[-1] == "3 of 3 cells are finished already"


def test_a_cell_that_fails_for_good_does_not_stop_the_others(tmp_path):
    sweep, told = make_sweep(tmp_path, {"seed": [4, 3, 1]}), []
    with pytest.raises(UserError, match="2 of 3 cells failed; seed4: no such field"):
        run_sweep(sweep, pretending(tmp_path, retries=1), StopRequest(), told.append)
    assert calls(sweep) == [1, 2, 1]  # a mistake of usage is not tried again
    assert [cell.state for cell in sweep.cells] == ["waiting", "failed", "completed"]


@pytest.mark.parametrize("code", [130, 143])
def test_a_stop_is_handed_on_and_the_same_command_goes_on(tmp_path, code):
    sweep, stop = make_sweep(tmp_path, {"seed": [5, 1]}), StopRequest()

    def ask():
        deadline = time.monotonic() + 30
        while not (sweep.cells[0].run.path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        stop.exit_code = code

    threading.Thread(target=ask).start()
    with pytest.raises(StoppedBySignal, match="with 0 of 2 cells finished") as stopped:
        run_sweep(sweep, pretending(tmp_path), stop, lambda text: None)
    assert stopped.value.exit_code == code
    assert [cell.state for cell in sweep.cells] == ["interrupted", "waiting"]
    assert sweep.cells[0].run.summary["reason"] == f"exit {code}"  # by the same signal
    run_sweep(sweep, pretending(tmp_path), StopRequest(), lambda text: None)
    assert [cell.state for cell in sweep.cells] == ["completed", "completed"] and calls(sweep) == [2, 1]


def test_one_sweep_is_run_by_one_process_at_a_time(tmp_path):
    sweep = make_sweep(tmp_path, {"seed": [1]})
    with RunFolder(sweep.path).locked(), pytest.raises(UserError, match="is in use by process"):
        run_sweep(sweep, pretending(tmp_path), StopRequest())


def test_a_run_whose_trainer_is_gone_is_called_stopped(tmp_path):
    cell = make_sweep(tmp_path, {"seed": [1]}).cells[0]
    assert cell.state == "waiting"
    with cell.run.locked():
        cell.run.set_status("running", step=3)
        assert cell.state == "running"
    assert cell.state == "stopped"


# --- tables, from runs that never were -----------------------------------------------------------------------


def pretend(cell, status: str, loss: float, spikes: tuple[int, ...] = (), steps: int = 100, skips: int = 0) -> None:
    """A run folder: constant loss but for a bad beginning, and a gradient norm with spikes."""
    cell.run.path.mkdir(parents=True, exist_ok=True)
    with open(cell.run.metrics_path, "w") as file:
        for step in range(steps):
            norm = 50.0 if step in spikes else 1.0 + 0.01 * (step % 3)
            record = {"step": step, "loss": loss if step >= steps // 2 else 9.0, "grad_norm": norm}
            file.write(json.dumps(record | {"skips_total": skips, "loss_scale": 1.0}) + "\n")
    cell.run.set_status(status, step=steps, reason="it rose" if status == "diverged" else None)


@pytest.fixture
def swept(tmp_path) -> Sweep:
    """Two placements, three rates, two seeds: pre diverges at the highest rate, one cell is not finished."""
    grid = GRID | {"optimizer.learning_rate": [1e-3, 2e-3, 4e-3]}
    sweep = make_sweep(tmp_path, grid, steps=400)
    losses = {("pre", 1e-3): 3.4, ("pre", 2e-3): 3.2, ("peri", 1e-3): 3.3, ("peri", 2e-3): 3.1, ("peri", 4e-3): 3.0}
    for cell in sweep.cells:
        key = (cell.placement, cell.recipe.optimizer.learning_rate)
        loss = losses.get(key, 3.0) + 0.1 * (cell.recipe.seed - 1)
        if key == ("pre", 4e-3):
            pretend(cell, "diverged", 2.0, spikes=(30, 60), steps=80 + cell.recipe.seed, skips=5)
        elif key == ("peri", 2e-3) and cell.recipe.seed == 2:
            pretend(cell, "interrupted", 1.0, steps=20)
        else:
            pretend(cell, "completed", loss, spikes=(20, 200) if cell.placement == "pre" else (), steps=400, skips=2)
    return sweep


def test_the_table_counts_spikes_skips_and_divergence(swept):
    frame = frame_of(swept).set_index("cell")
    row = frame.loc["pre_lr0.002_seed2"]
    assert row.final_loss == pytest.approx(3.3) and (row.spikes, row.spikes_first_tenth, row.skipped_steps) == (2, 1, 2)
    lost = frame.loc["pre_lr0.004_seed1"]
    assert (lost.status, lost.diverged_at, lost.spikes, lost.spikes_first_tenth) == ("diverged", 81, 2, 1)
    assert lost.reason == "it rose"

    summary = summarize(swept, frame_of(swept)).set_index(["placement", "learning_rate"])
    best = summary.loc[("pre", 2e-3)]
    assert best.final_loss == pytest.approx(3.25) and best.deviation == pytest.approx(0.1 / math.sqrt(2))
    gone = summary.loc[("pre", 4e-3)]
    assert math.isnan(gone.final_loss) and gone.diverged == 2 and gone.diverged_at == [81, 82]

    text = markdown(swept, frame_of(swept), summarize(swept, frame_of(swept)))
    assert "| pre | 0.002 | 2 of 2 | 3.2500 ± 0.0707 | 2 | 1 | 2 | 0 |" in text
    assert "| pre | 0.004 | 2 of 2 |  |  |  |  | 2 (81, 82) |" in text
    assert "| peri | 0.002 | 1 of 2 | 3.1000 | 0 |" in text
    assert "Not finished: peri_lr0.002_seed2 (interrupted)." in text


def test_the_table_is_written_as_csv_markdown_and_png(swept):
    write_tables(swept, tell=lambda text: None)
    read = pd.read_csv(swept.path / "table.csv")
    assert len(read) == 12 and set(read.status) == {"completed", "diverged", "interrupted"}
    assert (swept.path / "table.md").read_text().startswith("# s\n")
    png = (swept.path / "table.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 20_000
    write_tables(swept, tell=lambda text: None)
    assert (swept.path / "table.png").read_bytes() == png  # a function of the records alone


def test_colours_and_markers_are_those_of_the_report():
    selection = pytest.importorskip("periln.eval.figures.selection")
    assert (selection.colour_of, selection.marker_of) == (placements.colour_of, placements.marker_of)
    assert len(set(placements.COLOURS.values())) == len(set(placements.MARKERS.values())) == len(placements.COLOURS)


def test_other_fields_have_panels_and_columns_of_their_own(tmp_path):
    sweep = make_sweep(tmp_path, {"model.norm_placement": ["peri"], "optimizer.warmup": [0.1, 0.3], "seed": [1]})
    for cell, loss in zip(sweep.cells, (3.0, 2.5), strict=True):
        pretend(cell, "completed", loss)
    frame = write_tables(sweep, tell=lambda text: None)
    assert list(summarize(sweep, frame).warmup) == [0.1, 0.3]
    assert "| peri | 0.3 | 0.002 | 1 of 1 | 2.5000 |" in (sweep.path / "table.md").read_text()


def test_a_varied_number_of_steps_is_not_mistaken_for_the_recorded_one(tmp_path):
    sweep = make_sweep(tmp_path, {"steps": [20, 40], "seed": [1, 2]})
    for cell, steps in zip(sweep.cells, (20, 9, 40, 40), strict=True):
        pretend(cell, "completed" if steps > 9 else "failed", 3.0, steps=steps)
    summary = summarize(sweep, frame_of(sweep))
    assert [(r.steps, r.runs, r.completed) for r in summary.itertuples()] == [("20", 2, 1), ("40", 2, 2)]


def test_the_best_rate_has_the_lowest_final_loss_at_one_seed_among_runs_that_did_not_diverge(swept):
    best = {row["placement"]: row for row in best_rates(swept)}
    assert (best["pre"]["learning_rate"], best["pre"]["seed"], best["pre"]["diverged"]) == (2e-3, 1, 1)
    assert not best["pre"]["at_edge"]
    assert best["peri"]["learning_rate"] == 4e-3 and best["peri"]["at_edge"]
    assert best_rates(swept, seed=2)[1]["not_finished"] == 1
    words = describe_best(best_rates(swept))
    assert "pre: learning rate 0.002, final loss 3.2000 (seed 1; 3 rates; 1 diverged)" in words
    assert "at the edge of the grid: widen it" in words
    with pytest.raises(UsageError, match="--seed 7 is none of the sweep's: 1, 2"):
        best_rates(swept, seed=7)


def test_status_says_where_each_cell_is(swept):
    text = command.describe_status(swept)
    assert "12 cells: 9 completed, 2 diverged, 1 interrupted" in text
    line = next(line for line in text.splitlines() if line.startswith("pre_lr0.004_seed1"))
    assert line.split() == ["pre_lr0.004_seed1", "diverged", "81/400", "2.0000", "5", "it", "rose"]


# --- the whole of it -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_trains_its_cells_and_tells_of_them(tmp_path, capsys):
    data = make_data(tmp_path)
    grid = {"model.norm_placement": ["pre", "peri"], "seed": [1]}
    file = write_sweep(tmp_path, grid, data=str(data), steps=4, device="cpu", checkpoint_every=2)
    words = [str(file), "--runs", str(tmp_path / "runs"), "--threads", "1"]
    command.main(parse(["run", *words, "--jobs", "2", "--retries", "0"]))
    command.main(parse(["table", *words]))
    command.main(parse(["table", *words, "--best"]))
    shown = capsys.readouterr().out
    assert "[2/2]" in shown and "| peri | 0.002 | 1 of 1 |" in shown and "peri: learning rate 0.002" in shown
    sweep = load_sweep(file, tmp_path / "runs")
    assert [(cell.state, len(cell.run.metrics())) for cell in sweep.cells] == [("completed", 4)] * 2
    before = [cell.run.metrics_path.stat().st_mtime_ns for cell in sweep.cells]
    command.main(parse(["run", *words]))
    assert "2 of 2 cells are finished already" in capsys.readouterr().out
    assert [cell.run.metrics_path.stat().st_mtime_ns for cell in sweep.cells] == before
