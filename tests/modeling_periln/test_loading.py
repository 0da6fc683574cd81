"""Ways to load a checkpoint: onto devices, in shards, in a dtype, under other names, damaged, quantized."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import infer_auto_device_map, init_empty_weights, load_checkpoint_and_dispatch
from safetensors.torch import load_file, save_file
from tiny_models import INSIDE, OWN, SLIDING, random_ids, shaken_model, tiny_config
from transformers import AutoModelForCausalLM

from modeling_periln import PeriLlamaForCausalLM, PeriLlamaModel

FROZEN = {"output_norm_learnable": False, "norm_type": "layernorm"}


def same_state(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


# Devices


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_changes_nothing_but_the_place(device_map, tmp_path):
    model = shaken_model(qk_norm="head")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert same_state(loaded, model)
    assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)


@pytest.mark.parametrize("placement", ["post", "peri"])
def test_layers_offloaded_to_the_disk_compute_and_generate_the_same(placement, tmp_path):
    """The residual add mixes a layer's input and output: a layer that is split would meet two devices."""
    model = shaken_model(norm_placement=placement)
    model.save_pretrained(tmp_path / "model")
    whole = sum(t.nbytes for t in model.state_dict().values())
    layers = model._no_split_modules
    places = infer_auto_device_map(model, max_memory={"cpu": whole * 2 // 3}, no_split_module_classes=layers)
    assert set(places.values()) == {"cpu", "disk"}
    assert {f"model.layers.{i}" for i in range(3)} <= places.keys()
    more = {"device_map": places, "offload_folder": tmp_path / "offload"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **more).eval()
    away = {name for name, p in loaded.named_parameters() if p.device.type == "meta"}
    assert any("layers.2" in name for name in away)
    ids = random_ids()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    more = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **more), model.generate(ids, **more))


@pytest.mark.parametrize("changes", [{}, FROZEN])
def test_a_model_made_without_memory_is_whole_once_its_checkpoint_is_loaded(changes, tmp_path):
    model = shaken_model(**changes)
    model.save_pretrained(tmp_path)
    with init_empty_weights():
        empty = PeriLlamaForCausalLM(tiny_config(**changes)).eval()
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    empty = load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"})
    assert torch.equal(empty(random_ids()).logits, model(random_ids()).logits)


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
def test_frozen_norms_have_memory_where_only_parameters_are_made_without(norm_type):
    """So a serving engine makes a model; the frozen gains are buffers, which it would not fill later."""
    with init_empty_weights(include_buffers=False):
        empty = PeriLlamaForCausalLM(tiny_config(output_norm_learnable=False, norm_type=norm_type))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    frozen = {name: b for name, b in empty.named_buffers() if "output_norm" in name}
    assert len(frozen) == 3 * 2 * (1 if norm_type == "rmsnorm" else 2)
    for name, buffer in frozen.items():
        assert torch.equal(buffer, torch.full((20,), float(name.endswith("weight")))), name


def test_what_the_meta_device_left_out_is_made_by_the_models_own_initialization():
    """As sharding trainers do: build on `meta`, allocate, initialize. The rotary frequencies are in no checkpoint."""
    model = shaken_model(**FROZEN)
    with torch.device("meta"):
        other = PeriLlamaForCausalLM(tiny_config(**FROZEN)).eval()
    other.to_empty(device="cpu")
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data.fill_(7.0)
    other.apply(other._init_weights)
    fresh = {name: t for name, t in other.state_dict().items() if "norm" in name}
    assert all(torch.equal(t, torch.full_like(t, float(name.endswith("weight")))) for name, t in fresh.items())
    assert other.model.embed_tokens.weight.std() < 0.1
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(random_ids()).logits, model(random_ids()).logits)


# Files


@pytest.mark.parametrize("changes", [{"qk_norm": "full"}, {**FROZEN, "tie_word_embeddings": True}])
def test_a_checkpoint_in_shards_is_the_same_model(changes, tmp_path):
    model = shaken_model(**changes)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    assert model.state_dict().keys() - index.keys() == (
        {"lm_head.weight"} if "tie_word_embeddings" in changes else set()
    )
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert same_state(loaded, model)
    assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
def test_frozen_norms_are_saved_loaded_and_stay_frozen(norm_type, tmp_path):
    frozen = {"output_norm_learnable": False, "norm_type": norm_type}
    model = shaken_model(**frozen)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == shaken_model(norm_type=norm_type).state_dict().keys()
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert same_state(loaded, model)
    assert not any("output_norm" in name for name, _ in loaded.named_parameters())
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert half.model.layers[0].attn_output_norm.weight.dtype == torch.float16
    assert torch.equal(half.model.layers[0].attn_output_norm.weight, torch.ones(20, dtype=torch.float16))


# Dtypes


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [{}, {"dtype": "auto"}, {"dtype": torch.float16}, {"dtype": torch.float32}])
def test_the_dtype_is_the_one_asked_for_or_else_the_one_saved(saved, asked, tmp_path):
    model = shaken_model(qk_norm="head", **FROZEN).to(saved)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **asked)
    expected = saved if asked.get("dtype", "auto") == "auto" else asked["dtype"]
    assert {t.dtype for t in loaded.state_dict().values()} == {expected}
    assert loaded.dtype == loaded.config.dtype == expected
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor.to(expected)), key
    assert loaded(random_ids()).logits.isfinite().all()


# Names and damage


def reload_with(model, folder, change, **more):
    """The model loaded from files in which `change` edited the dictionary of weights, and the loading report."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return PeriLlamaForCausalLM.from_pretrained(folder, output_loading_info=True, **more)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_placement": "peri", "qk_norm": "head"},
        {"norm_placement": "pre_post", "qk_norm": "full", "norm_type": "layernorm", "final_norm": True},
    ],
)
def test_every_norm_that_is_missing_is_reported_and_starts_as_a_plain_normalization(changes, tmp_path):
    """Transformers knows a norm by its class's name: under another name it would keep what was in memory."""
    model = shaken_model(**changes)
    lost = {key for key in model.state_dict() if "norm" in key}
    loaded, report = reload_with(model, tmp_path, lambda w: {k: v for k, v in w.items() if k not in lost})
    assert report["missing_keys"] == lost
    assert not report["unexpected_keys"]
    for key, tensor in loaded.state_dict().items():
        expected = torch.full_like(tensor, float(key.endswith("weight"))) if key in lost else model.state_dict()[key]
        assert torch.equal(tensor, expected), key


def test_a_checkpoint_of_another_placement_is_reported_on_both_sides(tmp_path):
    model = shaken_model(norm_placement="post")
    model.save_pretrained(tmp_path)
    _, report = PeriLlamaForCausalLM.from_pretrained(tmp_path, norm_placement="pre", output_loading_info=True)
    layers, parts = range(3), ("attn", "mlp")
    inputs = {f"model.layers.{i}.{part}_input_norm.weight" for i in layers for part in parts}
    assert report["missing_keys"] == inputs | {"model.final_norm.weight"}
    assert report["unexpected_keys"] == {key.replace("_input_", "_residual_") for key in inputs}


def test_weights_under_other_names_are_found_with_a_key_mapping(tmp_path):
    model = shaken_model()
    names = {"model.final_norm.": "model.norm.", "attn_input_norm": "input_layernorm"}

    def rename(weights):
        for ours, theirs in names.items():
            weights = {key.replace(ours, theirs): tensor for key, tensor in weights.items()}
        return weights

    mapping = {r"^model\.norm\.": "model.final_norm.", "input_layernorm": "attn_input_norm"}
    loaded, report = reload_with(model, tmp_path, rename, key_mapping=mapping)
    assert not any(report.values())
    assert same_state(loaded, model)
    _, report = PeriLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(report["missing_keys"]) == len(report["unexpected_keys"]) == 4


def test_untying_a_tied_checkpoint_starts_a_new_head_and_says_so(tmp_path):
    model = shaken_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded, report = PeriLlamaForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False, output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight"}
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert 0.01 < loaded.lm_head.weight.std() < 0.03


def test_the_base_model_and_the_language_model_read_each_others_checkpoints(tmp_path):
    model = shaken_model()
    model.save_pretrained(tmp_path / "lm")
    base, report = PeriLlamaModel.from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert not report["missing_keys"]
    assert same_state(base, model.model)
    base.save_pretrained(tmp_path / "base")
    again, report = PeriLlamaForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight"}
    assert same_state(again.model, model.model)


# Quantization


INT8 = """
import json
import sys
import torch
from tiny_models import random_ids, shaken_model
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

folder = sys.argv[1]
model = shaken_model(**json.loads(sys.argv[2]))
model.save_pretrained(folder + "/model")
how = TorchAoConfig(Int8WeightOnlyConfig())
loaded = AutoModelForCausalLM.from_pretrained(folder + "/model", quantization_config=how).eval()
quantized = {name for name, p in loaded.named_parameters() if isinstance(p, Int8Tensor)}
assert quantized == {name for name, _ in model.named_parameters() if "_proj" in name}
ids = random_ids()
error = (loaded(ids).logits - model(ids).logits).abs().max() / model(ids).logits.std()
assert 1e-4 < error < 0.3, error
tokens = loaded.generate(ids, max_new_tokens=5, do_sample=False)
assert tokens.shape == (2, 12)
loaded.save_pretrained(folder + "/again")
again = AutoModelForCausalLM.from_pretrained(folder + "/again").eval()
assert torch.equal(again(ids).logits, loaded(ids).logits)
assert torch.equal(again.generate(ids, max_new_tokens=5, do_sample=False), tokens)
print("int8 done")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"qk_norm": "head"}, SLIDING | {"norm_placement": OWN | INSIDE, "qk_norm": None, "tie_word_embeddings": False}],
    ids=["head", "own"],
)
def test_int8_weights_load_generate_and_are_saved(changes, tmp_path):
    # `make setup` puts torchao aside: where Transformers finds it, every import is slow and loud.
    aside = Path(sys.prefix) / "aside"
    if not (aside / "torchao").is_dir():
        pytest.skip(f"torchao is not in {aside}: `make setup` puts it there")
    tests = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (aside, tests, tests.parents[1])))}
    done = subprocess.run(
        [sys.executable, "-c", INT8, tmp_path, json.dumps(changes)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("int8 done\n"), done.stderr[-2000:]
    assert "unknown field" not in done.stderr
