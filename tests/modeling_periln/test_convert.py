"""Conversions are the same function: compared with Transformers' own classes, in memory and on disk."""

import ast
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import huggingface_hub
import pandas as pd
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from local_hub import LocalHub
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stock_classes import needs
from tiny_models import SIZES, random_ids, shaken, shaken_model, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import modeling_periln
from modeling_periln import PeriLlamaForCausalLM, conversions, convert, proof
from modeling_periln.convert import (
    ConversionFailed,
    ConversionRefused,
    admissible_exports,
    from_native,
    main,
    to_native,
)

PACKAGE = Path(modeling_periln.__file__).parent
ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
LLAMA3_ROPE = ROPE | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
OUTPUT = {"norm_placement": "output", "qk_norm": "full"}
OWN_PRE = {"input_norm": True, "final_norm": True}
OWN_OUTPUT = {"output_norm": True, "final_norm": True}
OWN_PERI = OWN_PRE | OWN_OUTPUT | {"c": 0.7, "s": "1/sqrt(2L)"}
BIASES = {"attention_bias": True, "mlp_bias": True}
# The plain export to each architecture, and everything that is folded or moved on the way.
PLAIN = {
    "llama": {"norm_placement": "pre"},
    "olmo2": OUTPUT,
    "hyperclovax": {"norm_placement": "peri", "embedding_norm": False},
    "glm4": {"norm_placement": "peri", "embedding_norm": False},
}
EXPORTS = [
    *PLAIN.items(),
    ("llama", {"norm_placement": "lns"}),
    ("llama", {"norm_placement": "lns", "residual_scale": "1/sqrt(2L)", **BIASES}),
    ("llama", {"norm_placement": "pre", "embedding_norm": True, "norm_eps": {"embed_norm": 0.3}}),
    ("llama", {"norm_placement": "pre", "tie_word_embeddings": True, "pad_token_id": 3, "hidden_act": "gelu"}),
    ("llama", {"layer_placements": ["pre", "lns", "pre"], "residual_scale": -0.5}),
    ("llama", {"norm_placement": OWN_PRE | {"c": "1/L"}}),
    ("llama", {"norm_placement": {"input_norm": True}, "final_norm": True, "rope_parameters": LLAMA3_ROPE}),
    ("olmo2", OUTPUT | {"residual_scale": "1/L", "embedding_norm": True}),
    ("olmo2", OUTPUT | {"output_norm_learnable": False, "attention_bias": True, "norm_eps": 0.1}),
    ("olmo2", OUTPUT | {"norm_placement": OWN_OUTPUT | {"s": 0.3}}),
    ("hyperclovax", {"norm_placement": "peri"}),
    ("hyperclovax", {"norm_placement": "pre", "embedding_norm": True, "residual_scale": 0.5}),
    ("hyperclovax", {"norm_placement": OWN_PERI, **BIASES, "tie_word_embeddings": True}),
    ("hyperclovax", {"output_norm_learnable": False, "residual_scale": "1/sqrt(L)", "norm_eps": 0.1}),
    ("glm4", {"norm_placement": "peri"}),
    ("glm4", {"norm_placement": OWN_PERI, "tie_word_embeddings": True}),
    ("glm4", {"output_norm_learnable": False, "residual_scale": 0.25, "rope_parameters": YARN_ROPE}),
]
SHAPES = {
    "multi-head": {"num_key_value_heads": 4, "head_dim": 10, "hidden_size": 40},
    "multi-query": {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 4, "hidden_size": 24},
    "one layer, odd sizes": {"num_hidden_layers": 1, "intermediate_size": 33, "vocab_size": 127},
    "wide heads": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32},
}


def names(params: list) -> list[str]:
    return [f"{i} {p[0]}" for i, p in enumerate(params)]


def difference(a, b, ids, **inputs) -> float:
    with torch.no_grad():
        ours, theirs = a(ids, **inputs).logits, b(ids, **inputs).logits
    assert ours.isfinite().all() and ours.std() > 0.1
    keep = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    return (ours - theirs)[keep].abs().max().item()


def assert_same(a, b, allowed: float = 1e-5) -> None:
    """Odd lengths, and a batch padded on the left."""
    vocab = a.config.vocab_size
    for length in (1, 7, 33):
        assert difference(a, b, random_ids(2, length, vocab)) <= allowed
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    assert difference(a, b, random_ids(3, 11, vocab), **inputs) <= allowed


# In memory


@pytest.mark.parametrize(("target", "changes"), EXPORTS, ids=names(EXPORTS))
def test_an_export_is_the_same_function_and_so_is_the_way_back(target, changes):
    needs(target)
    model = shaken_model(**changes)
    native = to_native(model, target)
    assert type(native).__module__.startswith(f"transformers.models.{target}.")
    assert_same(model, native, 0.0 if (target, changes) == ("llama", PLAIN["llama"]) else 1e-5)
    back = from_native(native)
    assert type(back) is PeriLlamaForCausalLM
    assert_same(native, back, 1e-5)
    assert_same(model, back, 1e-5)
    assert admissible_exports(model.config)[target] is None
    # What was folded is in the weights now, so the second export folds nothing.
    again = to_native(back, target).state_dict()
    assert again.keys() == native.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in native.state_dict().items())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", PLAIN)
def test_an_export_is_the_same_function_at_other_shapes(target, shape):
    needs(target)
    model = shaken_model(**PLAIN[target] | SHAPES[shape])
    assert_same(model, to_native(model, target), 0.0 if target == "llama" else 1e-5)


@pytest.mark.parametrize(
    ("target", "changes"),
    [*PLAIN.items(), ("llama", {"norm_placement": "lns", "residual_scale": 0.5}), ("glm4", {"residual_scale": 0.5})],
)
def test_gradients_of_an_export_are_ours_times_what_was_folded(target, changes):
    needs(target)
    model = shaken_model(**changes)
    native, ids = to_native(model, target), random_ids(2, 13)
    for m in (model, native):
        m(ids, labels=ids).loss.backward()
    theirs = {name: p.grad for name, p in native.named_parameters()}
    compared = 0
    for name, p in model.named_parameters():
        slot = name.split(".")[-2]
        if slot in ("embed_tokens", "embed_norm") and model.config.stream_plan().embedding_norm:
            continue  # the table takes the place of both
        key = ".".join(conversions.ARCHITECTURES[target].names.get(part, part) for part in name.split("."))
        gradient = theirs.get(key)
        if target == "glm4" and slot in ("gate_proj", "up_proj"):
            gate, up = theirs[key.replace(slot, "gate_up_proj")].chunk(2)
            gradient = gate if slot == "gate_proj" else up
        if target == "glm4" and slot in ("q_proj", "k_proj"):  # ours (0, 1, 2, 3, 4, 5) are theirs (0, 2, 4, 1, 3, 5)
            heads = gradient.unflatten(0, (-1, 6))
            gradient = torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).flatten(0, 1)
        if slot in ("attn_input_norm", "mlp_input_norm") and changes.get("norm_placement") == "lns":
            gradient = gradient * (int(name.split(".")[2]) + 1) ** -0.5
        carriers = ("o_proj", "down_proj") if target == "llama" else ("attn_output_norm", "mlp_output_norm")
        if slot in carriers:
            gradient = gradient * changes.get("residual_scale", 1.0)
        assert gradient.abs().max() > 0, name
        assert (p.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
        compared += 1
    assert compared >= len(theirs) - 1


FROM = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "pad_token_id": 0}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3_ROPE, "eos_token_id": [7, 9]}),
    "olmo 2": ("Olmo2", {"attention_bias": True, "rms_norm_eps": 0.1}),
    "glm 4": ("Glm4", {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}),
    "glm 4 without bias": (
        "Glm4",
        {"attention_bias": False, "rope_parameters": YARN_ROPE | {"partial_rotary_factor": 1.0}},
    ),
    "hyperclova x": ("HyperCLOVAX", {}),
    "hyperclova x, pre": ("HyperCLOVAX", {"use_post_norm": False, "residual_multiplier": 0.3, "mlp_bias": True}),
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.9,
    "logits_scaling": 0.7,
    "residual_multiplier": 0.4,
}
FROM["hyperclova x, multipliers"] = ("HyperCLOVAX", MULTIPLIERS | {"attention_bias": True})
FROM["hyperclova x, multipliers, tied"] = ("HyperCLOVAX", MULTIPLIERS | {"tie_word_embeddings": True})


def stock_model(name: str, **fields):
    """A model as Transformers makes it, every weight far from its initial value."""
    fields = SIZES | {"pad_token_id": None, "rope_parameters": ROPE} | fields
    config = getattr(transformers, f"{name}Config")(**fields)
    model = shaken(getattr(transformers, f"{name}ForCausalLM")(config).eval())
    for key, p in model.named_parameters():  # norms that `shaken` does not know by name
        if p.ndim == 1 and "norm" in key:
            p.data.normal_(1.0, 0.3, generator=torch.Generator().manual_seed(len(key)))
    return model


@pytest.mark.parametrize("case", FROM)
def test_a_stock_model_becomes_a_peri_llama_of_the_same_function(case):
    needs(FROM[case][0].lower())
    model = stock_model(FROM[case][0], **FROM[case][1])
    if "glm 4" in case and model.config.rope_parameters["partial_rotary_factor"] != 1.0:
        pytest.skip(f"transformers {transformers.__version__} puts its own partial_rotary_factor in a Glm4's YaRN")
    ours = from_native(model)
    assert_same(model, ours)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(ours.config, name) == getattr(model.config, name), name
    assert ours.generation_config.to_dict() == model.generation_config.to_dict()
    if case == "glm 4":  # its q, k and v have biases, its o_proj has none, ours then has one of zeros
        assert not ours.model.layers[0].self_attn.o_proj.bias.any()
    else:
        assert_same(model, to_native(ours, model.config.model_type))


def test_a_conversion_leaves_the_source_and_the_random_numbers_alone():
    needs("hyperclovax")
    model = tiny_model(attn_implementation="eager").train()
    model.generation_config.max_new_tokens = 5
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    native = to_native(model, "hyperclovax")
    back = from_native(native)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (native, back):
        assert other.training and other.config._attn_implementation == "eager"
        assert other.generation_config.max_new_tokens == 5
        assert all(p.requires_grad and not p.is_meta for p in other.parameters())
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not to_native(model.eval(), "glm4").training
    assert to_native(model.bfloat16(), "glm4").dtype == torch.bfloat16
    assert to_native(model.double(), "glm4").dtype == torch.float64


def test_tied_weights_stay_tied():
    model = to_native(shaken_model(norm_placement="pre", tie_word_embeddings=True), "llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    back = from_native(model)
    assert back.lm_head.weight is back.model.embed_tokens.weight


# What cannot be converted

REFUSED = [
    ("llama", {"norm_placement": "post"}, "norm_placement='post' .*norm on the stream.*residual_norm, layer 1"),
    ("hyperclovax", {"norm_placement": "pre_post"}, "norm on the stream"),
    ("olmo2", {"norm_placement": "deepnorm"}, "norm on the stream"),
    ("llama", {"norm_placement": "mix"}, "norm_placement='mix' .*norm on the stream"),
    ("llama", {"layer_placements": ["pre", "pre", "post"]}, r"layer_placements=\['pre', 'pre', 'post'\].*layer 3"),
    ("hyperclovax", {"layer_placements": ["pre", "pre", "peri"]}, "output norms .* in some layers only"),
    ("llama", {"norm_placement": "peri"}, "output norms .*llama has none"),
    ("glm4", {"norm_placement": "pre"}, "no output norms .*glm4 always has them"),
    ("olmo2", {"norm_placement": "peri", "qk_norm": "full"}, "input norms .*olmo2 has none"),
    ("hyperclovax", OUTPUT, "no input norms .*hyperclovax always has them"),
    ("llama", {"norm_placement": OWN_PRE | {"alpha": "(2L)^(1/4)"}}, "alpha=1.56.* layer 1"),
    ("olmo2", OUTPUT | {"norm_placement": OWN_OUTPUT | {"c": 0.5}}, "c=0.5 .*no input norm"),
    ("llama", {"norm_placement": "pre", "final_norm": False}, "final_norm=False: llama always has one"),
    ("llama", {"norm_placement": {"input_norm": True}}, "no final norm"),
    ("llama", {"norm_placement": "pre", "norm_type": "layernorm"}, "norm_type='layernorm'"),
    ("llama", {"norm_placement": "pre", "qk_norm": "head"}, "qk_norm='head': llama has None"),
    ("olmo2", {"norm_placement": "output"}, "qk_norm=None: olmo2 has 'full'"),
    ("olmo2", {"norm_placement": "output", "qk_norm": "head"}, "qk_norm='head': olmo2 has 'full'"),
    ("glm4", {"tie_word_embeddings": True}, "embedding_norm with tie_word_embeddings=True"),
    ("llama", PLAIN["llama"] | {"norm_eps": {"final_norm": 0.1}}, "1e-06 for attn_input_norm of layer 1 and 0.1 for"),
    ("glm4", {"norm_eps": {"mlp_output_norm": [1e-6, 1e-6, 1e-3]}}, "0.001 for mlp_output_norm of layer 3"),
    ("olmo2", OUTPUT | {"norm_eps": {"k_norm": 1e-3}}, "0.001 for k_norm of layer 1"),
    ("glm4", {"attention_bias": True}, "attention_bias=True: glm4 has no bias in o_proj"),
    ("glm4", {"mlp_bias": True}, "mlp_bias=True: glm4"),
    ("olmo2", OUTPUT | {"mlp_bias": True}, "mlp_bias=True: olmo2"),
    ("llama", {"norm_placement": "pre", "hidden_size": 22}, "hidden_size=22 is not .*num_attention_heads=4"),
    ("hyperclovax", {"hidden_size": 22}, "hidden_size=22"),
    ("llama", {"norm_placement": "pre", "pad_token_id": 61}, "pad_token_id=61 is outside of vocab_size=61"),
    ("gpt2", {}, "'gpt2' is not a known architecture"),
    ("olmo", {}, "did you mean 'olmo.'"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "changes", "message"), REFUSED, ids=names(REFUSED))
def test_what_cannot_be_exported_is_refused_with_field_and_reason(target, changes, message):
    with pytest.raises(ValueError, match=message):
        to_native(tiny_model(**changes), target)
    if target in PLAIN:
        assert admissible_exports(tiny_config(**changes))[target]


def test_which_row_goes_where():
    row = {name: admissible_exports(tiny_config(norm_placement=name)) for name in modeling_periln.PLACEMENT_NAMES}
    admitted = {name: {target for target, reason in reasons.items() if reason is None} for name, reasons in row.items()}
    pre, peri = {"llama", "hyperclovax", "mistral"}, {"hyperclovax", "glm4"}
    expected = {"pre": pre, "lns": pre, "peri": peri, "sandwich": peri}
    assert admitted == {name: expected.get(name, set()) for name in modeling_periln.PLACEMENT_NAMES}
    filled = tiny_config(norm_placement="sub_ln", hidden_size=24)
    assert {target for target, reason in admissible_exports(filled).items() if reason is None} == {"bitnet"}
    for row, target in (("pre", "qwen3"), ("output", "exaone4"), ("sandwich", "gemma3_text")):
        assert admissible_exports(tiny_config(norm_placement=row, qk_norm="head"))[target] is None
    assert admissible_exports(tiny_config(**OUTPUT))["olmo2"] is None
    assert admissible_exports(tiny_config(residual_dtype="float16"))["glm4"] is None  # it belongs to the run


def test_what_cannot_be_imported_is_refused():
    refused = {
        "'partial_rotary_factor'..0.5 would rotate 3 of head_dim=6": stock_model(
            "Glm4", rope_parameters=ROPE | {"partial_rotary_factor": 0.5}
        ),
        "head_dim=5 must be even": stock_model("Llama"),
        "is_causal=False": stock_model("Llama", is_causal=False),
        "needs a LlamaForCausalLM, not a LlamaModel": stock_model("Llama").model,
        "'qwen2' is not a row": stock_model("Qwen2"),
        "'peri_llama' is not a row": tiny_model(),
    }
    refused["head_dim=5 must be even"].config.head_dim = 5
    for message, model in refused.items():
        with pytest.raises(ConversionRefused, match=message):
            from_native(model)


def test_a_tied_hyperclova_x_that_hides_its_embedding_cannot_be_imported():
    needs("hyperclovax")
    model = stock_model("HyperCLOVAX", embedding_multiplier=0, tie_word_embeddings=True)
    with pytest.raises(ConversionRefused, match="embedding_multiplier=0"):
        from_native(model)


def test_what_transformers_own_configuration_refuses_is_refused_in_one_sentence(monkeypatch):
    def refusing(**fields):
        raise StrictDataclassFieldValidationError(field="x", cause=TypeError("expected int, got bool"))

    monkeypatch.setattr(conversions.transformers, "LlamaConfig", refusing)
    with pytest.raises(
        ConversionRefused, match=r"^transformers [\d.]+ cannot build the configuration of llama: .*got bool"
    ):
        to_native(tiny_model(norm_placement="pre"), "llama")


def test_to_native_wants_the_whole_model_and_all_of_its_weights():
    model = tiny_model(norm_placement="pre")
    with pytest.raises(ConversionRefused, match="needs a PeriLlamaForCausalLM, not a PeriLlamaModel"):
        to_native(model.model, "llama")
    with pytest.raises(ConversionRefused, match="not 'peri_llama'"):
        admissible_exports(stock_model("Llama").config)
    model.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ConversionFailed, match="2 weights have no place in the model, the first is model.extra.bias"):
        to_native(model, "llama")


# On disk


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(58)} | {"<unk>": 58, "<s>": 59, "</s>": 60}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    more = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages[0]['content'] }}"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **more)


def saved(folder: Path, model=None, tokenizer=None, shard: str = "5GB", **changes) -> Path:
    model = model or shaken_model(**changes)
    model.save_pretrained(folder, max_shard_size=shard)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


CLI = [
    ("llama", {"norm_placement": "lns", "residual_scale": "1/sqrt(2L)"}, "3KB", "5GB"),
    ("olmo2", OUTPUT | {"attention_bias": True}, "5GB", "6KB"),
    ("hyperclovax", {"output_norm_learnable": False, "eos_token_id": 60}, "7KB", "9KB"),
    ("glm4", {"bos_token_id": 59, "residual_dtype": "float16"}, "4KB", "2KB"),
]


@pytest.mark.parametrize(("target", "changes", "read", "write"), CLI, ids=[c[0] for c in CLI])
def test_the_command_line_there_and_back(target, changes, read, write, tmp_path, capsys, tokenizer):
    needs(target)
    src = saved(tmp_path / "src", shard=read, tokenizer=tokenizer, **changes)
    before, dst, back = contents(src), tmp_path / "out" / "dst", tmp_path / "back"
    assert main([str(src), str(dst), "--to", target, "--max-shard-size", write, "--text", "none"]) == 0
    record = json.loads((dst / "conversion.json").read_text())
    assert record["largest_difference"] <= 1e-5 * record["largest_logit"] and record["largest_logit"] > 1
    assert f"{record['largest_difference']:.3g}" in capsys.readouterr().out
    assert any("folded" in remark or "lost" in remark or "biases" in remark for remark in record["remarks"])
    assert contents(src) == before and sorted(p.name for p in dst.parent.iterdir()) == ["dst"]

    # A stock model's folder: no code of ours, nothing that names this machine, files that others may read.
    assert not list(dst.glob("*.py")) and str(tmp_path).encode() not in b"".join(contents(dst).values())
    config = json.loads((dst / "config.json").read_text())
    assert "auto_map" not in config and config["model_type"] == target
    if target == "glm4":  # tools that read the file themselves look for it here, and assume GLM-4's own 0.5
        assert config["partial_rotary_factor"] == config["rope_parameters"]["partial_rotary_factor"] == 1.0
    assert len({p.stat().st_mode for p in dst.iterdir()}) == 1
    files = sorted(dst.glob("*.safetensors"))
    if write == "5GB":
        assert [f.name for f in files] == ["model.safetensors"] and not (dst / "model.safetensors.index.json").exists()
    else:
        index = json.loads((dst / "model.safetensors.index.json").read_text())
        limit = int(write[0]) * 1000
        for file in files:
            held = load_file(file)
            assert {name for name, where in index["weight_map"].items() if where == file.name} == set(held)
            assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= limit
        assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(f).values())
        assert len(files) > 5

    # It loads by the auto classes, with the source's tokens, and says what the source says.
    source = PeriLlamaForCausalLM.from_pretrained(src)
    source.config.residual_dtype = None
    model = AutoModelForCausalLM.from_pretrained(dst)
    assert type(model).__module__.startswith("transformers.")
    assert_same(source, model)
    other, ids = AutoTokenizer.from_pretrained(dst), random_ids(1, 5)
    assert other("w3 w7 nothing </s>").input_ids == tokenizer("w3 w7 nothing </s>").input_ids == [3, 7, 58, 60]
    assert other.chat_template == tokenizer.chat_template
    assert other.model_max_length == model.config.max_position_embeddings == source.config.max_position_embeddings
    more = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(source.generate(ids, **more), model.generate(ids, **more))

    # The way back carries our code again.
    assert main([str(dst), str(back), "--to", "peri_llama", "--text", "none"]) == 0
    assert {p.name for p in back.glob("*.py")} == {p.name for p in src.glob("*.py")}
    assert json.loads((back / "config.json").read_text())["auto_map"].keys() >= {"AutoModel", "AutoModelForCausalLM"}
    assert_same(source, AutoModelForCausalLM.from_pretrained(back))


def test_never_more_than_a_shard_is_in_memory(tmp_path, monkeypatch):
    needs("hyperclovax")
    src = saved(tmp_path / "src", shard="4KB")
    alive, peak = weakref.WeakSet(), []

    class Watched:
        def __init__(self, *args, **more):
            self.file = safe_open(*args, **more)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            tensor = self.file.get_tensor(name).clone()
            alive.add(tensor)
            peak.append(sum(t.nbytes for t in alive))
            return tensor

    written = []
    monkeypatch.setattr(convert, "safe_open", Watched)

    def save(tensors, *args, **more):
        written.append(sum(t.nbytes for t in tensors.values()))
        save_file(tensors, *args, **more)

    monkeypatch.setattr(convert, "save_file", save)
    convert.convert(src, tmp_path / "dst", "hyperclovax", max_shard_size=4000)
    largest = SIZES["vocab_size"] * SIZES["hidden_size"] * 4
    assert max(peak) == largest + 80 and len(peak) > 30  # the embedding table and its norm: of the source, one tensor
    assert max(written) == largest and len(written) > 10  # a shard holds one tensor, or at most 4000 bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_folded_without_loss(dtype, tmp_path):
    needs("hyperclovax")
    src = saved(tmp_path / "src", shaken_model(residual_scale="1/sqrt(2L)").to(dtype))
    record = convert.convert(src, tmp_path / "dst", "hyperclovax")
    assert record["largest_difference"] <= 1e-6 * record["largest_logit"]
    kept = load_file(tmp_path / "dst" / "model.safetensors")
    folded = {name for name, t in kept.items() if t.dtype == torch.float32}
    norms = {f"model.layers.{i}.post_norm{k}.weight" for i in range(3) for k in (1, 2)}
    assert folded == norms | {"model.embed_tokens.weight"}
    assert {t.dtype for name, t in kept.items() if name not in folded} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dst").dtype == dtype


def test_half_precision_weights_stay_half_where_the_fold_is_a_power_of_two(tmp_path):
    src = saved(tmp_path / "src", shaken_model(norm_placement="pre", residual_scale=0.5).bfloat16())
    assert convert.convert(src, tmp_path / "dst", "llama")["largest_difference"] <= 1e-5
    assert {t.dtype for t in load_file(tmp_path / "dst" / "model.safetensors").values()} == {torch.bfloat16}


WRONG = {
    "scaled": lambda tensor, factor: tensor,
    "normed_table": lambda table, gamma, eps, **how: table,
    "interleaved": lambda tensor, head_dim, dims: tensor,
    "_half": lambda tensor, index: tensor.chunk(2)[1 - index],
    "not a number": lambda table, gamma, eps, **how: table * float("nan"),
}


@pytest.mark.parametrize("fold", WRONG)
def test_an_export_that_is_another_function_is_removed(fold, tmp_path, monkeypatch, capsys):
    src, to = saved(tmp_path / "src", residual_scale=0.5), "glm4"
    if fold == "_half":
        src, to = saved(tmp_path / "native", to_native(shaken_model(), "glm4")), "peri_llama"
    monkeypatch.setattr(conversions, {"not a number": "normed_table"}.get(fold, fold), WRONG[fold])
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main([str(src), str(tmp_path / "dst"), "--to", to]) == 1
    error = capsys.readouterr().err
    assert "the export was removed: its logits differ" in error and "Traceback" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def story(words: int = 150) -> str:
    return " ".join(f"w{i * i % 60}" for i in range(words))


def test_an_export_is_compared_on_a_text_of_ones_own_too(tmp_path, tokenizer, capsys):
    src, file = saved(tmp_path / "src", tokenizer=tokenizer), tmp_path / "story.txt"
    file.write_text(story())
    assert main([str(src), str(tmp_path / "dst"), "--to", "glm4", "--text", str(file)]) == 0
    text = json.loads((tmp_path / "dst" / "conversion.json").read_text())["compared"]["text"]
    assert text["source"] == "story.txt" and text["shape"] == [2, SIZES["max_position_embeddings"]]
    assert 0 <= text["largest_difference"] <= 1e-5 * text["largest_logit"]
    assert f"text (story.txt): largest difference {text['largest_difference']:.3g}" in capsys.readouterr().out


def test_a_difference_on_the_text_alone_removes_the_export(tmp_path, tokenizer, monkeypatch, capsys):
    src, file = saved(tmp_path / "src", tokenizer=tokenizer), tmp_path / "story.txt"
    file.write_text(story())
    real, calls = proof._logits, []

    def disturbed(folder, config, batches):
        logits = real(folder, config, batches)
        calls.append(folder)
        logits[-1][0, 0] += 0.1 * len(calls)
        return logits

    monkeypatch.setattr(proof, "_logits", disturbed)
    assert main([str(src), str(tmp_path / "dst"), "--to", "glm4", "--text", str(file)]) == 1
    assert "the export was removed" in (error := capsys.readouterr().err) and "on text" in error
    assert not (tmp_path / "dst").exists()


def test_wikitext_is_read_from_the_hub_and_the_record_says_where_it_is_not(tmp_path, tokenizer, monkeypatch, capsys):
    src = saved(tmp_path / "src", tokenizer=tokenizer)
    repository, name = proof.WIKITEXT_FILE
    file = tmp_path / "store" / "datasets" / repository / name
    file.parent.mkdir(parents=True)
    pd.DataFrame({"text": ["", f" {story(100)} \n", f" {story(60)} \n"]}).to_parquet(file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with LocalHub(tmp_path / "store") as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        assert main([str(src), str(tmp_path / "dst"), "--to", "glm4"]) == 0
        text = json.loads((tmp_path / "dst" / "conversion.json").read_text())["compared"]["text"]
        assert text["source"] == f"{repository}, {name}" and text["largest_logit"] > 1
    nobody = template.replace(hub.url, "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    capsys.readouterr()
    assert main([str(src), str(tmp_path / "without"), "--to", "glm4"]) == 0
    assert "not compared on text: WikiText is not available from the Hub" in capsys.readouterr().out
    skipped = json.loads((tmp_path / "without" / "conversion.json").read_text())["compared"]["text"]
    assert "WikiText is not available" in skipped["skipped"]
    # Asked for by name it is no longer a remark.
    assert main([str(src), str(tmp_path / "asked"), "--to", "glm4", "--text", "wikitext"]) == 2
    assert "--text wikitext: WikiText is not available" in capsys.readouterr().err
    assert main([str(src), str(tmp_path / "asked"), "--to", "glm4", "--text", "nowhere.txt"]) == 2
    assert "--text nowhere.txt is not a file" in capsys.readouterr().err
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize("target", PLAIN)
def test_where_generation_ends_goes_through_a_conversion_and_back(target, tmp_path):
    """Two ends, one of which the configuration names: what stops a fine-tuned model is its generation configuration."""
    needs(target)
    model = shaken_model(**PLAIN[target], eos_token_id=60, bos_token_id=59)
    model.generation_config.eos_token_id = [60, 57]
    saved(tmp_path / "src", model)
    assert main([str(tmp_path / "src"), str(tmp_path / "there"), "--to", target, "--text", "none"]) == 0
    assert main([str(tmp_path / "there"), str(tmp_path / "back"), "--to", "peri_llama", "--text", "none"]) == 0
    for folder in ("there", "back"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert loaded.generation_config.eos_token_id == [60, 57]
        assert (loaded.config.eos_token_id, loaded.config.bos_token_id) == (60, 59)


def test_nothing_is_overwritten_and_an_interruption_leaves_nothing(tmp_path, monkeypatch, capsys):
    src, full = saved(tmp_path / "src"), tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    for dst in (full, file, src):
        before = contents(tmp_path)
        assert main([str(src), str(dst), "--to", "glm4"]) == 2
        assert "exists and is not an empty folder" in capsys.readouterr().err
        assert contents(tmp_path) == before
    monkeypatch.setattr(convert, "compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([str(src), str(tmp_path / "dst"), "--to", "glm4"]) == 130
    assert contents(tmp_path) == before and not (tmp_path / "dst").exists() and not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    (tmp_path / "dst").mkdir()
    assert main([str(src), str(tmp_path / "dst"), "--to", "glm4"]) == 0


def test_a_mistake_is_one_sentence_and_an_exit_code(tmp_path, capsys):
    src, llama = (
        saved(tmp_path / "src", shard="4KB"),
        saved(tmp_path / "llama", to_native(tiny_model(norm_placement="pre"), "llama")),
    )
    bare, broken, lost = tmp_path / "bare", tmp_path / "broken", saved(tmp_path / "lost", shard="4KB")
    bare.mkdir()
    (bare / "config.json").write_bytes((src / "config.json").read_bytes())
    saved(broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:900])
    next(lost.glob("*.safetensors")).unlink()
    headless = saved(tmp_path / "headless", tiny_model().model)
    cases = [
        (2, [tmp_path / "none", "--to", "glm4"], "no config.json"),
        (2, [bare, "--to", "glm4"], "has no model.safetensors"),
        (2, [src, "--to", "llama"], "cannot convert to llama: norm_placement='peri' has output norms"),
        (2, [src, "--to", "peri_llama"], "is 'peri_llama': only"),
        (2, [llama, "--to", "olmo2"], "is 'llama': only peri_llama converts to olmo2"),
        (2, [src, "--to", "glm4", "--max-shard-size", "5TB"], "max_shard_size='5TB' is not a size"),
        (2, [src, "--to", "glm4", "--max-shard-size", "0"], "max_shard_size='0' is not a size"),
        (1, [broken, "--to", "glm4"], "model.safetensors is damaged: "),
        (1, [lost, "--to", "glm4"], "is missing, though the index names it"),
        (1, [headless, "--to", "glm4"], "weights are missing, the first is lm_head.weight"),
    ]
    capsys.readouterr()
    for code, (folder, *rest), message in cases:
        assert main([str(folder), str(tmp_path / "dst"), *rest]) == code, message
        out, error = capsys.readouterr()
        assert message in error and error.startswith("error: ") and error.count("\n") == 1 and not out
        assert not (tmp_path / "dst").exists()
    for arguments in ([], [str(src), "dst", "--to", "lama"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert main([str(lost), str(tmp_path / "dst"), "--to", "glm4", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
def test_the_module_runs_as_a_command(tmp_path):
    src = saved(tmp_path / "src", norm_placement="pre")
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "modeling_periln.convert", src, tmp_path / "dst"]
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "--to", "llama"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "peri_llama -> llama" in done.stdout and "largest difference 0 " in done.stdout
    assert_same(PeriLlamaForCausalLM.from_pretrained(src), AutoModelForCausalLM.from_pretrained(tmp_path / "dst"), 0.0)


def test_the_converter_imports_only_what_transformers_brings_and_its_siblings():
    known = {"torch", "transformers", "safetensors", "huggingface_hub", *sys.stdlib_module_names}
    known |= {"pyarrow", "peft"}  # in proof.py and sources.py; where one is missing there is a sentence
    for name in ("convert.py", "conversions.py", "proof.py", "sources.py", "refresh.py"):
        for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
            found = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in found:
                assert module.split(".")[0] in known


@pytest.mark.slow
def test_a_source_on_the_hub_is_fetched_and_one_that_is_not_there_is_said(tmp_path):
    saved(tmp_path / "store" / "models" / "someone" / "peri-tiny", norm_placement="peri")
    command = [sys.executable, "-m", "modeling_periln.convert"]
    with LocalHub(tmp_path / "store") as hub:
        env = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        for source, to in (("someone/peri-tiny", "glm4"), ("someone/absent", "llama")):
            words = [*command, source, tmp_path / to, "--to", to]
            done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
            if to == "llama":
                assert done.returncode == 2
                assert done.stderr.count("\n") == 1
                assert "someone/absent is not a folder here, and was not found on the Hub" in done.stderr
            else:
                assert done.returncode == 0, done.stderr
    source = tmp_path / "store" / "models" / "someone" / "peri-tiny"
    ours, theirs = (
        PeriLlamaForCausalLM.from_pretrained(source),
        AutoModelForCausalLM.from_pretrained(tmp_path / "glm4"),
    )
    assert_same(ours, theirs, 1e-5)
    assert not any(request.endswith(".py") for request in hub.requests)
