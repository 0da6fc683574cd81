"""Recipes: every mistake is one sentence that names the field."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from periln.runkit.errors import UsageError, UserError
from periln.runkit.recipes import (
    apply_overrides,
    differing_fields,
    dump_yaml,
    from_mapping,
    merge,
    read_yaml,
    to_mapping,
)


@dataclass
class Section:
    rate: float = 1e-3
    mode: Literal["fp16", "fp32"] = "fp16"


@dataclass
class Example:
    name: str
    steps: int
    clip: float | None = None
    seeds: list[int] = field(default_factory=list)
    section: Section = field(default_factory=Section)


def test_yaml_reads_back_what_was_written(tmp_path):
    recipe = from_mapping(Example, {"name": "a", "steps": 3, "section": {"rate": 2}})
    (tmp_path / "r.yaml").write_text(dump_yaml(to_mapping(recipe)))
    assert from_mapping(Example, read_yaml(tmp_path / "r.yaml")) == recipe
    assert recipe.section.rate == 2.0


def test_a_rate_may_be_written_without_a_dot(tmp_path):
    (tmp_path / "r.yaml").write_text("rate: 2e-3\nother: -1E5\nword: 2e-3x\n")
    assert read_yaml(tmp_path / "r.yaml") == {"rate": 0.002, "other": -1e5, "word": "2e-3x"}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"name": "a", "stepps": 3}, r"unknown field stepps \(did you mean 'steps'\?\)"),
        ({"name": "a", "steps": 3, "section": {"rte": 1}}, r"unknown field section\.rte \(did you mean 'rate'"),
        ({"name": "a"}, "the field steps is missing"),
        ({"name": "a", "steps": "3"}, "steps must be int, not '3'"),
        ({"name": "a", "steps": True}, "steps must be int, not True"),
        ({"name": "a", "steps": 3, "clip": "no"}, "clip must be float | null, not 'no'"),
        ({"name": "a", "steps": 3, "seeds": [1, "b"]}, r"seeds must be list\[int\]"),
        (
            {"name": "a", "steps": 3, "section": {"mode": "fp8"}},
            "section.mode must be one of 'fp16', 'fp32', not 'fp8'",
        ),
        ({"name": "a", "steps": 3, "section": 7}, "section must be a section with fields, not 7"),
    ],
)
def test_mistakes_name_field_and_value(mapping, message):
    with pytest.raises(UsageError, match=message.replace("|", r"\|")):
        from_mapping(Example, mapping)


def test_yaml_is_safe_and_keys_stand_once(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("a: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        read_yaml(file)
    file.write_text("a: 1\na: 2\n")
    with pytest.raises(UsageError, match="field 'a' appears twice"):
        read_yaml(file)
    file.write_text("- 1\n")
    with pytest.raises(UsageError, match="must hold a mapping"):
        read_yaml(file)
    with pytest.raises(UserError, match=r"cannot read the recipe .*none\.yaml"):
        read_yaml(tmp_path / "none.yaml")


def test_differences_are_named_by_section():
    old, new = {"a": 1, "s": {"x": 1, "y": 2}}, {"a": 1, "s": {"x": 3}, "b": None}
    assert differing_fields(old, new) == ["s.x: 1 -> 3", "s.y: 2 -> None"]


# --- inheritance ---------------------------------------------------------------------------------------------


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".yaml").write_text(text)


def test_a_recipe_says_only_what_differs_from_its_base(tmp_path):
    write(
        tmp_path,
        deep__paper="name: paper\nsteps: 9\nseeds: [1, 2]\nclip: 1.0\nsection: {rate: 1e-3, mode: fp32}\n",
        middle="base: deep/paper.yaml\nseeds: [3]\nsection: {rate: 5}\n",
        leaf="base: middle.yaml\nname: leaf\nclip: null\n",
    )
    resolved = read_yaml(tmp_path / "leaf.yaml")
    assert resolved == {
        "name": "leaf", "steps": 9, "seeds": [3], "clip": None, "section": {"rate": 5, "mode": "fp32"}
    }  # fmt: skip
    (tmp_path / "resolved.yaml").write_text(dump_yaml(resolved))
    assert read_yaml(tmp_path / "resolved.yaml") == resolved  # what a run folder keeps needs no other file


def test_a_section_of_null_forgets_the_bases_section():
    base = {"name": "a", "steps": 3, "section": {"rate": 7.0, "mode": "fp32"}}
    assert from_mapping(Example, merge(base, {"section": None})).section == Section()
    assert from_mapping(Example, merge(merge(base, {"section": None}), {"section": {"rate": 2}})).section == Section(
        2.0
    )
    assert base["section"] == {"rate": 7.0, "mode": "fp32"}


def test_a_base_that_cannot_be_used_is_named(tmp_path):
    write(
        tmp_path,
        a="base: b.yaml\n",
        b="base: ./a.yaml\n",
        c="base: none.yaml\n",
        d="base: [a.yaml]\n",
        e="base: f.yaml\n",
    )
    write(tmp_path, f="steps: 1\nsteps: 2\n")
    with pytest.raises(UsageError, match=r"in a circle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"c\.yaml: base: cannot read the recipe .*none\.yaml: No such file"):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(UsageError, match=r"d\.yaml: base must be the path of another recipe, not \['a\.yaml'\]"):
        read_yaml(tmp_path / "d.yaml")
    with pytest.raises(UsageError, match=r"e\.yaml: base: .*f\.yaml is not valid YAML: field 'steps' appears twice"):
        read_yaml(tmp_path / "e.yaml")


def test_overrides_are_yaml_and_leave_the_rest_alone():
    mapping = {"name": "a", "steps": 3, "section": {"mode": "fp32"}}
    changed = apply_overrides(mapping, ["section.rate=1e-3", "seeds=[1, 2]", "clip=null", "name=b=c"], Example)
    assert changed == {
        "name": "b=c", "steps": 3, "section": {"mode": "fp32", "rate": 0.001}, "seeds": [1, 2], "clip": None
    }  # fmt: skip
    assert mapping == {"name": "a", "steps": 3, "section": {"mode": "fp32"}}


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["steps"], "'steps' is not an assignment: write field=value"),
        (["section..rate=1"], "is not an assignment"),
        (["clip="], "'clip=' has no value: write clip=null for none"),
        (["steps=1", "steps=2"], "steps is assigned twice"),
        (["stepps=1"], r"unknown field stepps \(did you mean 'steps'\?\)"),
        (["section.rte=1"], r"unknown field section\.rte \(did you mean 'rate'\?\)"),
        (["sektion.rate=1"], r"unknown field sektion \(did you mean 'section'\?\)"),
        (["steps.rate=1"], r"steps\.rate: steps is a value, not a section"),
        (["clip.rate=1"], r"clip\.rate: clip is a value, not a section"),
        (["steps=[1"], r"steps: '\[1' is not valid YAML"),
    ],
)
def test_overrides_that_say_nothing_are_refused(assignments, message):
    with pytest.raises(UsageError, match=message):
        apply_overrides({"name": "a", "steps": 3}, assignments, Example)
