"""Several held-out texts with names, each loss in the records."""

import json

import pytest
from tiny import timeless, train, write_recipe

from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import RunFolder, sha256_of
from periln.scripts.pretrain import load_recipe
from periln.scripts.training.heldout import heldout_loss
from periln.scripts.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerate")]

FP32 = {"mode": "fp32", "residual_dtype": None}


@pytest.fixture
def sets(tmp_path, data):
    """The data's own held-out text under another name, and another text."""
    other = tmp_path / "numbers.jsonl"
    other.write_text("".join(json.dumps({"text": " ".join(map(str, range(n, n + 200)))}) + "\n" for n in range(3)))
    return {"own": str(data / "heldout.jsonl"), "numbers": str(other)}


def test_each_sets_loss_is_in_the_records_and_changes_nothing_else(tmp_path, data, sets):
    shared = {"heldout_every": 4, "heldout_sequences": 5, "precision": FP32}
    run = train(tmp_path, data, heldout_sets=sets, **shared)
    held = [r for r in run.metrics() if "heldout_loss" in r]
    assert [r["step"] for r in held] == [3, 7, 11]
    for record in held:
        assert record["heldout_loss/own"] == record["heldout_loss"]
        assert abs(record["heldout_loss/numbers"] - record["heldout_loss"]) > 0.01
    assert held[-1]["heldout_loss/numbers"] < held[0]["heldout_loss/numbers"]
    seen = json.loads((run.path / "environment.json").read_text())["heldout_sets"]
    assert seen == {name: sha256_of(path) for name, path in sets.items()}
    plain = train(tmp_path, data, name="plain", **shared)
    ours = [{k: v for k, v in r.items() if not k.startswith("heldout_loss/")} for r in timeless(run.path)]
    assert ours == timeless(plain.path)


def test_a_set_that_has_changed_is_refused(tmp_path, data, sets):
    file = write_recipe(tmp_path, data, heldout_every=4, heldout_sets=sets, precision=FP32)
    recipe, tokens = load_recipe(file)
    trainer = Trainer(recipe, RunFolder(tmp_path / "run"), tokens)
    trainer._train_step(witness=True)
    assert heldout_loss(trainer.engine, *trainer.heldout_sets["numbers"], 2) > 1
    with open(sets["numbers"], "a") as other:
        other.write(json.dumps({"text": "more"}) + "\n")
    with pytest.raises(UserError, match="heldout_sets.numbers: .* has changed since the run began"):
        Trainer(recipe, RunFolder(tmp_path / "run"), tokens)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"heldout_sets": {"a": "x"}}, UsageError, "heldout_sets needs heldout_every"),
        ({"heldout_sets": {"a/b": "x"}, "heldout_every": 3}, UsageError, "heldout_sets: 'a/b' is not a name"),
        (
            {"heldout_sets": {"a": 3}, "heldout_every": 3},
            UsageError,
            "heldout_sets.a must be the path of a file, not 3",
        ),
        ({"heldout_sets": {"a": "/nowhere"}, "heldout_every": 3}, UserError, "heldout_sets.a: /nowhere holds no doc"),
    ],
)
def test_mistakes_in_sets_are_found_before_the_first_step(tmp_path, data, fields, error, message):
    with pytest.raises(error, match=message):
        load_recipe(write_recipe(tmp_path, data, **fields))
