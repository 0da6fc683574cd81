"""What Transformers and the tools around it expect of a model family outside its tree, without saying so when it lacks.

Here is what the other files do not test already. Where they do:

| trap | test |
|---|---|
| no `@strict`, string annotations, int for float | test_configuration: types, postponed annotations |
| misspelt fields, `layer_types`, `is_causal`, alias `rms_norm_eps`, RoPE defaults | test_configuration, test_rope |
| `_init_weights` by container, missing norms, depth scaling after a partial load | test_initialization |
| rotary frequencies after a load, `padding_idx`, tied weights | test_initialization, test_rope |
| kwargs and `position_ids` that do not arrive, also through checkpointing | test_model_behaviour, test_attention |
| packing with a cache or a mask, boundaries without positions | test_attention |
| `_supports_*` flags, captured outputs, decorators, `logits_to_keep`, reentrant checkpointing | test_model_behaviour |
| plans that name what is not there | test_parallel_plans, test_configuration |
| siblings, docstrings like imports, `auto_map`, re-saving, other config classes | test_remote_code, test_heads |
| PEFT's targets, generic heads as remote code | test_adapters, test_heads |
| `num_items_in_batch`, `shift_labels`, gradients that underflow before the loss scale | test_loss |
| statistics in half precision, gain after rounding, tracing, in-place gradients | test_stream_dtype, test_norms |
"""

import ast
import inspect
import json
import re
import textwrap
from typing import Unpack

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny_models import SIZES, random_ids, shaken, shaken_model, tiny_config
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import TransformersKwargs

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM, PeriLlamaModel
from modeling_periln import modeling_periln as model_file
from modeling_periln.norms import NORMS, PeriLlamaLayerNorm, PeriLlamaRMSNorm

# The configuration


def test_config_json_has_every_field_and_nothing_of_the_process(tmp_path):
    config = tiny_config(qk_norm="head", attn_implementation="eager", rms_norm_eps=1e-3)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    own = {name for name in PeriLlamaConfig.__annotations__ if name not in ("model_type", "layer_types")}
    assert len(own) >= 30
    assert own <= saved.keys()
    assert saved["norm_eps"] == 1e-3
    foreign = [key for key in saved if key.startswith("_") or "plan" in key or "attn_impl" in key or "rms_norm" in key]
    assert not foreign


@pytest.mark.parametrize(
    ("field", "value"),
    [("norm_placement", "periln"), ("num_key_value_heads", 3), ("norm_eps", {"embed_nrm": 1.0})],
)
def test_a_field_that_was_spoilt_later_is_refused_when_the_configuration_is_saved(field, value, tmp_path):
    """The checks bear the names (`validate_...`) by which Transformers finds them again."""
    config = tiny_config()
    setattr(config, field, value)
    with pytest.raises(Exception, match=f"{field}.*{value if isinstance(value, int) else 'no'}"):
        config.save_pretrained(tmp_path)


def test_the_model_type_is_not_one_of_transformers_own():
    assert PeriLlamaConfig.model_type == "peri_llama"
    assert PeriLlamaConfig.model_type not in CONFIG_MAPPING_NAMES
    assert PeriLlamaConfig.keys_to_ignore_at_inference == ["cache", "past_key_values"]


@pytest.mark.parametrize("qk_norm", [None, "head"])
def test_tensor_plans_have_only_styles_that_serving_engines_take(qk_norm):
    """QK-norm over all heads needs others, which not every engine has."""
    styles = set(tiny_config(qk_norm=qk_norm).base_model_tp_plan.values())
    assert {"colwise", "rowwise"} <= styles <= {"colwise", "rowwise", "replicated_with_grad_allreduce"}


# The classes


def test_the_classes_say_what_they_support():
    expected = {
        "config_class": PeriLlamaConfig,
        "base_model_prefix": "model",
        "supports_gradient_checkpointing": True,
        "_no_split_modules": ["PeriLlamaDecoderLayer"],
        "_skip_keys_device_placement": ["cache", "past_key_values"],
        "_supports_sdpa": True,
        "_supports_flash_attn": True,
        "_supports_flex_attn": True,
        "_supports_attention_backend": True,
        "_can_compile_fullgraph": True,
    }
    for model_class in (getattr(model_file, name) for name in model_file.__all__):
        assert {name: getattr(model_class, name) for name in expected} == expected
        assert model_class.is_backend_compatible()
    assert model_file.PeriLlamaPreTrainedModel.__annotations__["config"] is PeriLlamaConfig
    assert PeriLlamaForCausalLM._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_generation_is_inherited_by_the_very_class_and_its_loss_is_the_causal_one():
    """Transformers looks for `GenerationMixin` among the direct bases, and for the loss by the class's name."""
    assert GenerationMixin in PeriLlamaForCausalLM.__bases__
    assert shaken_model().loss_function is ForCausalLMLoss


def test_the_signature_that_generate_asks_for_at_every_token_is_worked_out_once(monkeypatch):
    """It asks remote code alone; 6 % of a small model's token went into it (LOG.md)."""
    model, worked_out = shaken_model(), []
    arguments = list(inspect.signature(inspect.unwrap(PeriLlamaModel.forward)).parameters)[1:6]
    from_function = inspect._signature_from_function

    def counted(cls, function, **kwargs):
        worked_out.append(function.__qualname__)
        return from_function(cls, function, **kwargs)

    monkeypatch.setattr(inspect, "_signature_from_function", counted)
    model.generate(random_ids(1, 4), max_new_tokens=3, do_sample=False)
    assert "PeriLlamaForCausalLM.forward" not in worked_out and worked_out
    monkeypatch.undo()
    add_hook_to_module(model, ModelHook())  # as device_map does
    assert list(inspect.signature(model.forward).parameters)[:5] == arguments


@pytest.mark.parametrize("model_class", [PeriLlamaModel, PeriLlamaForCausalLM])
def test_forward_has_llamas_arguments_and_none_that_a_decorator_reads(model_class):
    parameters = inspect.signature(model_class.forward).parameters
    llamas = ["input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds"]
    assert list(parameters)[1:6] == llamas
    read_from_kwargs = {"output_attentions", "output_hidden_states", "return_dict", "cache_position"}
    assert not read_from_kwargs & parameters.keys()
    assert "past_key_values" in parameters  # PEFT's prompt learning asks whether it is there
    assert parameters["kwargs"].annotation == Unpack[TransformersKwargs]


@pytest.mark.parametrize("model_class", [getattr(model_file, n) for n in model_file.__all__ if "PreTrained" not in n])
def test_every_class_alone_initializes_all_of_its_weights(model_class):
    """Each calls `post_init`: torch's own embedding would begin with a deviation of 1, its linear layers with 0.1."""
    torch.manual_seed(0)
    model = model_class(tiny_config(num_labels=3, hidden_size=64, depth_scaled_init=True, num_hidden_layers=2))
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            scaled = "o_proj" in name or "down_proj" in name
            assert weight.std().item() == pytest.approx(0.01 if scaled else 0.02, rel=0.2), name


def test_only_as_many_layers_run_as_the_configuration_says():
    """Assisted generation lets the first layers draft (`assistant_early_exit`) by changing the configuration."""
    model, ids = shaken_model(), random_ids(1, 5)
    runs = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_, i=layer.self_attn.layer_idx: runs.append(i))
    model.config.num_hidden_layers = 2
    model(ids)
    assert runs == [0, 1]
    model.config.num_hidden_layers = 3
    greedy = {"max_new_tokens": 6, "do_sample": False}
    early = model.generate(ids, assistant_early_exit=2, **greedy)
    assert torch.equal(early, model.generate(ids, **greedy))


# Names that others rewrite or replace


def test_no_weight_has_a_name_that_loaders_rewrite():
    """`weight_g`, `weight_v`, `gamma` and `beta` are renamed in every checkpoint that Transformers loads."""
    row = dict.fromkeys(("input_norm", "output_norm", "residual_norm", "embedding_norm", "final_norm"), True)
    model = shaken_model(norm_placement=row, norm_type="layernorm", qk_norm="head", attention_bias=True, mlp_bias=True)
    parts = {part for name in model.state_dict() for part in name.split(".")}
    assert {"weight", "bias", "q_norm", "attn_residual_norm"} <= parts
    assert not [part for part in parts if re.search("gamma|beta|weight_[gv]", part)]


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_can_be_made_from_its_size_alone_and_is_named_as_one(name):
    """Engines replace `...RMSNorm`, and take a weight that begins at 1 for a plain gain (at 0 it would be 1 + w)."""
    norm = NORMS[name](1)
    assert torch.equal(norm.weight, torch.ones(1))
    assert type(norm).__name__.endswith(("RMSNorm", "LayerNorm"))
    # No decorator that puts a kernel of the Hub in its place: that may overwrite the gradient of the residual add.
    assert inspect.getsource(type(norm)).startswith("class")
    if name == "rmsnorm":
        assert isinstance(norm, PeriLlamaRMSNorm) and not isinstance(norm, nn.LayerNorm)
        assert isinstance(NORMS[name](4, 1e-3).variance_epsilon, float)
    else:
        assert isinstance(norm, PeriLlamaLayerNorm) and norm.bias is not None


def without_casts(node):
    while isinstance(node, torch.fx.Node) and node.op == "call_method" and node.target == "to":
        node = node.args[0]
    return node


@pytest.mark.parametrize("learnable", [True, False])
def test_a_serving_engine_recognizes_the_rms_norm_by_its_operations(learnable):
    """weight * (x * rsqrt(mean(x^2) + eps)), casts apart, and eps follows the attribute: each layer has its own."""
    norm = PeriLlamaRMSNorm(6, 0.25, learnable)
    norm.variance_epsilon = 0.5
    graph = torch.fx.symbolic_trace(norm).graph
    (x,) = (node for node in graph.nodes if node.op == "placeholder")
    (output,) = (node for node in graph.nodes if node.op == "output")
    weight, normed = map(without_casts, without_casts(output.args[0]).args)
    assert (weight.op, weight.target) == ("get_attr", "weight")
    source, rsqrt = map(without_casts, normed.args)
    mean, eps = map(without_casts, without_casts(rsqrt.args[0]).args)
    square = without_casts(mean.args[0])
    assert source is x and without_casts(square.args[0]) is x
    names = [getattr(node.target, "__name__", node.target) for node in (rsqrt, mean, square)]
    assert names == ["rsqrt", "mean", "pow"]
    assert (square.args[1], eps) == (2, 0.5)


# What serving engines read in the source


def forward_of(module_class: type) -> ast.FunctionDef:
    return ast.parse(textwrap.dedent(inspect.getsource(module_class.forward))).body[0]


def test_attention_goes_through_the_interface_where_engines_look_for_it():
    """Once, through a local variable; the scale is an attribute. Transformers looks for it where it finds a class of
    attention in the model's file, and takes it for granted where it finds none, as here.
    """
    assert not re.search(r"^class \w*Attention\w*\(nn\.Module\):", inspect.getsource(model_file), re.MULTILINE)
    assert PeriLlamaModel._can_set_attn_implementation()
    nodes = list(ast.walk(forward_of(model_file.PeriLlamaAttention)))
    lookups = [n for n in nodes if isinstance(n, ast.Assign | ast.AnnAssign) and "get_interface" in ast.unparse(n)]
    assert len(lookups) == 1
    assert ast.unparse(lookups[0].value.func) == "ALL_ATTENTION_FUNCTIONS.get_interface"
    target = lookups[0].target if isinstance(lookups[0], ast.AnnAssign) else lookups[0].targets[0]
    calls = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == target.id]
    assert len(calls) == 1
    assert len(calls[0].args) == 5
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in calls[0].keywords}
    assert re.fullmatch(r"self\.\w+", keywords["scaling"])
    assert keywords[None] == "kwargs"


@pytest.mark.parametrize(
    ("module_class", "names"),
    [
        (model_file.PeriLlamaAttention, ("q_proj", "k_proj", "v_proj")),
        (model_file.PeriLlamaMLP, ("gate_proj", "up_proj")),
    ],
)
def test_projections_that_engines_merge_are_called_once_with_the_same_input(module_class, names):
    nodes = list(ast.walk(forward_of(module_class)))
    for name in names:
        assert sum(isinstance(n, ast.Attribute) and n.attr == name for n in nodes) == 1
        (call,) = (n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == f"self.{name}")
        assert [ast.unparse(arg) for arg in call.args] == ["hidden_states"] and not call.keywords


@pytest.mark.parametrize("placement", ["post", "peri"])
def test_modules_have_the_attributes_that_attention_functions_read(placement):
    model = shaken_model(norm_placement=placement)
    assert [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)] == ["model.layers"]
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        assert type(attention.layer_idx) is int and attention.layer_idx == i
        assert type(attention.scaling) is float and attention.scaling == pytest.approx(SIZES["head_dim"] ** -0.5)
        assert (attention.num_key_value_groups, attention.head_dim) == (2, SIZES["head_dim"])
        assert attention.config is model.config
    assert all(module.is_causal is True for module in model.modules() if hasattr(module, "is_causal"))


@pytest.mark.parametrize("placement", ["post", "peri", "mix"])
def test_the_base_model_can_be_called_as_a_serving_engine_calls_it(placement):
    """One row of tokens, its positions, no cache, no mask; a tuple with the last hidden state comes back."""
    model, ids = shaken_model(norm_placement=placement), random_ids(1, 9)
    positions = torch.arange(9)[None]
    result = model.model(ids, position_ids=positions, use_cache=False, return_dict=False)
    assert type(result) is tuple and len(result) == 1
    assert torch.equal(result[0] @ model.lm_head.weight.T, model(ids).logits)
    embeds = model.get_input_embeddings()(ids)
    again = model.model(inputs_embeds=embeds, position_ids=positions, use_cache=False, return_dict=False)
    assert torch.equal(again[0], result[0])


# Dtypes


@pytest.mark.parametrize("norm_type", NORMS)
def test_norms_that_are_kept_in_fp32_fit_into_a_half_precision_model(norm_type, tmp_path, monkeypatch):
    """Llama's `weight * x.to(dtype)` would hand FP32 to a BF16 matrix."""
    model = shaken_model(norm_type=norm_type, qk_norm="head")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(PeriLlamaForCausalLM, "_keep_in_fp32_modules_strict", ["norm"])
    kept = PeriLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    norms = {name: p.dtype for name, p in kept.named_parameters() if "norm" in name}
    assert set(norms.values()) == {torch.float32}
    assert kept.lm_head.weight.dtype == torch.bfloat16
    output = kept(random_ids(), labels=random_ids())
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(p.grad.dtype == p.dtype for p in kept.parameters())


def test_rotary_frequencies_are_fp32_in_a_model_that_is_made_in_bf16():
    model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


# Trainers


class Documents(Dataset):
    """Rows of unequal length: the mean of micro batches' means would not be the batch's."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        ids = random_ids(1, 3 + 5 * (i % 3), seed=i)[0].tolist()
        return {"input_ids": ids, "labels": ids}


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    return {key: torch.tensor([r[key] + [f] * (width - len(r[key])) for r in rows]) for key, f in fill.items()}


class WithoutLogits(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs | {"skip_logits": True}, *args, **kwargs)


@pytest.mark.slow
def test_gradient_accumulation_in_transformers_trainer_is_the_whole_batch(tmp_path):
    """`**kwargs` in forward is how the Trainer learns that the model divides by the whole batch's tokens."""
    results = []
    for i, (trainer_class, rows) in enumerate([(Trainer, 12), (Trainer, 3), (WithoutLogits, 12), (WithoutLogits, 3)]):
        arguments = TrainingArguments(
            tmp_path / str(i),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=12 // rows,
            max_steps=2,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = trainer_class(shaken_model(), arguments, data_collator=padded, train_dataset=Documents())
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        results.append((losses, trainer.evaluate(Documents())["eval_loss"], trainer.model.state_dict()))
    losses, evaluated, weights = results[0]
    assert losses[1] < losses[0] - 0.01
    for others, other, state in results[1:]:
        assert others == pytest.approx(losses, abs=1e-4)
        assert other == pytest.approx(evaluated, abs=1e-4)
        assert all(torch.allclose(state[key], weight, atol=1e-5) for key, weight in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["post", "peri"])
def test_trl_trains_a_checkpoint_by_its_path_on_the_models_own_loss(placement, tmp_path):
    """TRL reads `auto_map`, and puts its own head in place of everything after the base model."""
    trl = pytest.importorskip("trl", reason="supervised fine-tuning is TRL's")
    from datasets import Dataset as Rows
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(SIZES["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w1", eos_token="w2"
    )
    model = shaken(PeriLlamaForCausalLM(tiny_config(norm_placement=placement, pad_token_id=1, eos_token_id=2)))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ids = random_ids(2, 9)
    arguments = trl.SFTConfig(
        str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=2,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        activation_checkpointing=False,
    )
    rows = Rows.from_list([{"input_ids": row} for row in ids.tolist()])
    trainer = trl.SFTTrainer(model=str(tmp_path / "model"), args=arguments, train_dataset=rows)
    assert type(trainer.model) is PeriLlamaForCausalLM
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses == [pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-4)]
