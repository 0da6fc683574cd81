"""What `periln-convert` takes besides a model folder: a run folder and a PEFT adapter; and how damage is named."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_ids, shaken_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from modeling_periln import PeriLlamaForCausalLM, convert
from modeling_periln.convert import main, to_native
from periln.runkit.checkpoints import write_checkpoint
from periln.runkit.folder import RunFolder

IDS = random_ids(3, 9)
ALLOWED = 1e-5  # of the largest logit


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w60")


@torch.no_grad()
def assert_same(model, folder: Path) -> None:
    """The export in `folder`, loaded with its stock class, has the model's logits."""
    expected, found = model.eval()(input_ids=IDS).logits, AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    assert (found - expected).abs().max() <= ALLOWED * max(1.0, expected.abs().max().item())


def make_run(path: Path, tokenizer, steps: dict[int, int], **changes) -> RunFolder:
    """A run folder with a checkpoint at each step, of a model of the seed given."""
    run = RunFolder(path)
    run.claim({"stage": "pretrain"})
    for step, seed in steps.items():
        with write_checkpoint(run.checkpoint_path(step), shaken_model(seed, **changes), tokenizer):
            pass
    run.set_status("completed", step=max(steps, default=0))
    return run


def convert_to(dst: Path, src: Path, to: str = "glm4") -> int:
    return main([str(src), str(dst), "--to", to, "--text", "none"])


# Run folders


def test_of_a_run_the_newest_complete_checkpoint_is_converted(tmp_path, tokenizer, capsys):
    run = make_run(tmp_path / "run", tokenizer, {2: 5, 10: 6, 9: 7})
    assert convert_to(tmp_path / "dst", run.path) == 0
    assert_same(shaken_model(6), tmp_path / "dst")
    assert "step_00000010 is the newest complete checkpoint of the run" in capsys.readouterr().out
    assert "step_00000010" in json.loads((tmp_path / "dst" / "conversion.json").read_text())["remarks"][0]
    (run.checkpoint_path(10) / "manifest.json").unlink()  # it is written last: this one was never finished
    assert convert_to(tmp_path / "again", run.path) == 0
    assert_same(shaken_model(7), tmp_path / "again")
    assert convert_to(tmp_path / "second", run.checkpoint_path(2)) == 0
    assert_same(shaken_model(5), tmp_path / "second")


def test_damage_is_refused_by_the_files_name(tmp_path, tokenizer, capsys):
    run = make_run(tmp_path / "run", tokenizer, {1: 1, 2: 2})
    folder = run.checkpoint_path(2)

    def said(src: Path = run.path) -> str:
        assert convert_to(tmp_path / "dst", src) == 1
        assert not (tmp_path / "dst").exists() and not list(tmp_path.glob(".*"))
        return capsys.readouterr().err

    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])  # one bit
    assert f"{weights} is damaged: its hash is not the manifest's" in said()
    assert str(weights) in said(folder)  # a checkpoint by itself, too
    weights.write_bytes(whole[:-1])
    assert f"{weights} is damaged: it has {len(whole) - 1} bytes instead of {len(whole)}" in said()
    weights.unlink()
    assert f"{weights} is missing" in said()
    weights.write_bytes(whole)
    text = config.read_text()
    config.write_text(text.replace('"norm_placement": "peri"', '"norm_placement": "post"'))
    assert str(config) in said()
    config.write_text(text)
    (folder / "manifest.json").write_text('{"model.safetensors": 3}')
    assert "manifest.json is damaged" in said()
    (folder / "manifest.json").write_text("{")
    assert f"{folder / 'manifest.json'} is damaged" in said()


def test_a_run_without_a_model_to_convert_is_refused(tmp_path, tokenizer, capsys):
    empty = make_run(tmp_path / "empty", tokenizer, {})
    assert convert_to(tmp_path / "dst", empty.path) == 2
    assert f"{empty.path} is a run folder without a complete checkpoint" in capsys.readouterr().err
    diverged = make_run(tmp_path / "diverged", tokenizer, {1: 1})
    diverged.set_status("diverged", step=1)
    assert convert_to(tmp_path / "dst", diverged.path) == 2
    assert f"{diverged.path} has diverged" in capsys.readouterr().err
    assert convert_to(tmp_path / "dst", diverged.checkpoint_path(1)) == 0  # if that is what one wants


# Adapters


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="adapters are PEFT's")


def adapt(peft, base: Path, folder: Path, **more):
    """A LoRA that changes the model, saved; the adapted model."""
    torch.manual_seed(3)
    options = {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 12, "target_modules": "all-linear"}
    config = peft.LoraConfig(**options | {"init_lora_weights": False} | more)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.fixture
def base(tmp_path, tokenizer) -> Path:
    shaken_model().save_pretrained(tmp_path / "base", max_shard_size="8KB")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_an_adapter_is_merged_into_its_base_first(tmp_path, base, tokenizer, peft, capsys):
    adapted = adapt(peft, base, tmp_path / "adapter", modules_to_save=["embed_tokens"], use_rslora=True)
    spoken = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="w60")
    spoken.chat_template = "{{ messages[0]['content'] }}"
    spoken.save_pretrained(tmp_path / "adapter")
    assert convert_to(tmp_path / "dst", tmp_path / "adapter") == 0
    assert "the adapter is merged into its base, base, in FP32" in capsys.readouterr().out
    assert_same(adapted, tmp_path / "dst")
    with torch.no_grad():
        plain = shaken_model()(IDS).logits
        assert (adapted(input_ids=IDS).logits - plain).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(tmp_path / "dst").chat_template == spoken.chat_template
    assert not list(tmp_path.glob(".*"))


def test_an_adapters_base_may_be_in_half_precision_and_of_another_architecture(tmp_path, peft):
    llama = to_native(shaken_model(norm_placement="pre"), "llama").to(torch.bfloat16)
    llama.save_pretrained(tmp_path / "llama")
    adapted = adapt(peft, tmp_path / "llama", tmp_path / "adapter").float()
    assert convert_to(tmp_path / "dst", tmp_path / "adapter", "peri_llama") == 0
    assert_same(adapted, tmp_path / "dst")
    loaded = PeriLlamaForCausalLM.from_pretrained(tmp_path / "dst")
    assert loaded.dtype is torch.float32  # BF16 would not hold the sum


def test_a_run_of_adapters_and_a_base_beside_the_adapter(tmp_path, tokenizer, peft):
    """As a fine-tuning leaves it; the base by a path that is relative to the adapter."""
    pretrained = make_run(tmp_path / "run", tokenizer, {4: 1})
    run = RunFolder(tmp_path / "run" / "sft")
    run.claim({"stage": "sft"})
    run.checkpoints_path.mkdir()
    adapted = adapt(peft, pretrained.checkpoint_path(4), run.checkpoint_path(7))
    file = run.checkpoint_path(7) / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = "../../../checkpoints/step_00000004"
    file.write_text(json.dumps(config))
    (run.checkpoint_path(7) / "manifest.json").write_text("{}")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert convert_to(tmp_path / "dst", moved / "sft") == 0
    assert_same(adapted, tmp_path / "dst")


def test_the_base_that_fine_tuning_recorded_is_found_and_its_weights_are_compared(tmp_path, base, peft, capsys):
    from periln.sft.base import write_base  # imports PEFT

    adapt(peft, base, tmp_path / "adapter")
    write_base(tmp_path / "adapter", tmp_path / "adapter", base)
    shutil.copytree(tmp_path, moved := tmp_path.with_name(f"{tmp_path.name}_moved"))
    assert convert_to(moved / "dst", moved / "adapter") == 0

    shaken_model(seed=3).save_pretrained(base)  # the adapter's absolute path now leads to another model
    assert convert_to(tmp_path / "dst", tmp_path / "adapter") == 2
    assert "has other weights than it was trained on" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()
    shutil.rmtree(base)
    assert convert_to(moved / "again", moved / "adapter") == 0


def test_what_is_wrong_with_an_adapter_is_named(tmp_path, base, peft, capsys, monkeypatch):
    folder = tmp_path / "adapter"
    adapt(peft, base, folder)
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = json.loads(file.read_text())
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # not of the file, which changes
    first = min(tensors)

    def said(code: int) -> str:
        assert convert_to(tmp_path / "dst", folder) == code
        assert not (tmp_path / "dst").exists() and not list(tmp_path.glob(".*"))
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    for field, value, message in (
        ("base_model_name_or_path", str(tmp_path / "gone"), f"the base model of {folder} is missing: {tmp_path}"),
        ("base_model_name_or_path", None, "names no base model (base_model_name_or_path=None)"),
        ("task_type", "SEQ_CLS", "task_type='SEQ_CLS'"),
    ):
        file.write_text(json.dumps(config | {field: value}))
        assert message in said(2)
    file.write_text("{")
    assert f"{file} is damaged" in said(1)
    file.write_text(json.dumps(config))

    save_file({name: tensor for name, tensor in tensors.items() if name != first}, weights)
    assert f"{weights}: 1 weights are missing, the first is {first}" in said(1)
    save_file(tensors | {"base_model.model.model.layers.9.x.lora_A.weight": torch.zeros(2)}, weights)
    assert "1 weights have no place in the base, the first is base_model.model.model.layers.9" in said(1)
    save_file(tensors | {first: torch.zeros(3, 5)}, weights)
    assert f"{folder} cannot be loaded onto its base {base}: " in said(1)
    weights.write_bytes(weights.read_bytes()[:200])
    assert f"{folder} cannot be loaded onto its base" in said(1)
    weights.rename(folder / "adapter_model.bin")
    assert "has no adapter_model.safetensors; pickled weights (.bin) are not read" in said(2)
    save_file(tensors, weights)
    (folder / "model.safetensors").write_bytes(b"")
    assert "holds a model and an adapter" in said(2)
    (folder / "model.safetensors").unlink()
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "merging it needs PEFT (pip install peft)" in said(2)


def test_an_adapter_without_weights_to_merge_is_refused(tmp_path, base, peft, capsys):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    assert convert_to(tmp_path / "dst", tmp_path / "adapter") == 2
    assert "PROMPT_TUNING, which has no weights to merge" in capsys.readouterr().err


def test_an_interruption_leaves_neither_the_export_nor_the_merged_model(tmp_path, base, peft, monkeypatch):
    adapt(peft, base, tmp_path / "adapter")
    monkeypatch.setattr(convert, "compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert convert_to(tmp_path / "dst", tmp_path / "adapter") == 130
    assert not (tmp_path / "dst").exists() and not list(tmp_path.glob(".*"))
