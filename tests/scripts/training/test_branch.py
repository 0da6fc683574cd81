"""A WSD run's decay branched from a checkpoint: the run that would have decayed there from the start."""

import shutil

import pytest
import yaml
from tiny import MODEL, timeless, train, write_recipe

from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import weights_hash
from periln.scripts import pretrain
from periln.scripts.pretrain import load_recipe
from periln.scripts.training.branch import check_branch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerate")]

WSD = {"schedule": "wsd", "warmup": 0.0, "learning_rate": 5e-3}


@pytest.fixture
def trunk(tmp_path, data):
    """Twelve steps without decay; every third checkpoint stays."""
    optimizer = WSD | {"schedule": "constant"}
    return train(tmp_path, data, name="trunk", optimizer=optimizer, keep_every=3, keep_last=1)


def test_a_branch_is_the_run_that_decays_there(tmp_path, data, trunk):
    before = {p: p.read_bytes() for p in trunk.path.rglob("*") if p.is_file()}
    decaying = {"steps": 10, "optimizer": WSD | {"decay": 0.4}}  # from step 6 on
    whole = train(tmp_path, data, name="whole", **decaying)
    branch = train(tmp_path, data, name="branch", branch_from=str(trunk.checkpoint_path(6)), **decaying)
    assert timeless(branch.path) == timeless(whole.path)
    assert timeless(branch.path)[:6] == timeless(trunk.path)[:6]
    assert timeless(branch.path)[8] != timeless(trunk.path)[8]
    assert weights_hash(branch.checkpoints()[-1]) == weights_hash(whole.checkpoints()[-1])
    assert branch.status == "completed"
    assert before == {p: p.read_bytes() for p in trunk.path.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"batch_size": 8}, UsageError, "branch_from: batch_size is 4 in .*trunk, not 8"),
        ({"model": {**MODEL, "norm_placement": "pre"}}, UsageError, "branch_from: model.norm_placement is 'peri'"),
        ({"model": {**MODEL, "residual_scale": 0.5}}, UsageError, "model.residual_scale is 1.0 in .*trunk, not 0.5"),
        ({"optimizer": WSD | {"learning_rate": 1e-3}}, UsageError, "optimizer.learning_rate is 0.005 in"),
        ({"steps": 6}, UsageError, "steps 6: a branch of step 6 needs more"),
        ({"optimizer": WSD | {"decay": 0.5}, "steps": 10}, UsageError, "begins at step 5 of 10"),
        ({"optimizer": WSD | {"warmup": 0.7}}, UsageError, "would have step 6 in its warm-up"),
        ({"branch_from": "/nowhere/checkpoints/step_00000006"}, UserError, "is not a checkpoint of a run"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(tmp_path, data, trunk, fields, error, message):
    fields = {"branch_from": str(trunk.checkpoint_path(6)), "optimizer": WSD, "steps": 20, **fields}
    with pytest.raises(error, match=message):
        check_branch(load_recipe(write_recipe(tmp_path, data, name="branch", **fields))[0])


def test_what_an_older_run_does_not_name_is_as_it_was_then(tmp_path, data, trunk):
    older = {**trunk.recipe, "optimizer": {k: v for k, v in trunk.recipe["optimizer"].items() if k != "z_loss"}}
    older = {name: value for name, value in older.items() if name not in ("branch_from", "document_masking")}
    (trunk.path / "recipe.yaml").write_text(yaml.safe_dump(older))
    fields = {"branch_from": str(trunk.checkpoint_path(6)), "steps": 20}
    check_branch(load_recipe(write_recipe(tmp_path, data, name="same", optimizer=WSD, **fields))[0])
    changed = {"optimizer": WSD | {"z_loss": 1e-4}}, {"optimizer": WSD, "document_masking": True}
    for more, message in zip(changed, ("optimizer.z_loss is 0.0 in", "document_masking is False in"), strict=True):
        with pytest.raises(UsageError, match=message):
            check_branch(load_recipe(write_recipe(tmp_path, data, name="other", **fields, **more))[0])


def test_a_damaged_checkpoint_is_not_a_beginning(tmp_path, data, trunk):
    weights = trunk.checkpoint_path(6) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    file = write_recipe(tmp_path, data, name="b", branch_from=str(trunk.checkpoint_path(6)), optimizer=WSD, steps=20)
    with pytest.raises(UserError, match="branch_from: .*model.safetensors has .* bytes instead of"):
        pretrain.main(pretrain.parse(["--config", str(file), "--runs", str(tmp_path / "runs")]))
    assert not (tmp_path / "runs" / "b").exists()


def test_a_branch_that_has_begun_resumes_without_the_run_that_it_is_from(tmp_path, data, trunk):
    fields = {"steps": 10, "optimizer": WSD | {"decay": 0.4}, "branch_from": str(trunk.checkpoint_path(6))}
    branch = train(tmp_path, data, name="branch", **fields)
    expected = timeless(branch.path)
    shutil.rmtree(branch.checkpoint_path(10))
    branch.set_status("running", step=9)
    shutil.rmtree(trunk.path)
    assert timeless(train(tmp_path, data, name="branch", **fields).path) == expected
