"""Recipes: every mistake is one sentence that names the field."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from runkit.errors import UsageError, UserError
from runkit.recipes import differing_fields, dump_yaml, from_mapping, read_yaml, to_mapping


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
    with pytest.raises(UsageError, match="field 'a' stands twice"):
        read_yaml(file)
    file.write_text("- 1\n")
    with pytest.raises(UsageError, match="must hold a mapping"):
        read_yaml(file)
    with pytest.raises(UserError, match=r"cannot read the recipe .*none\.yaml"):
        read_yaml(tmp_path / "none.yaml")


def test_differences_are_named_by_section():
    old, new = {"a": 1, "s": {"x": 1, "y": 2}}, {"a": 1, "s": {"x": 3}, "b": None}
    assert differing_fields(old, new) == ["s.x: 1 -> 3", "s.y: 2 -> None"]
