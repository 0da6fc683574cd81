"""From a budget to a frozen plan: what is chosen, refused and said."""

import subprocess

import pytest

from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import write_json
from periln.runkit.recipes import read_yaml
from periln.scripts.arguments.study import GROUPS, check, parse, parse_budget, parse_shard
from periln.scripts.study import command
from periln.scripts.study.design import COMPARED, choose, size_for
from periln.scripts.study.plan import detectable, recipe_of
from periln.scripts.study.sizes import SIZES, size_of

TINY = ["--size", "tiny", "--at", "tiny", "--tokens-per-second", "3000", "--workers", "2"]


def designed(budget: str, speed: float, device: str = "cpu"):
    asked = parse_budget(budget)
    seconds = asked.seconds * (asked.machines or 2)
    return choose(seconds, speed, size_for(None, device), device, list(GROUPS)), seconds


@pytest.mark.parametrize(
    ("text", "seconds", "machines"),
    [("20m", 1200, None), ("8h", 28800, None), ("8x100h", 360_000, 8), ("1.5h", 5400, None)],
)
def test_a_budget_is_read(text, seconds, machines):
    found = parse_budget(text)
    assert (found.seconds, found.machines) == (seconds, machines)


@pytest.mark.parametrize("text", ["8", "0h", "x8h", "0x8h", "8 hours", "-1h"])
def test_what_is_not_a_budget_is_refused(text):
    with pytest.raises(UsageError, match=r"--budget '.*' is not a time"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "a/b"])
def test_what_is_not_a_shard_is_refused(text):
    with pytest.raises(UsageError, match="is not a part of a whole"):
        parse_shard(text)


@pytest.mark.parametrize(
    ("budget", "speed", "device"), [("20m", 7400, "cpu"), ("8h", 7400, "cpu"), ("8x100h", 4e4, "cuda")]
)
def test_a_design_fits_its_budget_and_spends_most_of_it(budget, speed, device):
    design, seconds = designed(budget, speed, device)
    planned = sum(design.seconds.values())
    assert 0.9 * seconds <= planned <= 1.02 * seconds
    assert len({cell.name for cell in design.cells}) == len(design.cells)
    assert all(design.steps_of(cell) % 4 == 0 for cell in design.cells)


def test_more_hours_give_seeds_first_and_then_size():
    small, _ = designed("20m", 7400)
    longer, _ = designed("8h", 7400)
    gpus, _ = designed("8x100h", 4e4, "cuda")
    assert (small.size.name, small.seeds) == ("0.4M", 1)
    assert (longer.size.name, longer.seeds) == ("0.4M", 12)
    assert SIZES.index(gpus.size) > SIZES.index(longer.size)


def test_the_order_has_the_main_comparison_first():
    design, _ = designed("8h", 7400)
    first = design.cells[:30]
    assert {cell.group for cell in first} == {"E2"} and {cell.seed for cell in first} == {1, 2}
    assert len({cell.rate for cell in first}) == 5 and {cell.variant for cell in first} == set(COMPARED)
    groups = list(dict.fromkeys(cell.group for cell in design.cells))
    assert groups == ["E2", "E1", "E4", "E3", "E5"]
    assert [cell.seed > 3 for cell in design.cells] == sorted(cell.seed > 3 for cell in design.cells)


def test_a_budget_that_is_too_small_says_what_is_needed():
    with pytest.raises(UsageError, match=r"too small: the smallest study of size 0.4M takes about \d+ minutes"):
        designed("2m", 7400)


@pytest.mark.parametrize(("pairs", "effect"), [(5, 1.7), (12, 0.9)])
def test_the_power_of_pairs(pairs, effect):
    assert detectable(pairs) == pytest.approx(effect, abs=0.05)
    assert detectable(1) == float("inf")


def plan_at(folder, *more: str) -> int:
    args = parse(["plan", "--budget", "6m", "--out", str(folder), *TINY, *more])
    check(args)
    return command.main(args)


def test_a_plan_is_frozen_with_paths_of_its_own_folder(tmp_path, capsys):
    assert plan_at(tmp_path / "study", "--groups", "E2") == 0
    said = capsys.readouterr().out
    assert "claims that this plan cannot decide" in said and "C12: needs E3" in said and "at 80 % power" in said
    plan = read_yaml(tmp_path / "study" / "plan.yaml")
    assert plan["data"]["path"] == "data" and str(tmp_path) not in (tmp_path / "study" / "plan.yaml").read_text()
    recipe = recipe_of(plan, plan["cells"][0], 0.003, "data")
    assert recipe["optimizer"]["learning_rate"] == 0.003 and recipe["precision"]["residual_dtype"] == "float16"


def test_a_study_that_has_run_is_left_alone(tmp_path):
    plan_at(tmp_path / "study", "--groups", "E2")
    before = (tmp_path / "study" / "plan.yaml").read_bytes()
    write_json(tmp_path / "study" / "cells" / "e2_post" / "summary.json", {"status": "completed"})
    with pytest.raises(UserError, match=r"holds a study that has run \(e2_post\)"):
        plan_at(tmp_path / "study")
    assert (tmp_path / "study" / "plan.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--budget", "8h"], "--budget belongs to plan"),
        (["plan"], "plan needs --budget"),
        (["plan", "--budget", "8h", "--groups", "E7"], "'E7' is unknown"),
        (["export", "--out", "."], "export needs --records"),
        (["run", "--out", "nowhere"], "is not a folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(words, said):
    with pytest.raises(UsageError, match=said):
        check(parse(words))


def test_an_unknown_size_is_named_with_the_nearest():
    with pytest.raises(UsageError, match=r"size '400m' is unknown \(did you mean '400M'\?\)"):
        size_of("400m")


def test_the_parser_needs_no_torch():
    code = "import sys; import periln.scripts.arguments.study; sys.exit('torch' in sys.modules)"
    import sys

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
