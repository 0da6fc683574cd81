"""LoRA: adapters are saved, loaded, and merged back into a model with the same logits."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import AutoPeftModelForCausalLM
from peft.tuners.lora import LoraModel
from small import make_model, make_run, tune, write_recipe
from transformers import AutoModelForCausalLM

from periln.runkit.errors import UserError
from periln.runkit.folder import RunFolder
from periln.sft.lora import add_adapters, merge
from periln.sft.recipe import Lora

IDS = torch.arange(24).view(2, 12)


@pytest.mark.slow
def test_an_adapter_is_trained_alone_loaded_with_peft_and_merged(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    run = make_run(tmp_path, "post")
    file = write_recipe(tmp_path, epochs=1, learning_rate=0.05, peft={"r": 4, "dropout": 0.0})
    assert tune(file, run, "--peft", "--merge") == 0
    tuned = RunFolder(run.path / "sft-lora")
    summary = tuned.summary
    # Layers, modules, A and B, rank, width; and the turn tokens' rows of embedding and head.
    assert summary["parameters_trained"] == 2 * 2 * 2 * 4 * 32 + 2 * 3 * 32
    checkpoint = tuned.checkpoints()[-1]
    assert {p.suffix for p in checkpoint.rglob("*") if p.is_file()} == {".safetensors", ".json", ".jinja"}
    adapted = AutoPeftModelForCausalLM.from_pretrained(checkpoint).eval()
    merged = AutoModelForCausalLM.from_pretrained(tuned.path / "merged" / checkpoint.name).eval()
    base = AutoModelForCausalLM.from_pretrained(run.checkpoints()[-1]).eval()
    with torch.no_grad():
        logits = adapted(input_ids=IDS).logits
        assert torch.allclose(merged(IDS).logits, logits, atol=1e-5)
        assert not torch.allclose(base(IDS).logits, logits, atol=1e-2)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert len(merged.generation_config.eos_token_id) == 2
    shutil.rmtree(run.checkpoints()[-1])
    with pytest.raises(UserError, match="the base model of .* is missing"):
        merge(checkpoint, tmp_path / "again")


def test_modules_that_are_not_there_are_one_sentence():
    with pytest.raises(UserError, match="peft.target_modules: .*nowhere"):
        add_adapters(make_model()[0], Lora(target_modules=["nowhere"]), seed=1)


@pytest.mark.parametrize("placement", ["post", "pre", "peri", "output", "pre_post", "deepnorm", "lns", "mix"])
def test_every_placement_has_default_modules_and_the_seed_decides_the_start(placement):
    one, same, other = (add_adapters(make_model(placement)[0], Lora(), seed) for seed in (1, 1, 2))
    assert one.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    states = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in (one, same, other)]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert not all(torch.equal(states[0][n], states[2][n]) for n in states[0])


def test_a_merged_model_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(run.checkpoints()[-1])
    adapted, tokenizer = add_adapters(model, Lora(r=2), seed=1), make_model()[1]
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    real = LoraModel.merge_and_unload

    def spoiled(self):
        merged = real(self)
        merged.lm_head.weight.data[0] += 1e-2
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", spoiled)
    with pytest.raises(UserError, match="merged in, it changes a logit by .*e-0.; .*out is not written"):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_an_adapter_cannot_be_merged(tmp_path):
    checkpoint = make_run(tmp_path).checkpoints()[-1]
    with pytest.raises(UserError, match="holds no adapter"):
        merge(checkpoint, tmp_path / "merged")
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "peri_llama"
