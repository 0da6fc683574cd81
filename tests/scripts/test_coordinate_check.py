"""The coordinate check: standard fails, mup passes in width, completep in both; its files; what it refuses."""

import json

import pytest
from tiny import MODEL, called

from periln.runkit.errors import UsageError, UserError
from periln.runkit.recipes import dump_yaml, from_mapping
from periln.scripts.arguments.coordinate_check import RULES, check, parse
from periln.scripts.coordinate_check.command import sizes_of
from periln.scripts.coordinate_check.measure import TENSORS, measure, power, recipe_of, verdicts
from periln.scripts.parametrization import ALPHAS
from periln.scripts.recipe import Recipe


def base(placement="pre", **more) -> Recipe:
    model = {**MODEL, "norm_placement": placement, "num_attention_heads": 2, "head_dim": 16, "vocab_size": 512}
    fields = {"name": "r", "data": "d", "steps": 1, "batch_size": 4, "sequence_length": 32, "model": model}
    return from_mapping(Recipe, {**fields, **more})


def verdict(rule: str, axis: str, sizes: list[int], placement: str, steps=6, tolerance=0.25, **more) -> dict:
    rows = []
    for size in sizes:
        width, depth = (size, 2) if axis == "width" else (32, size)
        recipe = recipe_of(base(placement, **more), rule, width, depth, (32, 2), 512)
        for seed in (0, 1):
            shared = {"rule": rule, "axis": axis, "size_of_model": size, "seed": seed}
            rows += [shared | row for row in measure(recipe, steps, (4, 64), seed)]
    return verdicts(rows, tolerance)[0]


def test_a_power_is_the_slope_in_logarithms():
    assert power([2, 4, 8], [3, 6, 12]) == pytest.approx(1)
    assert power([2, 4, 8], [4, 4, 4]) == pytest.approx(0)
    assert power([1, 4], [8, 4]) == pytest.approx(-0.5)
    assert power([2, 4], [1.0, float("inf")]) == float("inf")


def test_the_rules_of_the_command_are_those_of_the_recipe():
    assert tuple(ALPHAS) == RULES


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["pre", "peri"])
def test_in_width_standard_fails_and_mup_passes(placement):
    sizes = [32, 64, 128, 256]
    standard, mup = (verdict(rule, "width", sizes, placement) for rule in ("standard", "mup"))
    assert not standard["passes"]
    assert standard["powers"]["attention"] > 0.8 and standard["powers"]["logits"] > 0.4
    assert mup["passes"], mup["powers"]


@pytest.mark.slow
def test_in_depth_mup_fails_and_the_depth_rules_pass():
    sizes = [2, 4, 8]
    mup, depth_mup, completep = (verdict(r, "depth", sizes, "pre") for r in ("mup", "depth_mup", "completep"))
    assert not mup["passes"] and mup["powers"]["stream"] > completep["powers"]["stream"] + 0.2
    assert depth_mup["passes"] and completep["passes"], (depth_mup["powers"], completep["powers"])
    # Lazy learning (2505.01618): under depth_mup a layer's own share shrinks with the depth.
    assert depth_mup["powers"]["mlp"] < completep["powers"]["mlp"]


@pytest.mark.slow
def test_in_width_muon_passes_under_mup_and_fails_without():
    muon = {"optimizer": {"name": "muon"}}
    standard, mup = (verdict(rule, "width", [32, 64, 128], "pre", **muon) for rule in ("standard", "mup"))
    assert not standard["passes"] and standard["powers"]["mlp"] > 0.5
    assert mup["passes"], mup["powers"]


def test_a_wider_model_has_more_heads_and_a_wider_ffn():
    recipe = recipe_of(base(), "mup", 128, 3, (32, 2), 512)
    config = recipe.model_config()
    assert (config.num_attention_heads, config.head_dim, config.num_hidden_layers) == (8, 16, 3)
    assert config.intermediate_size / config.hidden_size == MODEL["intermediate_size"] / MODEL["hidden_size"]
    assert recipe.parametrization.base_width == 32
    with pytest.raises(UsageError, match="--widths 40 is not a multiple of the recipe's head, 16"):
        recipe_of(base(), "mup", 40, 2, (32, 2), 512)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rules", "mupp"], r"--rules 'mupp' is none of .*'mup'"),
        (["--widths", "64", "64"], "--widths 64 64: give different sizes"),
        (["--widths", "64", "--depths", "2"], "--widths and --depths have one size each"),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--tolerance", "0"], "--tolerance must be above 0"),
    ],
)
def test_a_mistake_is_refused(tmp_path, words, message):
    (tmp_path / "r.yaml").write_text("name: x\n")
    with pytest.raises(UsageError, match=message):
        check(parse([str(tmp_path / "r.yaml"), "--out", str(tmp_path), *words]))


def test_a_result_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "coordinate_check.json").write_text("{}")
    (tmp_path / "r.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match="coordinate_check.json exists: give another --out"):
        check(parse([str(tmp_path / "r.yaml"), "--out", str(tmp_path)]))


def test_one_axis_alone_is_enough(tmp_path):
    args = parse(["r.yaml", "--out", "x", "--widths", "64", "128", "--depths", "4"])
    assert sizes_of(args) == [("width", 64, 4), ("width", 128, 4)]


@pytest.mark.slow
def test_the_command_writes_a_table_a_picture_and_json(tmp_path):
    recipe = {"name": "r", "data": "nowhere", "steps": 1, "batch_size": 4, "sequence_length": 32}
    (tmp_path / "r.yaml").write_text(dump_yaml(recipe | {"model": MODEL | {"norm_placement": "pre"}}))
    sizes = ["--widths", 32, 64, "--depths", 2, 3, "--steps", 2, "--seeds", 1, "--vocabulary", 64]
    done = called("scripts.coordinate_check", tmp_path / "r.yaml", "--out", tmp_path / "out", *sizes, "--threads", 1)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "coordinate_check.json").read_text())
    assert {(one["rule"], one["axis"]) for one in found["verdicts"]} == {
        (rule, axis) for rule in ("standard", "mup", "completep") for axis in ("width", "depth")
    }
    assert len(found["rows"]) == 3 * 4 * 3 * len(TENSORS)
    assert (tmp_path / "out" / "coordinate_check.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out" / "coordinate_check.md").read_text()
    assert "| standard | width | 32, 64 |" in table and table.strip() in done.stdout
