"""Tests of the figures: the paper's by number, from runs of every shape, and what they say where records are absent."""

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from synthetic_bench import write_any, write_bench

from periln.eval.figures import __main__, depth, headroom, pieces, sweeps
from periln.eval.figures.catalogue import CATALOGUE
from periln.eval.figures.files import FigureFiles, all_figures, draw_files
from periln.eval.figures.layer_rows import layer_rows, source_words
from periln.eval.figures.measured_models import load_measured
from periln.eval.figures.pieces import NotRecorded
from periln.eval.figures.selection import best_rates, common_protocol, has_embedding_norm, sizes_of, view_of
from periln.eval.records.frames import load
from periln.eval.report.stability_section import bench
from periln.runkit import placements
from periln.runkit.errors import run_command

ROOT = Path(__file__).resolve().parents[3]
CURVES = ("3a", "8", "12", "13", "14")  # over learning rates; there must be three
PAPER = ["1", "3a", "3b", "3c", "4", "5", "6", "7a", "7b", "7c", "7d", *map(str, range(8, 19)), "20", "21", "22"]


def figures_of(root: Path, *names: str) -> dict[str, FigureFiles]:
    """Chart, without the cost of an image: `words` describe it, or say what it needs."""
    view = view_of(load(root))
    return {name: draw_files(name, view, kinds=()) for name in names}


def missing(found: dict[str, FigureFiles]) -> set[str]:
    return {name for name, drawing in found.items() if drawing.words.startswith(("Needs ", "Only one "))}


def command(*words: object) -> int:
    return run_command(__main__.main, __main__.parse([str(word) for word in words]))


@pytest.fixture(scope="module")
def paper(tmp_path_factory) -> Path:
    """A run of each kind that the paper compares, 400M; the bench has looked at them."""
    root = tmp_path_factory.mktemp("paper")
    kinds = {
        "pre": {"norm_placement": "pre"},
        "peri": {},
        "noemb": {"embedding_norm": False},
        "frozen": {"embedding_norm": False, "output_norm_learnable": False},
        "layernorm": {"norm_type": "layernorm"},
        "olmo2": {"norm_placement": "output", "qk_norm": "full"},
        "post": {"norm_placement": "post"},
    }
    for name, model in kinds.items():
        write_bench(write_any(root, name, model=model, parameters=4.027e8), [0, 40], layers=2)
    write_any(root, "short", steps=20, parameters=4.027e8)  # a token budget of half the size
    recipe = root / "short" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 40", "steps: 20"))
    write_any(root, "length", sequence_length=32, parameters=4.027e8)
    write_any(root, "warm", optimizer={"learning_rate": 0.002, "warmup": 0.3}, parameters=4.027e8)
    return root


# --- the catalogue -------------------------------------------------------------------------------------------


def test_the_catalogue_has_every_figure_of_the_paper_that_can_be_measured():
    assert [name for name in CATALOGUE if name[0].isdigit()] == PAPER
    assert "headroom" in CATALOGUE
    for name, entry in CATALOGUE.items():
        assert len(entry.alt) > 30 and entry.alt.endswith("."), name
        if name in PAPER:
            assert f"Figure {name.rstrip('abcd')}" in entry.paper, name


def test_all_figures_are_drawn_where_their_records_are(paper):
    drawn = {drawing.name: drawing for drawing in all_figures(load(paper), kinds=())}
    other_sizes = {"9", "10", "17", "18", "21", "22"}
    assert missing(drawn) == {*other_sizes, *CURVES, "rates"}
    for name in other_sizes:
        assert "Needs models of" in drawn[name].words and "is the same figure" in drawn[name].words
    assert "gamma frozen" in drawn["7d"].words
    assert "Left out: 3 of 6 runs" in drawn["3b"].words
    assert "Left out, as they change a placement: peri, LayerNorm; peri, no embedding norm" in drawn["3b"].words
    for name in ("4", "5", "11", "20"):
        assert "Size of the models here" not in drawn[name].words or name in ("5",)


def test_a_figure_that_is_asked_for_is_drawn_of_the_sizes_there_are(paper):
    drawn = draw_files("10", view_of(load(paper)))
    assert drawn.png.startswith(b"\x89PNG")
    assert "Size of the models here: 400M (the paper's: 3.2B)." in drawn.words


def test_figures_of_one_size_take_the_runs_of_that_size(tmp_path):
    for name, parameters, hidden in (("small", 4.027e8, 8), ("large", 1.497e9, 16)):
        write_any(tmp_path, name, parameters=parameters, model={"hidden_size": hidden})
    found = figures_of(tmp_path, "3b", "5", "9", "10", "11")
    for name in ("3b", "5", "9", "11"):
        assert "Runs drawn: peri 1." in found[name].words and "Size of the models" not in found[name].words
    assert "Runs drawn: peri 2." in found["10"].words
    assert "Size of the models here: 400M, 1.5B (the paper's: 3.2B)." in found["10"].words
    assert {d.name for d in all_figures(load(tmp_path), kinds=()) if d.words.startswith("Needs models")} == {
        "10",
        "18",
        "22",
    }


def write_models(out: Path, **placements: str | None) -> Path:
    """What `eval.stability MODEL... --out OUT` leaves: a folder a model, in no run."""
    for name, placement in placements.items():
        shutil.move(write_bench(out / "made" / name, [0], layers=3), out / name)
        report = json.loads((out / name / "stability.json").read_text())
        known = {"placement": placement, "num_layers": 3, "hidden_size": 8, "parameters": 1.5e5}
        report["checkpoints"] = [report["checkpoints"][0] | (known if placement else {})]
        (out / name / "stability.json").write_text(json.dumps(report))
    shutil.rmtree(out / "made")
    return out


def test_models_that_are_no_runs_are_drawn_from_the_benchs_records(tmp_path):
    out = write_models(tmp_path / "out", gemma="peri", glm="peri", llama="pre", odd=None)
    view = view_of(load_measured([out]))
    assert list(view.runs.series) == ["gemma", "glm", "llama", "odd"] and set(view.runs["size"]) == {"150K parameters"}
    # Their placement's colour, told apart by dashes; one of unknown placement has its own colour.
    assert [view.looks[name].marker for name in ("gemma", "glm", "llama")] == ["^", "^", "s"]
    assert view.looks["gemma"].style != view.looks["glm"].style
    assert view.looks["odd"].colour not in [view.looks[name].colour for name in ("gemma", "llama")]
    for name in ("1", "5", "6", "7c", "headroom", "peaks"):
        words = draw_files(name, view, kinds=()).words
        assert "gemma" in words and "wikitext, 1,000 samples" in words
        assert not any(wrong in words for wrong in ("Initialization is", "learning rate", "nan", "diverged 0"))
    with pieces.settings():
        titles = [ax.get_title() for ax in depth.hidden_state(view).figure.axes]
    assert titles == ["measured models"] * 2  # one panel for all, and none that claims an initialization
    for name, reason in {"3b": "metrics.jsonl", "3a": "metrics.jsonl", "7a": "not at initialization"}.items():
        assert reason in draw_files(name, view, kinds=()).words


def test_models_and_runs_are_drawn_together_and_a_copy_of_a_run_is_not_drawn_twice(tmp_path):
    out = write_models(tmp_path / "out", llama="pre")
    run = write_any(tmp_path / "runs", "mine")
    shutil.copytree(write_bench(run, [0, 40], layers=2), out / "mine")
    frames = load_measured([tmp_path / "runs", out])
    assert list(frames.runs.stage) == ["pretrain", "model"] and frames.learning_rates == [0.002]
    with pieces.settings():
        titles = {ax.get_title() for ax in depth.hidden_state(view_of(frames)).figure.axes}
    assert {title.split(",")[0] for title in titles} == {"at initialization", "measured models", "at the end"}
    assert len(view_of(frames, [0.002]).runs) == 1
    assert list(load_measured([out]).runs.run.map(lambda name: Path(name).name)) == ["llama", "mine"]


def test_the_command_takes_a_model_s_folder_and_names_what_is_damaged(tmp_path, capsys):
    out = write_models(tmp_path / "out", llama="pre")
    assert command("5", out / "llama", "--out", tmp_path / "figs", "--format", "svg") == 0
    assert (tmp_path / "figs" / "figure_5.svg").exists()
    assert command("5", out, "--learning-rate", "0.1", "--out", tmp_path / "figs") == 2
    assert "is not a rate of these runs: there is none" in capsys.readouterr().err
    (out / "llama" / "stability.json").write_text("{}")
    assert command("5", out, "--out", tmp_path / "more") == 1
    assert "stability.json holds no measurement" in capsys.readouterr().err


def test_a_run_with_one_late_checkpoint_alone_has_no_panel_of_its_initialization(tmp_path):
    run = write_any(tmp_path, "late")
    shutil.rmtree(run / "layers")
    write_bench(run, [40], layers=2)
    drawn = figures_of(tmp_path, "5")["5"]
    assert "One step is recorded of each (40): there is no earlier one to compare." in drawn.words
    write_any(tmp_path, "early", seed=2)
    with pieces.settings():
        figure = depth.hidden_state(view_of(load(tmp_path))).figure
    assert figure.axes[0].get_title() == "at initialization"
    assert len(figure.axes[0].lines) == 1 and len(figure.axes[2].lines) > 1  # the late run is at the end only


def test_missing_records_are_named_with_the_command_that_makes_them(tmp_path):
    write_any(tmp_path, "run")
    for name, words in {
        "4": "400m-peri-frozen-gamma.yaml",
        "7a": "periln bench RUN",
        "7d": "periln bench",
        "8": "periln sweep run",
        "12": "paper-400m-tokens.yaml",
        "13": "400m-peri-seq2048.yaml",
        "14": "paper-400m-warmup.yaml",
        "15": "400m-peri-layernorm.yaml",
        "16": "400m-peri-no-embedding-norm.yaml",
        "20": "400m-olmo2.yaml",
    }.items():
        drawing = figures_of(tmp_path, name)[name]
        assert drawing.words.startswith("Needs ") and words in drawing.words
        for recipe in [w.strip(".,;") for w in drawing.words.split() if w.startswith("scripts/recipes/")]:
            assert (ROOT / recipe).exists(), recipe


# --- what they show ------------------------------------------------------------------------------------------


def test_colours_are_the_placements_and_variants_differ_in_dashes(paper):
    view = view_of(load(paper))
    for name in ("pre", "peri", "post"):
        assert view.looks[name].colour == mpl.colors.to_rgb(placements.COLOURS[name])
        assert view.looks[name].marker == placements.MARKERS[name]
    same = [look for series, look in view.looks.items() if series.startswith("peri")]
    assert len(same) == 4
    assert len({str(look.style) for look in same}) == len({look.colour for look in same}) == 4


def test_the_best_rate_is_that_of_the_lowest_final_loss_of_runs_that_did_not_diverge(tmp_path):
    write_any(tmp_path, "low", rate=0.002)
    write_any(tmp_path, "high", rate=0.02)
    write_any(tmp_path, "lost", rate=0.001, status="diverged")
    assert list(best_rates(view_of(load(tmp_path))).learning_rate) == [0.002]
    assert "All at learning rate 0.002." in figures_of(tmp_path, "3b")["3b"].words


def test_final_losses_and_diverged_runs_stand_at_their_rates(tmp_path):
    for rate, status in ((0.001, "completed"), (0.01, "completed"), (0.1, "diverged")):
        write_any(tmp_path, f"r{rate}", rate=rate, status=status)
    drawn = sweeps.by_size(view_of(load(tmp_path)))
    ax = drawn.figure.axes[0]
    assert ax.get_xscale() == "log"
    mean, dots, crosses = ax.lines
    assert list(mean.get_xdata()) == list(dots.get_xdata()) == [0.001, 0.01]
    assert mean.get_ydata()[1] - mean.get_ydata()[0] == pytest.approx(0.09)
    assert list(crosses.get_xdata()) == [0.1] and crosses.get_marker() == "x"


def test_the_axes_are_logarithmic_where_the_papers_are(paper):
    view = view_of(load(paper))
    for draws in (depth.hidden_state, depth.gradient_by_layer, depth.growth):
        axes = [ax for ax in draws(view).figure.axes if ax.lines]
        assert axes and all(ax.get_yscale() == "log" for ax in axes)


def test_the_headroom_map_holds_the_bits_and_marks_what_overflowed(tmp_path):
    write_any(tmp_path, "run", layers=3, growth=40.0)  # 40^(3 * 20 / 10) overflows in layer 3 from step 20 on
    drawn = headroom.headroom_map(view_of(load(tmp_path)))
    ax = drawn.figure.axes[0]
    bits, over = (np.ma.filled(mesh.get_array(), np.nan) for mesh in ax.collections)
    assert bits.shape == (7, 3)  # the embedding and six sublayers; steps 0, 20, 40
    assert bits[0, 0] == pytest.approx(np.log2(65504))
    assert bits[2, 1] == pytest.approx(np.log2(65504 / 40**2))  # layer 1, step 20
    assert np.isnan(bits[6, 1]) and over[6, 1] == 1
    assert "overflow" in ax.get_title()
    assert "overflow" in drawn.figure.legends[0].get_texts()[0].get_text()


def test_what_stands_behind_the_final_norm_is_not_the_streams_headroom(tmp_path):
    run = write_any(tmp_path, "run")
    write_bench(run, [0, 40], layers=2)  # its row of the final norm is 1e6
    assert "overflow" not in headroom.headroom_map(view_of(load(tmp_path))).figure.axes[0].get_title()


def test_an_overflow_of_training_is_not_hidden_by_calm_checkpoints(tmp_path):
    run = write_any(tmp_path, "run", layers=3, growth=40.0)
    write_bench(run, [0, 40], layers=3)
    drawn = headroom.headroom_map(view_of(load(tmp_path)))
    assert "overflow" in drawn.figure.axes[0].get_title()
    assert "one training batch a step" in drawn.caption and "wikitext" in drawn.caption


def test_records_of_the_bench_are_preferred_and_named(tmp_path):
    write_bench(write_any(tmp_path, "a"), [0, 40], layers=2, variance=7.0)
    view = view_of(load(tmp_path))
    rows = layer_rows(view, "stream", "it", ("variance",), edges=True)
    assert set(rows.source) == {"bench"} and rows.value.max() == 49.0
    assert source_words(view, rows) == "Measured on wikitext, 1,000 samples (255,000 predicted tokens)."
    write_any(tmp_path, "b", model={"norm_placement": "pre"})
    words = figures_of(tmp_path, "5")["5"].words
    assert "Measured on wikitext, 1,000 samples (255,000 predicted tokens): peri." in words
    assert "Measured on one training batch a step: pre." in words


def test_a_run_whose_checkpoint_is_old_is_drawn_at_its_end_from_the_trainers_records(tmp_path):
    write_bench(write_any(tmp_path, "a"), [20], layers=2)
    rows = layer_rows(view_of(load(tmp_path)), "stream", "it", ("variance",), edges=True)
    assert {(r.source, r.step) for r in rows.itertuples()} == {("trainer", 0), ("trainer", 40)}


def test_the_one_checkpoint_that_is_not_the_initial_one_is_not_called_so(tmp_path):
    run = write_any(tmp_path, "a")
    write_bench(run, [40], layers=2)
    assert "one measured checkpoint each, of step 40" in figures_of(tmp_path, "7a")["7a"].words
    shutil.rmtree(run / "eval")
    write_bench(run, [20, 40], layers=2)
    assert "Measured at step 20." in figures_of(tmp_path, "7a")["7a"].words
    write_bench(write_any(tmp_path, "pre", model={"norm_placement": "pre"}), [40], layers=2)
    words = figures_of(tmp_path, "7a")["7a"].words  # a run with one late checkpoint is not at its start
    assert "Measured at step 20." in words and "Runs drawn: peri 1." in words


# --- figures that would mislead ---------------------------------------------------------------------------------


def test_a_curve_over_learning_rates_has_three_of_them(tmp_path):
    for rate in (0.001, 0.01):
        write_any(tmp_path, f"r{rate}", rate=rate, model={"norm_placement": "post"})
    found = figures_of(tmp_path, "3a", "8")
    for name in ("3a", "8"):
        assert found[name].words.startswith("Needs 3 learning rates or more in one panel")
        assert "the runs have 2 (0.001, 0.01)" in found[name].words
    write_any(tmp_path, "third", rate=0.1, model={"norm_placement": "post"})
    write_any(tmp_path, "wide", rate=0.1, parameters=2.4e6, model={"norm_placement": "post", "hidden_size": 16})
    found = figures_of(tmp_path, "3a", "8")
    for name in ("3a", "8"):
        assert "Left out, with fewer than 3 learning rates: 2.4M parameters." in found[name].words
        assert "Runs drawn: post 3." in found[name].words


def test_panels_of_two_token_budgets_share_their_axis_of_losses(tmp_path):
    for rate in (0.001, 0.002, 0.003):
        write_any(tmp_path, f"long{rate}", rate=rate)
        write_any(tmp_path, f"short{rate}", rate=rate, steps=20)
        recipe = tmp_path / f"short{rate}" / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("steps: 40", "steps: 20"))
    one, two = sweeps.tokens(view_of(load(tmp_path))).figure.axes
    assert one.get_ylim() == two.get_ylim()


def test_losses_that_hardly_differ_do_not_fill_their_axis(tmp_path):
    for rate in (1e-4, 2e-4, 3e-4):  # losses that differ by 0.002
        write_any(tmp_path, f"r{rate}", rate=rate)
    low, high = sweeps.by_size(view_of(load(tmp_path))).figure.axes[0].get_ylim()
    assert high - low == pytest.approx(sweeps.LEAST_SPAN)


def test_different_learning_rates_are_told_in_the_picture(tmp_path):
    write_any(tmp_path, "pre", rate=0.002, model={"norm_placement": "pre"})
    write_any(tmp_path, "peri", rate=0.01)
    figure = CATALOGUE["3b"].draw(view_of(load(tmp_path))).figure
    assert figure.axes[0].get_title() == "learning rates differ: each at its own best"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["pre at 0.002", "peri at 0.01"]
    write_any(tmp_path, "pre-too", rate=0.01, seed=2, model={"norm_placement": "peri"})
    figure = CATALOGUE["3b"].draw(view_of(load(tmp_path)).where(learning_rate=0.01)).figure
    assert figure.axes[0].get_title() == ""


def test_panels_of_headroom_have_one_range_of_steps(tmp_path):
    write_any(tmp_path, "whole")
    write_any(tmp_path, "short", steps=20, status="diverged", model={"norm_placement": "pre"})
    figure = headroom.headroom_map(view_of(load(tmp_path))).figure
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert {ax.get_xlim() for ax in panels} == {(0.0, 40.0)}
    assert "not recorded" in [text.get_text() for text in figure.legends[0].get_texts()]


def keep_layers_of(run, step):
    for file in (run / "layers").iterdir():
        if int(file.stem.rpartition("_")[2]) != step:
            file.unlink()


def test_a_headroom_map_of_one_step_names_that_step_alone(tmp_path):
    keep_layers_of(write_any(tmp_path, "run"), 20)
    ax = headroom.headroom_map(view_of(load(tmp_path))).figure.axes[0]
    low, high = ax.get_xlim()
    assert low < 20 < high and list(ax.get_xticks()) == [20.0]


@pytest.mark.parametrize(("step", "drawn"), [(0, (0.0, 10.0)), (20, (10.0, 30.0)), (40, (30.0, 40.0))])
def test_a_headroom_map_of_one_step_is_seen_beside_one_of_many(tmp_path, step, drawn):
    write_any(tmp_path, "whole")
    keep_layers_of(write_any(tmp_path, "once", model={"norm_placement": "pre"}), step)
    figure = headroom.headroom_map(view_of(load(tmp_path))).figure
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert {ax.get_xlim() for ax in panels} == {(0.0, 40.0)}
    corners = [ax.collections[0].get_coordinates()[0, :, 0] for ax in panels]
    assert sorted((x[0], x[-1]) for x in corners) == sorted([drawn, (0.0, 40.0)])
    assert "not recorded" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_line_over_steps_has_two_of_them(tmp_path):
    run = write_any(tmp_path, "run")
    for file in sorted((run / "layers").iterdir())[1:]:
        file.unlink()
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    found = figures_of(tmp_path, "3b", "7b")
    assert found["3b"].words.startswith("Needs runs with two finite steps or more")
    assert found["7b"].words.startswith("Needs the gamma of output norms at two steps or more; there is step 0 alone")


# --- runs of every shape -------------------------------------------------------------------------------------

OWN = {"norm_placement": {"input_norm": True, "output_norm": True, "alpha": "1/sqrt(L)", "s": 0.5, "final_norm": True}}
SHAPES = {
    "one layer": [{"layers": 1}],
    "64 layers": [{"layers": 64, "growth": 1.02}, {"layers": 64, "model": {"norm_placement": "pre"}}],
    "all diverged": [{"status": "diverged"}, {"status": "diverged", "model": {"norm_placement": "pre"}}],
    "unequal steps": [{"steps": 7}, {"steps": 33, "seed": 2}, {"steps": 21, "model": {"norm_placement": "pre"}}],
    "one step": [{"steps": 1}],
    "own placements": [{"model": OWN}, {"model": {"norm_placement": {"residual_norm": True}}}, {}],
    "sizes not known": [{"parameters": None}, {"parameters": None, "layers": 5}],
    "all infinite": [{"growth": 1e9, "status": "diverged"}],
    "many rates": [
        {"rate": rate, "status": status} for rate in (1e-4, 3e-4, 1e-3, 3e-3, 0.01) for status in ("failed",)
    ],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_runs_of_any_shape_can_be_drawn(tmp_path, shape):
    for i, settings in enumerate(SHAPES[shape]):
        run = write_any(tmp_path, f"run{i}", **settings)
        if shape in ("one layer", "own placements"):
            write_bench(run, [0, 40], layers=settings.get("layers", 2))
    with np.errstate(all="raise", under="ignore"):
        more = ("3c", "6", "7b", "peaks", "events") if shape in ("64 layers", "all diverged", "one step") else ()
        found = figures_of(tmp_path, "1", "3a", "5", "7a", "headroom", *more)
        assert draw_files("headroom", view_of(load(tmp_path))).png
    expected = {"3a"} if shape != "many rates" else set()
    expected |= {"7a"} if shape not in ("one layer", "own placements") else set()
    assert missing(found) == expected | ({"3c"} if shape == "one step" else set())
    if shape == "own placements":
        assert "own placement 1: own: alpha=1/sqrt(L), final_norm, input_norm" in found["5"].words


@pytest.mark.parametrize("gone", ["layers", "metrics.jsonl", "summary.json", "everything"])
def test_missing_files_cost_only_their_figures(tmp_path, gone):
    for name, placement in (("a", "peri"), ("b", "pre")):
        run = write_any(tmp_path, name, model={"norm_placement": placement})
        for file in ("layers", "metrics.jsonl", "summary.json") if gone == "everything" else (gone,):
            shutil.rmtree(run / file) if file == "layers" else (run / file).unlink()
    found = figures_of(tmp_path, "3b", "5", "headroom", "events")
    needs = {"layers": {"5", "headroom"}, "metrics.jsonl": {"3b", "events"}, "summary.json": set()}
    expected = needs.get(gone, set(found))
    assert missing(found) == expected


def test_runs_of_one_shape_have_one_size_though_a_norm_changes_their_parameters():
    columns = ["num_layers", "hidden_size", "intermediate_size", "parameters_non_embedding", "parameters"]
    rows = [
        [24, 1024, 4096, 4.027e8, 6e8],
        [24, 2048, 7424, 1.497e9, 2e9],
        [4, 64, 160, 248_064, 376_000],
        [4, 64, 160, 248_512, 376_448],  # with a norm on the embedding
        [1, 128, 160, 248_400, 400_000],
        [4, 8, 16, None, None],
        [None, None, None, None, None],
    ]
    assert list(sizes_of(pd.DataFrame(rows, columns=columns))) == [
        "400M",
        "1.5B",
        "249K parameters",
        "249K parameters",
        "248K parameters",
        "4 layers x 8",
        "size not recorded",
    ]


def test_names_of_variants():
    assert has_embedding_norm({}, "peri") and not has_embedding_norm({"embedding_norm": False}, "peri")
    assert has_embedding_norm({"norm_placement": {"embedding_norm": True}}, "own: embedding_norm")


def test_the_common_protocol_keeps_seeds_of_unequal_length_apart(tmp_path):
    write_any(tmp_path, "whole", steps=40)
    write_any(tmp_path, "other", steps=40, sequence_length=32)
    write_any(tmp_path, "more", steps=40, seed=2)
    kept, words = common_protocol(view_of(load(tmp_path)))
    assert set(kept.runs.run) == {"whole", "more"} and "Left out: 1 of 3 runs" in words


# --- the command ---------------------------------------------------------------------------------------------


def test_the_command_writes_png_svg_and_caption_the_same_each_time(paper, tmp_path, capsys):
    with mpl.rc_context({"font.size": 30}):
        assert command("3b,headroom", paper, "--out", tmp_path / "a") == 0
    assert command("figure 3b", paper, "--out", tmp_path / "b") == 0
    names = [f"figure_{name}.{kind}" for name in ("3b", "headroom") for kind in ("png", "svg", "txt")]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(names)
    for kind in ("png", "svg", "txt"):
        files = [tmp_path / folder / f"figure_3b.{kind}" for folder in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes()
    svg = ET.parse(tmp_path / "a" / "figure_3b.svg").getroot()
    assert svg.tag.endswith("svg")
    text = (tmp_path / "a" / "figure_3b.svg").read_text()
    assert 'href="http' not in text and "<dc:date>" not in text
    assert f"Figure 3b: {tmp_path / 'a' / 'figure_3b.png'}" in capsys.readouterr().out


def test_mistakes_are_one_sentence(paper, tmp_path, capsys):
    assert command("fig3", paper, "--out", tmp_path / "x") == 2
    assert command("7", paper, "--out", tmp_path / "x") == 2
    assert "it has parts: 7a, 7b, 7c, 7d" in capsys.readouterr().err
    assert command("headrom", paper, "--out", tmp_path / "x") == 2
    assert "did you mean 'headroom'?" in capsys.readouterr().err
    assert command("5", paper, "--learning-rate", 0.3, "--out", tmp_path / "x") == 2
    assert "--learning-rate 0.3 is not a rate of these runs: 0.002" in capsys.readouterr().err
    assert command("5", tmp_path / "nowhere") == 2
    (tmp_path / "file").touch()
    assert command("5", paper, "--out", tmp_path / "file") == 2
    assert not (tmp_path / "x").exists()


def test_a_figure_without_records_fails_with_what_it_needs(tmp_path, capsys):
    write_any(tmp_path / "runs", "run")
    assert command("7a", tmp_path / "runs", "--out", tmp_path / "x") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: nothing was drawn: needs angular distances") and said.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_command_needs_no_torch():
    code = "import periln.eval.figures.__main__, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- the bench in the report ---------------------------------------------------------------------------------


def test_the_report_quotes_verdict_and_certificate(paper):
    said = {entry["name"]: entry for entry in bench(load(paper))}
    entry = said["pre, learning rate 0.002, seed 1"]
    assert entry["verdict"] == ["The stream's variance is exponential in depth."]
    assert entry["measured"] == "The stability bench, on wikitext, 1,000 samples (255,000 predicted tokens):"
    assert entry["certificate"][0] == (
        "FP16 certificate from the weights alone (step 40): 1 of 2 tensors have a bound for any input, the largest 99 "
        "(layer 1, mlp, residual_add); 0 of the bounds are above 65,504."
    )
    assert entry["certificate"][1] == "Not bounded: 1 tensors (branch). Why: no norm."


def test_a_damaged_table_is_named(tmp_path):
    run = write_any(tmp_path, "run")
    folder = write_bench(run, [0], layers=2)
    pd.DataFrame({"step": [0]}).to_parquet(folder / "angles_00000000.parquet")
    assert command("7a", tmp_path, "--out", tmp_path / "x") == 1
    (folder / "stability.json").write_text(json.dumps([]))
    assert bench(load(tmp_path))[0]["verdict"] == []


def test_not_recorded_is_not_an_error_of_the_program():
    assert not issubclass(NotRecorded, (OSError, ValueError)) and pieces.DPI * pieces.WIDTH == 900
