"""What may change between two starts of one run, and what a run does that is older than a field."""

import json
from dataclasses import asdict, dataclass, field

import pytest

from periln.runkit.errors import UserError
from periln.runkit.folder import RunFolder, write_text
from periln.runkit.recipes import apply_overrides, dump_yaml, from_mapping
from periln.runkit.resume import BITS, NOTHING, PLACE, resumption, setting


@dataclass
class Section:
    rate: float = 0.5
    kept: int = setting(3, decides=NOTHING)
    young: int = setting(7, before=0)


@dataclass
class Maybe:
    rank: int = 16
    young: bool = setting(True, before=False)


@dataclass
class Recipe:
    steps: int
    data: str = setting("text", decides=PLACE)
    device: str = setting("cpu", decides=BITS)
    model: dict = field(default_factory=dict)
    section: Section = field(default_factory=Section)
    maybe: Maybe | None = None


BEGAN = {"steps": 5, "data": "a/b", "device": "cpu", "model": {"width": 8}, "section": asdict(Section())}
BEGAN |= {"maybe": None}


def make(**changes) -> Recipe:
    return from_mapping(Recipe, BEGAN | changes)


def test_an_equal_recipe_goes_on_without_a_word():
    found = resumption(BEGAN, make())
    assert found.recipe == make() and not (found.changes or found.kept or found.different)
    assert not resumption(BEGAN, make(data="a//b/")).changes  # the same path, spelled in another way


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 6}, "steps: 5 -> 6"),
        ({"model": {"width": 9}}, "model.width: 8 -> 9"),
        ({"section": {"rate": 0.1}}, "section.rate: 0.5 -> 0.1"),
        ({"maybe": {"rank": 4}}, "maybe.rank: None -> 4"),
    ],
)
def test_what_decides_the_result_may_not_change(changes, said):
    assert said in resumption(BEGAN, make(**changes)).different


def test_what_does_not_decide_it_may_and_is_told_with_what_it_does():
    changed = make(device="cuda", data="c/d", section={"kept": 9})
    found = resumption(BEGAN, changed)
    assert found.recipe == changed and not found.different
    assert [str(change) for change in found.changes] == [
        "data: 'a/b' -> 'c/d' (only the place differs)",
        "device: 'cpu' -> 'cuda' (the computation is the same, but its bits will differ)",
        "section.kept: 3 -> 9 (this does not decide the result)",
    ]


def test_a_run_older_than_a_field_goes_on_as_before_it_existed():
    old = BEGAN | {"section": {"rate": 0.5, "kept": 3}, "maybe": {"rank": 4}}
    found = resumption(old, make(maybe={"rank": 4}))
    assert found.recipe.section.young == 0 and found.recipe.maybe == Maybe(rank=4, young=False)
    assert not found.different and found.kept == [
        "section.young stays 0: the run began before this field existed",
        "maybe.young stays False: the run began before this field existed",
    ]
    assert resumption(old, make(section={"young": 2}, maybe={"rank": 4})).different == ["section.young: 0 -> 2"]


def test_a_run_older_than_a_field_whose_default_is_what_runs_did_goes_on():
    for name in ("device", "section", "maybe", "model"):
        old = {key: value for key, value in BEGAN.items() if key != name}
        found = resumption(old, make(section={"young": 7}, model={}) if name == "model" else make())
        assert found.recipe.steps == 5 and not found.different, name


def test_a_field_that_always_had_to_be_given_is_missed_and_an_unknown_one_is_named():
    assert resumption({}, make()).different[0] == "steps: not named -> 5"
    said = resumption(BEGAN | {"dropout": 0.1}, make()).different
    assert said == ["dropout: 0.1 -> a field that this version does not know"]


def test_a_claim_writes_what_has_changed_and_keeps_what_it_was(tmp_path):
    run, told = RunFolder(tmp_path / "run"), []
    run.claim(make())
    write_text(run.metrics_path, '{"step": 0}\n{"step": 1}\n')
    run.claim(make(device="cuda"), told.append)
    assert run.recipe["device"] == "cuda" and len(told) == 1 and "bits will differ" in told[0]
    changes = (run.path / "changes.jsonl").read_text().splitlines()
    assert json.loads(changes[0]) == {"step": 2, "field": "device", "old": "cpu", "new": "cuda"} and len(changes) == 1
    with pytest.raises(UserError, match=r"another recipe \(steps: 5 -> 6\)"):
        run.claim(make(steps=6, device="cpu"), told.append)
    assert run.recipe["device"] == "cuda" and len(told) == 1


def test_a_claim_of_an_older_version_is_written_whole(tmp_path):
    run = RunFolder(tmp_path)
    write_text(run.path / "recipe.yaml", dump_yaml(BEGAN | {"section": {"rate": 0.5, "kept": 3}}))
    write_text(run.metrics_path, '{"step": 0}\n')
    assert run.claim(make(), lambda line: None).section.young == 0
    assert run.recipe["section"] == {"rate": 0.5, "kept": 3, "young": 0}


def test_a_field_of_a_section_that_is_null_can_be_set():
    mapping = apply_overrides(BEGAN, ["maybe.rank=4"], Recipe)
    assert from_mapping(Recipe, mapping).maybe == Maybe(rank=4)
    assert from_mapping(Recipe, apply_overrides(mapping, ["maybe=null"], Recipe)).maybe is None
    assert from_mapping(Recipe, apply_overrides(BEGAN, ["maybe={}"], Recipe)).maybe == Maybe()
    with pytest.raises(UserError, match=r"unknown field maybe\.rnk \(did you mean 'rank'\?\)"):
        apply_overrides(BEGAN, ["maybe.rnk=4"], Recipe)
