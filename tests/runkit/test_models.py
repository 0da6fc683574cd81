"""Which model a path means, and that no weight is made up: the same answer for every stage."""

import json

import pytest
import safetensors.torch as safetensors
import torch
from small_models import make_model, make_run, make_tokenizer

from periln.eval.targets import find_measured, find_target
from periln.model_cards.subject import find_subject
from periln.runkit.checkpoints import write_checkpoint
from periln.runkit.errors import UserError
from periln.runkit.folder import RunFolder, write_json, write_text
from periln.runkit.models import find_model, load_causal_lm
from periln.sft.serve import resolve
from periln.sft.train import _source_of


@pytest.fixture
def run(tmp_path):
    """A run with whole checkpoints of steps 3 and 9."""
    run = make_run(tmp_path / "run", step=3)
    with write_checkpoint(run.checkpoint_path(9), make_model(make_tokenizer(), seed=9), make_tokenizer()):
        pass
    return run


def change_weights(folder, change):
    tensors = safetensors.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def every_answer(path):
    """The checkpoint that each stage takes: evaluation, stability (and bounds, fp16), cards and push, fine-tuning."""
    return {
        find_target(path).checkpoint,
        find_measured(str(path)).chosen.path,
        find_subject(path).checkpoint.resolve(),
        _source_of(path, "sft")[0],
    }


def test_a_run_whose_newest_checkpoint_is_damaged_is_the_same_model_everywhere(run, capsys):
    change_weights(run.checkpoint_path(9), lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.weight"))
    assert every_answer(run.path) == {run.checkpoint_path(3).resolve()}
    assert "passing over a checkpoint" in capsys.readouterr().err


def test_a_damaged_checkpoint_that_is_named_itself_is_refused_everywhere(run):
    change_weights(run.checkpoint_path(9), lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.weight"))
    path = run.checkpoint_path(9)
    for ask in (find_target, find_subject, lambda p: find_measured(str(p)), lambda p: _source_of(p, "sft")):
        with pytest.raises(UserError, match="the checkpoint is damaged"):
            ask(path)


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.pop("model.layers.0.mlp.down_proj.weight"), "lacks 1 of the model's weights, model.layers.0.mlp.down"),
    (lambda t: t.update({"model.layers.0.extra.weight": torch.ones(2)}), "holds 1 weights that the model does not"),
])  # fmt: skip
def test_weights_that_are_not_the_models_are_refused_by_whatever_loads(tmp_path, change, said):
    folder = tmp_path / "alone"  # no manifest: nothing but the weights tells
    make_model(make_tokenizer()).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    load_causal_lm(folder)
    change_weights(folder, change)
    for load in (
        lambda: find_target(folder).load("cpu"),
        lambda: find_measured(str(folder)).chosen.load(torch.float32, "cpu", False),
        lambda: load_causal_lm(folder),
    ):
        with pytest.raises(UserError, match=said):
            load()


def test_a_fine_tuning_is_the_checkpoint_that_best_json_names(run):
    recipe = run.path / "recipe.yaml"
    write_text(recipe, "stage: sft\n")
    write_json(run.path / "best.json", {"checkpoint": "checkpoints/step_00000003", "step": 3})
    assert every_answer(run.path) == {run.checkpoint_path(3).resolve()}
    (run.checkpoint_path(3) / "config.json").write_text("{}")
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        find_model(run.path).checkpoint()


def test_serving_takes_a_run_folder(run, monkeypatch):
    monkeypatch.setattr("periln.sft.serve.is_serve_available", lambda: True)
    folder = run.checkpoint_path(9)
    (folder / "chat_template.jinja").write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "chat_template.jinja" not in manifest
    words = [str(run.path), "--port", "8000"]
    resolve(words)
    assert words == [str(folder.resolve()), "--port", "8000"]


def test_a_run_without_a_whole_checkpoint_is_named_with_its_status(tmp_path):
    run = RunFolder(tmp_path / "run")
    write_text(run.path / "recipe.yaml", "stage: pretrain\n")
    with pytest.raises(UserError, match="has no whole checkpoint .status: not started"):
        find_model(run.path).checkpoint()
