"""Tests of Table 2, Tables 6 to 11 and what is next to and under them: from the paper's numbers and from runs."""

import csv
import io
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import synthetic_runs
from synthetic_runs import TASKS as MINI
from synthetic_runs import write_json, write_run, write_scores, write_sft

from periln.eval.arguments.tables import parse
from periln.eval.records.frames import load_all
from periln.eval.tables.beside_paper import FOLDER, by_seed, table_2
from periln.eval.tables.command import main
from periln.eval.tables.paired import t_interval
from periln.eval.tables.paper_tables import means_table
from periln.eval.tables.score_csv import read_scores
from periln.eval.tables.scores import from_runs, seeds_text
from periln.eval.text_table import latex_text, signed, to_latex
from periln.runkit.errors import UsageError, UserError
from periln.runkit.sizes import paper_size, size_name, size_value
from periln.runkit.tasks import SUITES

TASKS = SUITES["hub"]
SHARED = Path(__file__).resolve().parents[4] / "shared" / "paper"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """A wide terminal, and runs without layer statistics, which no table of scores reads."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(synthetic_runs, "write_layers", lambda run, *rest: None)


def tables(capsys, *arguments: str | Path) -> str:
    main(parse([str(argument) for argument in arguments]))
    return capsys.readouterr().out


def as_csv(capsys, *arguments: str | Path) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(tables(capsys, *arguments, "--format", "csv")))


def paper_rows() -> list[dict[str, str]]:
    lines = (FOLDER / "tables_06_to_11.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    return [{name: row[name] for name in row if name != "table"} for row in rows]


def write(path: Path, rows: list[dict]) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def cell(text: str, start: str) -> str:
    """The first line of a terminal table that starts so."""
    return next(line for line in text.splitlines() if line.startswith(start))


# --- the paper's numbers ---------------------------------------------------------------------------------------


def assert_equal_table_2(found: pd.DataFrame, paper: pd.DataFrame) -> None:
    assert list(found.columns) == list(paper.columns)
    found, paper = found.set_index(["size", "placement"]), paper.set_index(["size", "placement"])
    assert list(found.index) == list(paper.index)
    assert found.c4_loss.isna().all()
    gap = (found - paper).drop(columns="c4_loss").abs()
    assert gap.notna().all(axis=None)
    assert gap.max(axis=None) < 0.01


def test_table_2_follows_from_tables_6_to_11(capsys):
    assert_equal_table_2(as_csv(capsys, "--scores", FOLDER / "tables_06_to_11.csv"), table_2())


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/paper is not beside this checkout")
def test_the_shipped_numbers_are_those_of_the_reference_copy(capsys):
    assert_equal_table_2(
        as_csv(capsys, "--scores", SHARED / "benchmarks_by_seed.csv"), pd.read_csv(SHARED / "table2.csv")
    )
    with open(SHARED / "benchmarks_by_seed.csv", newline="") as file:
        assert list(csv.DictReader(file)) == paper_rows()
    pd.testing.assert_frame_equal(table_2(), pd.read_csv(SHARED / "table2.csv"))


def test_a_diverged_seed_is_diverged_before_and_not_available_after_fine_tuning(capsys):
    text = tables(capsys, "--scores", FOLDER / "tables_06_to_11.csv", "--table", "seeds")
    parts = text.split("Fine-tuning, post", 1)
    before, after = (part.splitlines() for part in parts)
    assert sum("Diverged" in line for line in before) == sum("N/A" in line for line in after) == 6
    assert not any("N/A" in line for line in before)
    assert not any("Diverged" in line for line in after)
    assert "Pretraining, pre: a row a seed, as the paper's Table 7" in before
    seeds = as_csv(capsys, "--scores", FOLDER / "tables_06_to_11.csv", "--table", "seeds")
    assert set(seeds[(seeds.stage == "sft") & (seeds.status == "diverged")].index)
    gone = seeds[(seeds["size"] == "3.2B") & (seeds.placement == "pre") & (seeds.seed == 5)]
    assert len(gone) == 2


def test_the_table_of_seeds_can_be_read_again(capsys, tmp_path):
    source = FOLDER / "tables_06_to_11.csv"
    file = tmp_path / "seeds.csv"
    tables(capsys, "--scores", source, "--table", "seeds", "--format", "csv", "--out", file)
    assert "Diverged" in file.read_text()
    assert as_csv(capsys, "--scores", file).equals(as_csv(capsys, "--scores", source))


# --- altered copies ----------------------------------------------------------------------------------------------


def altered(tmp_path: Path, change) -> Path:
    return write(tmp_path / "scores.csv", [new for row in paper_rows() if (new := change(dict(row))) is not None])


def test_another_diverged_seed_leaves_the_means_before_and_after(capsys, tmp_path):
    def gone(row):  # only its pretraining is marked: what was fine-tuned from it cannot count either
        if (row["stage"], row["placement"], row["size"], row["seed"]) == ("pretrain", "peri", "400M", "2"):
            row |= {"status": "diverged"} | dict.fromkeys(TASKS, "")
        return row

    file = altered(tmp_path, gone)
    found = as_csv(capsys, "--scores", file).set_index(["size", "placement"]).loc[("400M", "peri")]
    left = [0.5758, 0.5842, 0.5800, 0.5627]
    assert found.arc_easy == pytest.approx(100 * sum(left) / 4, abs=1e-3)
    tuned = [r for r in paper_rows() if r["stage"] == "sft" and r["placement"] == "peri" and r["size"] == "400M"]
    mean = sum(float(r[t]) for r in tuned if r["seed"] != "2" for t in TASKS) / 20
    assert found.sft_avg == pytest.approx(100 * mean, abs=1e-3)
    text = tables(capsys, "--scores", file, "--table", "means")
    assert cell(text, "peri").endswith("4/5")
    assert "Left out of SFT Avg., since that pretraining diverged: peri 400M seed 2 (fine-tuned)." in text


def test_other_placements_sizes_columns_and_losses(capsys, tmp_path):
    def other(row):
        row["placement"] = {"post": "mine", "pre": "output"}.get(row["placement"], row["placement"])
        row["size"] = {"400M": "60.1M", "1.5B": "10B"}.get(row["size"], row["size"])
        return row | {"c4_loss": "3.5" if row["status"] == "completed" else "", "remark": "x"}

    file = altered(tmp_path, other)
    found = as_csv(capsys, "--scores", file)
    assert list(found["size"].unique()) == ["60.1M", "3.2B", "10B"]
    assert list(found.placement.unique()) == ["peri", "output", "mine"]
    assert (found.c4_loss == 3.5).all()
    text = tables(capsys, "--scores", file, "--table", "means")
    assert "Columns of the file that no table uses: remark." in text


def test_a_missing_task_leaves_its_column_and_the_average_empty(capsys, tmp_path):
    file = altered(tmp_path, lambda row: {k: v for k, v in row.items() if k != "piqa"})
    found = as_csv(capsys, "--scores", file)
    assert found.piqa.isna().all() and found.avg.isna().all() and found.sft_avg.isna().all()
    assert found.arc_easy.notna().all()
    assert "The file has no column piqa" in tables(capsys, "--scores", file, "--table", "means")


def test_a_missing_score_and_a_missing_seed_are_said(capsys, tmp_path):
    def holes(row):
        which = (row["stage"], row["placement"], row["size"], row["seed"])
        if which == ("pretrain", "peri", "400M", "3"):
            row["piqa"] = ""
        return None if which[1:] == ("pre", "1.5B", "4") else row

    text = tables(capsys, "--scores", altered(tmp_path, holes), "--table", "means")
    assert "No score of piqa for peri at 400M seed 3." in text
    assert "Missing: pre at 1.5B has no seed 4." in text


def test_an_empty_limit_beside_others_is_none(capsys, tmp_path):
    def limited(row):
        return row | {"limit": "100" if row["placement"] == "peri" else ""}

    text = " ".join(tables(capsys, "--scores", altered(tmp_path, limited), "--table", "means").split())
    assert "limits differ (100; none)" in text
    assert "Different limits (items a task): none (post 400M seeds 1 to 5;" in text


def test_provenance_beside_the_scores_is_compared(capsys, tmp_path):
    def mixed(row):
        row |= {"harness": "0.4.12" if row["placement"] == "post" else "0.4.13", "tokens": "30e9", "tokenizer": "a"}
        if row["placement"] == "peri" and row["size"] == "1.5B":
            row |= {"tokens": "15e9", "tokenizer": "b"}
        return row

    text = " ".join(tables(capsys, "--scores", altered(tmp_path, mixed), "--table", "means").split())
    assert "Mixed harness versions: 0.4.12 (post 400M seeds 1 to 5;" in text
    assert (
        "Unequal token counts at 1.5B: 30,000,000,000 (post 1.5B seeds 1, 2, 4, 5; pre 1.5B seeds 1 to 5), 15" in text
    )
    assert "Unequal token counts at 400M" not in text
    assert "Different tokenizers, so that losses in nats a token cannot be compared" in text
    assert "Mixed" not in tables(capsys, "--scores", FOLDER / "tables_06_to_11.csv", "--table", "means")


HEAD = "stage,placement,size,seed,status,arc_easy,hellaswag,piqa,social_iqa,winogrande\n"
LINE = "pretrain,peri,400M,1,completed,0.5,0.4,0.6,0.4,0.5\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (HEAD, "has no rows below its line 1"),
        (HEAD.replace("size", "sise") + LINE, "line 1: no column 'size' (did you mean 'sise'?)"),
        (HEAD.replace(",", ";"), "line 1: no column 'stage'; cells are separated by commas"),
        (HEAD.replace("piqa", "arc_easy") + LINE, "line 1: column 'arc_easy' appears twice"),
        ("# note\n" + HEAD + LINE + LINE, "line 4, column seed: pretrain peri 400M seed 1 is in line 3 already"),
        (HEAD + LINE.replace("0.6", "60.1"), "line 2, column piqa: 60.1 is above 1: scores are fractions, not percent"),
        (HEAD + LINE.replace("0.6", "-0.1"), "line 2, column piqa: -0.1 is below 0"),
        (HEAD + LINE.replace("0.6", "nan"), "line 2, column piqa: 'nan' is not a number"),
        (HEAD + LINE.replace("0.6", "N/A"), "line 2, column piqa: 'N/A' is not a number"),
        (HEAD + LINE.replace("completed", "complete"), "line 2, column status: 'complete' is none of"),
        (HEAD + LINE.replace("pretrain", "train"), "line 2, column stage: 'train' is none of pretrain, sft"),
        (HEAD + LINE.replace("peri", ""), "line 2, column placement: empty"),
        (HEAD + LINE.replace("400M,1", "400M,one"), "line 2, column seed: 'one' is not a whole number"),
        (HEAD + LINE.replace(",0.5\n", "\n"), "line 2: 9 cells, but line 1 names 10 columns"),
        (HEAD + LINE.replace("pretrain", "sft"), "has no row whose column stage is 'pretrain'"),
        ("stage,placement,size,seed,status\npretrain,peri,1B,1,completed\n", "line 1: no column of a task"),
    ],
)
def test_a_bad_file_is_refused_with_line_and_column(tmp_path, text, said):
    file = tmp_path / "scores.csv"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_scores(file)
    assert str(caught.value).startswith(f"{file} ") and said in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="cannot read .*nowhere.csv"):
        read_scores(tmp_path / "nowhere.csv")
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_scores(tmp_path / "x.csv")


# --- paired differences ------------------------------------------------------------------------------------------


def test_the_t_interval_of_three_values():
    low, high = t_interval(pd.Series([1.0, 2.0, 3.0]))
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t(0.975, 2) times the standard error
    assert all(math.isnan(x) for x in t_interval(pd.Series([1.0])))


def test_differences_are_paired_by_seed(capsys):
    found = as_csv(capsys, "--scores", FOLDER / "tables_06_to_11.csv", "--table", "paired")
    of = found[(found.block == "400M") & (found.placement == "peri") & (found.minus == "pre")].set_index("column")
    gaps = [57.58 - 56.69, 58.42 - 53.54, 56.27 - 54.38]  # seeds 1, 3, 5
    assert of.loc["arc_easy", "mean"] == pytest.approx(sum(gaps) / 3, abs=1e-3)
    low, high = t_interval(pd.Series(gaps))
    assert of.loc["arc_easy", ["low", "high"]].tolist() == pytest.approx([low, high], abs=1e-3)
    assert of.loc["arc_easy", "n"] == 3 and of.seeds.iloc[0] == "seeds 1, 3, 5"
    assert of.loc["SFT Avg.", "n"] == 3


def test_fewer_than_two_common_seeds_have_no_interval(capsys, tmp_path):
    def two_left(row):
        keep = {"peri": ("1", "2"), "pre": ("1", "3"), "post": ("3",)}[row["placement"]]
        return row if row["size"] == "400M" and row["seed"] in keep and row["stage"] == "pretrain" else None

    text = tables(capsys, "--scores", altered(tmp_path, two_left), "--table", "paired")
    assert cell(text, "peri - pre").split()[3:6] == ["1", "(seed", "1)"]
    assert "+0.89 " in cell(text, "peri - pre") and "[" not in cell(text, "peri - pre")
    assert "none" in cell(text, "peri - post")
    words = " ".join(text.split())
    assert "Fewer than two common seeds, so no interval: pre - post (400M); peri - post (400M); peri - pre" in words


# --- beside the paper ---------------------------------------------------------------------------------------------


def test_the_papers_numbers_stand_beside_those_of_its_sizes(capsys):
    text = tables(capsys, "--scores", FOLDER / "tables_06_to_11.csv", "--table", "paper")
    lines = [line.split() for line in text.splitlines() if line.startswith("pre ")]
    assert lines[0][:5] == ["pre", "ours", "54.87", "±", "1.63"]
    assert lines[1][:5] == ["pre", "paper", "54.87", "±", "1.63"] and lines[1][-1] == "3/5"
    assert lines[2][:3] == ["pre", "difference", "0.00"]
    assert "corresponds" not in text
    found = as_csv(capsys, "--scores", FOLDER / "tables_06_to_11.csv", "--compare-paper")
    assert list(found.whose.value_counts()) == [9, 9]


def test_a_size_that_is_none_of_the_papers_is_said_to_be_none(capsys, tmp_path):
    def smaller(row):
        return row | {"size": "60.1M"} if row["size"] == "400M" else None

    text = tables(capsys, "--scores", altered(tmp_path, smaller), "--table", "paper")
    assert "No size of the paper's (400M, 1.5B, 3.2B) corresponds to 60.1M." in text
    assert "difference" not in text
    assert "-- the paper's 3.2B" in text


def test_names_of_sizes():
    assert [paper_size(n) for n in (402.7e6, 1.497e9, 3.198e9, 411e6)] == ["400M", "1.5B", "3.2B", "400M"]
    assert [paper_size(n) for n in (60e6, 430e6, 1.3e9, 7e9, math.inf)] == [None] * 5
    assert [size_name(n) for n in (888_000, 60.1e6, 999_900, 402.7e6)] == ["888K", "60.1M", "1M", "400M"]
    assert [size_value(s) for s in ("1.5B", "888K", "400m", "tiny")] == [1.5e9, 888e3, 400e6, math.inf]
    assert seeds_text(pd.Series([5, 1, 2, 3])) == "seeds 1 to 3, 5"


# --- from runs ----------------------------------------------------------------------------------------------------


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two seeds of peri and pre with fine-tunings; a third of pre diverged."""
    for placement, more in (("peri", 0.1), ("pre", 0.0)):
        for seed in (1, 2):
            run = write_run(tmp_path / "runs", placement, seed=seed)
            write_scores(run, [0.2 + more + seed / 100] * 5, loss=4.0)
            write_sft(run, [0.3 + more + seed / 100] * 5)
            c4 = {"task": "c4", "metric": "loss", "value": 3.0 + more + seed / 10, "stderr": 0.01, "n": 100}
            write_json(run / "eval" / "c4.json", {"kind": "c4", "documents": 100, "evaluated": {}, "results": [c4]})
    write_run(tmp_path / "runs", "pre", seed=3, diverges_at=90)
    return tmp_path / "runs"


def test_runs_give_the_columns_of_table_2_and_theirs(capsys, runs):
    found = as_csv(capsys, runs).set_index("placement")
    assert list(found.columns[:2]) == ["size", "mini_arc_easy"]
    assert found.loc["peri", "avg"] == pytest.approx(31.5)
    assert found.loc["peri", "mini_piqa_std"] == pytest.approx(100 * 0.01 / math.sqrt(2), abs=1e-4)
    assert found.loc["pre", ["c4_loss", "sft_avg", "seeds", "survived"]].tolist() == pytest.approx([3.15, 31.5, 3, 2])


def test_runs_and_folders_may_be_named_one_by_one_and_twice(capsys, runs):
    one_by_one = [runs / f"{p}_lr0.002_seed{s}" for p, s in (("peri", 1), ("peri", 2), ("pre", 1), ("pre", 2))]
    found = as_csv(capsys, *one_by_one, runs, one_by_one[0])
    assert found.equals(as_csv(capsys, runs))
    assert "occurs 2 times" not in tables(capsys, *one_by_one, runs, "--table", "means")


def test_tables_by_seed_and_pairs_of_runs(capsys, runs):
    text = tables(capsys, runs)
    assert "Pretraining, pre: a row a seed" in text and "Fine-tuning, pre: a row a seed" in text
    after = text[text.index("Fine-tuning, pre") :]
    assert cell(after, "3").split() == ["3", *["N/A"] * 5, *["N/A"]]
    assert "+10.00 [+10.00, +10.00]" in cell(text, "peri - pre")
    assert "An interval without width" in text


def test_what_is_not_alike_is_said(capsys, runs):
    one = runs / "peri_lr0.002_seed1"
    edit_json(
        one / "eval" / "benchmarks-mini.json",
        harness={"name": "lm-eval", "version": "0.4.9"},
        dtype="float16",
        num_fewshot=5,
    )
    edit_json(one / "eval" / "c4.json", documents=10)
    recipe = one / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("batch_size: 8", "batch_size: 16"))
    for run, text in ((one, "a"), (runs / "pre_lr0.002_seed1", "b")):
        folder = run / "checkpoints" / "step_00000200"
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text(text)
    said = " ".join(tables(capsys, runs, "--table", "means").split())
    for start in (
        "Mixed harness versions: lm-eval 0.4.13 (pre seeds 1, 2; peri seed 2;",
        "Different numbers of examples before an item: 0 (pre seeds 1, 2; peri seed 2), 5 (peri seed 1).",
        "Scored in different dtypes: float32 (pre seeds 1, 2; peri seed 2), float16 (peri seed 1).",
        "C4 losses measured in different ways: documents 100 (pre seeds 1, 2; peri seed 2), documents 10 (peri",
        "Unequal token counts: 204,800 (pre seeds 1, 2; peri seed 2), 409,600 (peri seed 1).",
        "Different tokenizers",
        "Missing: peri has no seed 3.",
        "These runs differ in more than placement, learning rate and seed: batch_size.",
    ):
        assert start in said


def test_alike_runs_get_no_warnings(capsys, runs):
    (runs / "pre_lr0.002_seed3").rename(runs.parent / "elsewhere")
    text = tables(capsys, runs, "--table", "means")
    assert " ".join(text.split()).endswith("Losses in nats a token.")


def test_rates_that_differ_between_placements_alone_share_a_block(tmp_path):
    write_scores(write_run(tmp_path, "post", 0.001), [0.2] * 5)
    write_scores(write_run(tmp_path, "peri", 0.002), [0.3] * 5)
    table = means_table(from_runs(load_all([tmp_path], measurements=False), "mini"), "x")
    assert len(table.blocks) == 1
    assert list(table.text["learning rate"]) == ["0.001", "0.002"]
    assert list(table.text[MINI[0]]) == ["20.00 (n=1)", "30.00 (n=1)"]


def test_acc_norm_where_a_task_has_it(capsys, runs):
    found = as_csv(capsys, runs, "--metric", "acc_norm").set_index("placement")
    assert found.loc["pre", "mini_piqa"] == pytest.approx(10.75)  # half of acc, as synthetic_runs has it
    assert found.loc["pre", "mini_winogrande"] == pytest.approx(21.5)
    text = " ".join(tables(capsys, runs, "--metric", "acc_norm", "--table", "means").split())
    assert "acc_norm where it was recorded; mini_social_iqa, mini_winogrande: acc." in text


def test_a_second_fine_tuning_and_one_without_a_run_are_said(capsys, runs):
    (runs / "alone").mkdir()
    (runs / "alone" / "recipe.yaml").write_text("stage: sft\nname: alone\n")
    one = runs / "pre_lr0.002_seed1"
    (one / "sft-again").mkdir()
    (one / "sft-again" / "recipe.yaml").write_text("stage: sft\nname: again\n")
    text = " ".join(tables(capsys, runs, "--table", "means").split())
    assert "Fine-tunings outside any pretraining run are left out: alone." in text
    assert "pre_lr0.002_seed1 was fine-tuned 2 times" in text and "pre_lr0.002_seed1/sft counts." in text


def test_the_chosen_epoch_counts_and_another_is_said(capsys, runs):
    sft = runs / "pre_lr0.002_seed1" / "sft"
    for name, step, value in (("a", 10, 0.5), ("b", 20, 0.9)):
        write_scores(sft, [value] * 5)
        edit_json(sft / "eval" / "benchmarks-mini.json", evaluated={"path": f"merged/step_{step:08d}"})
        (sft / "eval" / "benchmarks-mini.json").rename(sft / "eval" / f"{name}.json")
    write_json(sft / "best.json", {"step": 10})
    assert as_csv(capsys, runs).set_index("placement").sft_avg["pre"] == pytest.approx((50 + 32) / 2)
    assert "best.json" not in tables(capsys, runs, "--table", "means")
    write_json(sft / "best.json", {"step": 15})
    said = " ".join(tables(capsys, runs, "--table", "means").split())
    assert "Scored at another checkpoint than best.json names: pre seed 1 (fine-tuned)." in said


def test_our_own_sets_are_not_set_beside_the_paper(capsys, runs):
    text = tables(capsys, runs, "--compare-paper", "--table", "paper")
    assert "The mini_ sets are not the five benchmarks" in text
    assert "57.51" not in text


# --- the command --------------------------------------------------------------------------------------------------


def test_every_format_has_the_same_cells(capsys):
    source = FOLDER / "tables_06_to_11.csv"
    cells = ["65.23", "2.33", "44.23", "Diverged", "N/A", "0.6688", "+8.54"]
    for form in ("terminal", "markdown", "latex"):
        text = tables(capsys, "--scores", source, "--format", form)
        assert all(cell in text for cell in cells), form
    assert "| pre | 65.23 ± 2.33 |" in tables(capsys, "--scores", source, "--format", "markdown")


def test_latex_is_escaped_and_every_row_has_its_columns():
    table = means_table(by_seed(), "100 % of_a & b ± c")
    text = to_latex(table)
    assert r"\caption{100 \% of\_a \& b $\pm$ c}" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.replace(r"\&", "").count("&") for line in rows} == {len(table.text.columns) - 2}
    assert text.count(r"\begin") == text.count(r"\end")
    assert latex_text("\\~^{}") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}\{\}"


def test_nothing_else_is_overwritten_unasked(capsys, tmp_path):
    out, source = tmp_path / "tables.md", FOLDER / "tables_06_to_11.csv"
    arguments = ["--scores", source, "--format", "markdown", "--out", out]
    assert tables(capsys, *arguments).strip() == str(out)
    tables(capsys, *arguments)  # the same bytes are not loss
    out.write_text("something of mine")
    with pytest.raises(UserError, match="holds something else; it is left alone"):
        tables(capsys, *arguments)
    assert out.read_text() == "something of mine"
    main(parse([*map(str, arguments), "--overwrite"]))
    assert "is overwritten" in capsys.readouterr().err
    assert out.read_text().startswith("**Table 2")
    with pytest.raises(UsageError, match="is a folder"):
        tables(capsys, "--scores", source, "--out", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give run folders or --scores FILE, one of the two"),
        (["runs", "--scores", "x.csv"], "not both"),
        (["--scores", "x.csv", "--metric", "acc_norm"], "--metric needs run folders"),
        (["--scores", "x.csv", "--confidence", "95"], "--confidence must lie between 0 and 1, not 95"),
        (["--scores", "x.csv", "--format", "csv", "--table", "means", "--table", "seeds"], "holds one table, not 2"),
    ],
)
def test_what_cannot_be_asked(arguments, said):
    with pytest.raises(UsageError) as caught:
        main(parse(arguments))
    assert said in str(caught.value)


def test_a_difference_that_rounds_to_nothing_has_no_sign():
    assert [signed(x, 2) for x in (0.004, -0.004, 0.006, -1.0)] == ["0.00", "0.00", "+0.01", "-1.00"]
