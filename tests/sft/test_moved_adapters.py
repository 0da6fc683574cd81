"""A fine-tuning is decided by its model's weights and its conversations, wherever they and its folder lie."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from small import make_run, timeless, tune, write_recipe

from modeling_periln.convert import main as convert
from periln.runkit.checkpoints import damage_of
from periln.runkit.errors import UserError
from periln.runkit.folder import RunFolder, read_json, weights_hash, write_text
from periln.runkit.recipes import dump_yaml
from periln.sft import trainer
from periln.sft.base import base_of, load_float32
from periln.sft.lora import merge

pytestmark = pytest.mark.usefixtures("own_process")
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


def stop_at(step: int, monkeypatch) -> None:
    plain = trainer.Recorder.on_step_begin
    at = [step]

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in at:
            at.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        plain(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainer.Recorder, "on_step_begin", on_step_begin)


@pytest.mark.slow
def test_a_moved_run_keeps_its_adapters_base_and_resumes_to_the_bit(tmp_path, monkeypatch, capsys):
    before, after = tmp_path / "before", tmp_path / "after" / "deeper"
    before.mkdir()
    run, fields = make_run(before), {"epochs": 2, "learning_rate": 0.01, "peft": LORA}
    file = write_recipe(before, **fields)
    assert tune(file, run, "--peft", "--name", "untouched") == 0
    stop_at(5, monkeypatch)
    assert tune(file, run, "--peft", "--name", "adapter") == 143
    recipe = read = RunFolder(run.path / "adapter").recipe
    del read["save_every"], read["peft"]["dropout"]  # of a version without them
    write_text(run.path / "adapter" / "recipe.yaml", dump_yaml(recipe))
    shutil.move(before, after)
    moved, file = RunFolder(after / "run"), write_recipe(after, **fields, keep=1)
    capsys.readouterr()
    assert tune(file, moved, "--peft", "--name", "adapter", "--merge") == 0
    said = capsys.readouterr().out
    assert "(only the place differs)" in said and "keep: None -> 1 (this does not decide the result)" in said
    tuned, untouched = RunFolder(moved.path / "adapter"), RunFolder(moved.path / "untouched")
    assert timeless(tuned) == timeless(untouched)
    assert weights_hash(tuned.checkpoints()[-1]) == weights_hash(untouched.checkpoints()[-1])
    # One that was written before the move, whose absolute path leads nowhere.
    adapter = untouched.checkpoints()[-1]
    assert not Path(read_json(adapter / "adapter_config.json")["base_model_name_or_path"]).exists()
    assert read_json(adapter / "base.json")["path"] == "../../../checkpoints/step_00000001"
    assert base_of(adapter) == moved.checkpoints()[-1].resolve()
    # PEFT's own classes look nowhere else than in adapter_config.json: a resume, or one command, names the base there.
    written = read_json(tuned.checkpoints()[-1] / "adapter_config.json")["base_model_name_or_path"]
    assert Path(written) == moved.checkpoints()[-1].resolve()
    with pytest.raises(Exception, match="before"):
        AutoPeftModelForCausalLM.from_pretrained(adapter)
    before = {file.name: file.read_bytes() for file in adapter.iterdir() if file.is_file()}
    monkeypatch.chdir(adapter)
    assert convert(["--refresh-code", "."]) == 0
    assert capsys.readouterr().out == ".: adapter_config.json, manifest.json replaced\n"
    assert convert(["--refresh-code", str(adapter)]) == 0
    assert "names its base by the right path already" in capsys.readouterr().out
    after = {file.name: file.read_bytes() for file in adapter.iterdir() if file.is_file()}
    assert {name for name in before if before[name] != after[name]} == {"adapter_config.json", "manifest.json"}
    assert after.keys() == before.keys() and damage_of(adapter) is None
    ids = torch.arange(3, 11)[None]
    stock = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()(input_ids=ids).logits
    assert torch.equal(stock, load_float32(tuned.checkpoints()[-1]).eval()(input_ids=ids).logits)
    merge(adapter, tmp_path / "merged")
    assert weights_hash(tmp_path / "merged") == weights_hash(tuned.path / "merged" / tuned.checkpoints()[-1].name)
    shutil.copytree(make_run(tmp_path, "pre").checkpoints()[-1], moved.checkpoints()[-1], dirs_exist_ok=True)
    with pytest.raises(UserError, match="the base model of .* has other weights than it was trained on"):
        base_of(adapter)


@pytest.mark.slow
def test_the_corrected_command_runs_after_a_refused_one(tmp_path, capsys):
    run, fields = make_run(tmp_path), {"epochs": 1}
    wrong = ["--peft", "--set", "peft.target_modules=[q_prj]"]
    assert tune(write_recipe(tmp_path, **fields), run, *wrong) == 2
    assert "peft.target_modules: " in capsys.readouterr().err and not (run.path / "sft-lora").exists()
    RunFolder(run.path / "sft-lora").claim({"stage": "sft", "peft": {"target_modules": ["q_prj"]}})  # as it once did
    RunFolder(run.path / "sft-lora").set_status("failed", reason="q_prj")
    assert tune(write_recipe(tmp_path, **fields), run, "--set", "peft.r=3", "peft.target_modules=[q_proj]") == 0
    recipe = RunFolder(run.path / "sft-lora").recipe
    assert (recipe["stage"], recipe["peft"]["r"], recipe["peft"]["target_modules"]) == ("sft", 3, ["q_proj"])
