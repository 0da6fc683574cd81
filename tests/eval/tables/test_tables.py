"""Tests of the tables: every number against one worked out by hand."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from synthetic_runs import write_demo, write_layers, write_run, write_scores, write_sft

from periln.eval.records.derived import final_loss, largest, spikes
from periln.eval.records.frames import Frames, load
from periln.eval.tables.report_tables import build, cell_numbers, suites
from periln.eval.tables.run_stability import stability
from periln.eval.text_table import to_html, to_markdown, to_terminal
from periln.runkit.number_format import FP16
from periln.runkit.placements import PLACEMENTS, placement_name
from periln.runkit.tasks import SUITES

TASKS = list(SUITES["mini"])


def row(frames: Frames, placement: str, rate: float = 0.002, suite: str = "mini") -> dict[str, str]:
    text = build(frames, suite).text
    return text[(text.block == f"learning rate {rate:g}") & (text.placement == placement)].iloc[0].to_dict()


@pytest.fixture
def two_seeds(tmp_path: Path) -> Path:
    write_scores(write_run(tmp_path, "pre", seed=1), [0.25, 0.25, 0.50, 0.30, 0.50], loss=4.0)
    write_scores(write_run(tmp_path, "pre", seed=2), [0.35, 0.25, 0.60, 0.40, 0.50], loss=4.2)
    return tmp_path


# --- Table 2 -------------------------------------------------------------------------------------------------


def test_cells_are_mean_and_sample_deviation_over_seeds(two_seeds):
    shown = row(load(two_seeds), "pre")
    assert shown["mini_arc_easy"] == "30.0 ± 7.1"  # 10 / sqrt(2); the population's would be 5.0
    assert shown["mini_hellaswag"] == "25.0 ± 0.0"
    assert shown["mini_piqa"] == "55.0 ± 7.1"
    assert shown["held-out loss"] == "4.100 ± 0.141"
    assert shown["bits per byte"] == "2.050 ± 0.071"
    assert shown["seeds survived"] == "2/2"


def test_the_right_answers_bits_a_byte_stand_beside_the_scores(tmp_path):
    for seed, bits in ((1, [1.0, 2.0, 3.0, 4.0, 5.0]), (2, [2.0, 3.0, 4.0, 5.0, 6.0])):
        write_scores(write_run(tmp_path, "pre", seed=seed), [0.25] * 5, loss=4.0, gold=bits)
    assert row(load(tmp_path), "pre")["gold bits per byte"] == "3.500 ± 0.707"
    write_scores(tmp_path / "pre_lr0.002_seed2", [0.25] * 5, gold=[2.0])  # of one task alone: no mean
    assert row(load(tmp_path), "pre")["gold bits per byte"] == "3.000 (n=1)"


def test_average_is_the_plain_mean_of_the_five_task_means(two_seeds):
    assert row(load(two_seeds), "pre")["Avg."] == "39.0"  # (30 + 25 + 55 + 35 + 50) / 5


def test_a_diverged_seed_does_not_count_even_if_it_was_evaluated(two_seeds):
    write_scores(write_run(two_seeds, "pre", seed=3, diverges_at=90), [0.9] * 5, loss=9.0)
    shown = row(load(two_seeds), "pre")
    assert shown["mini_arc_easy"] == "30.0 ± 7.1"
    assert shown["seeds survived"] == "2/3"


def test_a_single_survivor_has_no_deviation(tmp_path):
    write_scores(write_run(tmp_path, "post", seed=1), [0.25, 0.25, 0.50, 0.30, 0.50], loss=4.0)
    write_run(tmp_path, "post", seed=2, diverges_at=90)
    shown = row(load(tmp_path), "post")
    assert shown["mini_arc_easy"] == "25.0 (n=1)"
    assert shown["held-out loss"] == "4.000 (n=1)"
    assert shown["seeds survived"] == "1/2"


def test_without_a_survivor_the_row_says_diverged(tmp_path):
    write_run(tmp_path, "post", seed=1, diverges_at=90)
    shown = row(load(tmp_path), "post")
    assert {shown[c] for c in (*TASKS, "Avg.", "held-out loss")} == {"Diverged"}
    assert shown["SFT Avg."] == "N/A"
    assert shown["seeds survived"] == "0/1"


def test_what_is_missing_is_not_filled_in(two_seeds):
    write_run(two_seeds, "peri")
    shown = row(load(two_seeds), "peri")
    assert {shown[c] for c in (*TASKS, "Avg.", "held-out loss", "SFT Avg.")} == {"n/a"}
    file = two_seeds / "pre_lr0.002_seed1" / "eval" / "benchmarks-mini.json"
    record = json.loads(file.read_text())
    record["results"] = [r for r in record["results"] if r["task"] != "mini_piqa"]
    file.write_text(json.dumps(record))
    shown = row(load(two_seeds), "pre")
    assert shown["mini_piqa"] == "60.0 (n=1)"


def test_learning_rates_are_not_mixed(two_seeds):
    write_scores(write_run(two_seeds, "pre", learning_rate=0.02), [0.75] * 5)
    frames = load(two_seeds)
    assert row(frames, "pre")["mini_arc_easy"] == "30.0 ± 7.1"
    assert row(frames, "pre", 0.02)["mini_arc_easy"] == "75.0 (n=1)"
    assert [name for name, _ in build(frames, "mini").blocks] == [
        "learning rate 0.002",
        "learning rate 0.02",
        "for comparison",
    ]


def test_sft_average_comes_from_the_runs_inside(two_seeds):
    write_sft(two_seeds / "pre_lr0.002_seed1", [0.30] * 5)
    assert row(load(two_seeds), "pre")["SFT Avg."] == "30.0 (n=1)"
    write_sft(two_seeds / "pre_lr0.002_seed2", [0.40, 0.40, 0.40, 0.40, 0.90])
    shown = row(load(two_seeds), "pre")
    assert shown["SFT Avg."] == "40.0"  # (35 * 4 + 60) / 5
    assert shown["Avg."] == "39.0"


def test_numbers_beside_the_text(two_seeds):
    numbers = cell_numbers(load(two_seeds), "mini").set_index("column")
    assert numbers.loc["mini_arc_easy", "mean"] == pytest.approx(30)
    assert numbers.loc["mini_arc_easy", "std"] == pytest.approx(math.sqrt(50))
    assert numbers.loc["mini_arc_easy", "n"] == 2
    assert set(build(load(two_seeds), "mini").numbers.columns) >= {"learning_rate", "placement", "column", "mean"}


def test_columns_have_the_names_of_the_tasks_and_chance_stands_below(two_seeds):
    table = build(load(two_seeds), "mini")
    assert list(table.text.columns[2:7]) == TASKS
    chance = table.text[table.text.placement == "chance"].iloc[0]
    assert [chance[t] for t in TASKS] == ["25.0", "25.0", "50.0", "33.3", "50.0"]
    assert "limit" not in table.text


def test_a_limit_stands_in_the_title_and_different_ones_are_noted(tmp_path):
    write_scores(write_run(tmp_path, "pre"), [0.25] * 5, limit=20)
    assert to_terminal(build(load(tmp_path), "mini")).startswith("Scores, suite mini, limit 20 items a task\n")
    write_scores(write_run(tmp_path, "pre", seed=2), [0.25] * 5)
    table = build(load(tmp_path), "mini")
    assert table.title == "Scores, suite mini, limits differ (20; none)"
    assert "Different limits (items a task): 20 (pre seed 1), none (pre seed 2)." in table.notes


def test_an_unfinished_run_is_named(two_seeds):
    (two_seeds / "pre_lr0.002_seed2" / "summary.json").write_text('{"status": "running", "step": 120}')
    shown = row(load(two_seeds), "pre")
    assert shown["seeds survived"] == "1/2 (1 running)"
    assert shown["mini_arc_easy"] == "25.0 (n=1)"
    (two_seeds / "pre_lr0.002_seed2" / "summary.json").unlink()
    assert row(load(two_seeds), "pre")["seeds survived"] == "1/2 (1 not recorded)"


def test_other_differences_between_recipes_are_noted(two_seeds):
    assert len(build(load(two_seeds), "mini").notes) == 1
    file = two_seeds / "pre_lr0.002_seed2" / "recipe.yaml"
    file.write_text(file.read_text().replace("steps: 200", "steps: 400"))
    notes = build(load(two_seeds), "mini").notes
    assert any(note.endswith("and seed: steps.") for note in notes)
    assert "Scored before the end of the run" not in " ".join(notes)


def test_the_newest_of_two_results_counts(two_seeds):
    run = two_seeds / "pre_lr0.002_seed1"
    (run / "eval" / "benchmarks-mini.json").rename(run / "eval" / "a.json")
    write_scores(run, [0.35] * 5)
    assert row(load(two_seeds), "pre")["mini_arc_easy"] == "35.0 ± 0.0"


def test_suites_are_those_that_were_evaluated(two_seeds, tmp_path):
    assert suites(load(two_seeds)) == ["mini"]
    (two_seeds / "recipe.yaml").write_text("stage: demo\nevaluation: {suite: hub, limit: 100}\n")
    for file in two_seeds.glob("*/eval/*.json"):
        file.unlink()
    assert suites(load(two_seeds)) == ["hub"]
    assert "arc_easy" in build(load(two_seeds), "hub").text


# --- stability -----------------------------------------------------------------------------------------------


def metrics_of(norms: list[float | None], losses: list[float | None] | None = None) -> pd.DataFrame:
    losses = losses or [1.0] * len(norms)
    steps = [float(step) for step in range(len(norms))]
    return pd.DataFrame({"step": steps, "grad_norm": norms, "loss": losses}).astype(float)


def test_a_spike_exceeds_mean_and_six_deviations_of_the_steps_before():
    norms = [1.0, 3.0] * 10  # mean 2, deviation 1: 8 is the edge
    assert spikes(metrics_of([*norms, 8.0])) == []
    assert spikes(metrics_of([*norms, 8.01])) == [20]


def test_a_spike_needs_sixteen_steps_before_it():
    assert spikes(metrics_of([1.0] * 15 + [100.0])) == []
    assert spikes(metrics_of([1.0] * 16 + [100.0])) == [16]


def test_the_window_has_128_steps_and_skips_what_is_not_finite():
    calm = [1.0, 3.0] * 64
    assert spikes(metrics_of([500.0] * 20 + calm + [9.0])) == [148]
    assert spikes(metrics_of([500.0, *calm[:-1], 9.0])) == []
    assert spikes(metrics_of([1.0, None] * 16 + [100.0])) == [32]


def test_final_loss_is_the_mean_of_finite_losses_in_the_last_tenth():
    losses = [9.0] * 27 + [1.0, 2.0, None]
    assert final_loss(metrics_of([1.0] * 30, losses)) == pytest.approx(1.5)
    assert math.isnan(final_loss(metrics_of([1.0] * 3, [1.0, 1.0, None])))


def test_headroom_in_bits():
    assert FP16.headroom(65504) == 0
    assert FP16.headroom(65504 / 1024) == pytest.approx(10)
    assert FP16.headroom(math.inf) == FP16.headroom(math.nan) == -math.inf


def test_largest_takes_what_is_not_finite_for_the_largest():
    layers = pd.DataFrame(
        {"tensor": "stream", "stat": "max_abs", "value": [5.0, math.nan, 70000.0], "layer": [1, 2, 3]}
    )
    assert largest(layers, ["stream"]).layer == 2
    assert largest(layers, ["branch"]) is None


def test_stability_row(tmp_path):
    write_run(tmp_path, "post", seed=1, diverges_at=90)
    shown = stability(load(tmp_path)).text.iloc[0]
    assert shown["status"] == "diverged at step 90"
    assert shown["skipped steps"] == "6 (4 forward, 2 probe)"
    assert shown["least headroom, bits"].startswith("13.")
    assert "residual_add" in shown["least headroom, bits"]


def test_stability_of_a_run_that_overflowed_or_recorded_nothing(tmp_path):
    run = write_run(tmp_path, "pre", seed=1)
    for file in (run / "layers").iterdir():
        file.unlink()
    (run / "layers").rmdir()
    (run / "metrics.jsonl").unlink()
    shown = stability(load(tmp_path)).text.iloc[0]
    assert set(shown[["final loss", "gradient spikes", "skipped steps", "max |x|, stream"]]) == {"n/a"}
    write_layers(run, "pre", 0.002, 1, [0])
    file = run / "layers" / "step_00000000.parquet"
    frame = pd.read_parquet(file)
    frame.loc[(frame.layer == 3) & (frame.stat == "max_abs") & (frame.tensor == "branch"), "value"] = math.inf
    frame.to_parquet(file)
    assert stability(load(tmp_path)).text.iloc[0]["least headroom, bits"] == "overflow (branch, layer 3 attn, step 0)"


# --- several folders, several results --------------------------------------------------------------------------


def test_a_seed_that_stands_twice_counts_once(tmp_path):
    for folder, value in (("a", 0.2), ("b", 0.6)):
        write_scores(write_run(tmp_path / folder, "pre"), [value] * 5, loss=4.0)
    frames = load(tmp_path)
    assert row(frames, "pre")["mini_piqa"] == "20.0 (n=1)"
    said = " ".join(build(frames, "mini").notes)
    assert "occurs 2 times (a/pre_lr0.002_seed1, b/pre_lr0.002_seed1): only a/pre_lr0.002_seed1 counts." in said


def test_sizes_are_not_mixed(tmp_path):
    for folder, width, value in (("a", 64, 0.2), ("b", 128, 0.6)):
        run = write_run(tmp_path / folder, "pre")
        write_scores(run, [value] * 5)
        file = run / "recipe.yaml"
        file.write_text(file.read_text().replace("hidden_size: 64", f"hidden_size: {width}"))
    table = build(load(tmp_path), "mini")
    assert [name for name, _ in table.blocks[:2]] == [
        "8 layers, width 64, learning rate 0.002",
        "8 layers, width 128, learning rate 0.002",
    ]
    assert list(table.text.mini_piqa[:2]) == ["20.0 (n=1)", "60.0 (n=1)"]


def test_the_latest_checkpoint_counts_then_the_one_with_all_items(tmp_path):
    run = write_run(tmp_path, "pre")
    for name, step, value, limit in (("z", 100, 0.1, None), ("y", 200, 0.2, 20), ("a", 200, 0.3, None)):
        write_scores(run, [value] * 5, limit=limit)
        file = run / "eval" / "benchmarks-mini.json"
        record = json.loads(file.read_text())
        record["evaluated"]["path"] = f"checkpoints/step_{step:08d}"
        (run / "eval" / f"{name}.json").write_text(json.dumps(record))
        file.unlink()
    assert row(load(tmp_path), "pre")["mini_piqa"] == "30.0 (n=1)"
    for name in ("a", "y"):
        (run / "eval" / f"{name}.json").unlink()
    table = build(load(tmp_path), "mini")
    assert "Scored before the end of the run: pre seed 1." in table.notes


def test_the_names_of_placements_are_those_of_the_family():
    from modeling_periln import PLACEMENT_NAMES

    assert PLACEMENTS == PLACEMENT_NAMES


def test_the_suites_are_those_that_are_evaluated():
    from periln.eval import evaluate

    assert evaluate.SUITES == SUITES


# --- names and rendering -------------------------------------------------------------------------------------


def test_placements_of_ones_own_have_a_name():
    assert placement_name({"norm_placement": "peri"}) == "peri"
    own = {"norm_placement": {"input_norm": True, "s": 0.5}}
    assert placement_name(own) == "own: input_norm, s=0.5"
    assert placement_name({"layer_placements": ["post", "post", "pre"]}) == "2 post + 1 pre"


def test_terminal_text_keeps_to_the_width_and_repeats_row_names(tmp_path):
    frames = load(write_demo(tmp_path / "demo", limit=20))
    for table in (build(frames, "mini"), stability(frames)):
        lines = to_terminal(table, 80).splitlines()
        assert max(map(len, lines)) <= 80
        assert sum(line.startswith("placement") for line in lines) > 1
    assert "mini_piqa" in to_terminal(build(frames, "mini"), 80)


def test_markdown_and_html_hold_every_cell_escaped(two_seeds):
    table = build(load(two_seeds), "mini")
    table.text.loc[0, "placement"] = "<i>a|b"
    assert "| <i>a\\|b | 30.0 ± 7.1 |" in to_markdown(table)
    assert '<th scope="row">&lt;i&gt;a|b</th><td data-label="mini_arc_easy">30.0 ± 7.1</td>' in to_html(table)
    assert "<i>" not in to_html(table)
