"""The configuration: refuses what cannot be meant, keeps what it is given, and comes back from JSON as it went."""

import json
import math

import pytest
import transformers
from tiny_models import SIZES, tiny_config
from transformers import AutoModelForCausalLM

from modeling_periln import PLACEMENT_NAMES, PeriLlamaConfig, PeriLlamaForCausalLM

AUTO_MAP = {
    "AutoConfig": "configuration_periln.PeriLlamaConfig",
    "AutoModel": "modeling_periln.PeriLlamaModel",
    "AutoModelForCausalLM": "modeling_periln.PeriLlamaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_periln.PeriLlamaForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_periln.PeriLlamaForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_periln.PeriLlamaForQuestionAnswering",
}
# Every field of the family at a value that is not its default.
UNUSUAL = {
    **SIZES,
    "hidden_act": "gelu",
    "initializer_range": 0.01,
    "use_cache": False,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
    "attention_bias": True,
    "attention_dropout": 0.1,
    "mlp_bias": True,
    "classifier_dropout": 0.25,
    "embedding_norm": False,
    "final_norm": False,
    "norm_type": "layernorm",
    "norm_eps": {"attn_input_norm": [1e-3, 1e-4, 1e-5], "final_norm": 1e-7, "q_norm": 0.5},
    "qk_norm": "head",
    "residual_scale": "1/sqrt(2L)",
    "residual_dtype": "float16",
    "depth_scaled_init": True,
}

PER_LAYER_SLOTS = (
    *("attn_input_norm", "attn_output_norm", "attn_residual_norm"),
    *("mlp_input_norm", "mlp_output_norm", "mlp_residual_norm"),
    *("q_norm", "k_norm"),
)


def saved_dict(config: PeriLlamaConfig) -> dict:
    """What is in config.json, without the version of the library that wrote it."""
    return {k: v for k, v in json.loads(config.to_json_string(use_diff=False)).items() if k != "transformers_version"}


def error_of(**changes) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        tiny_config(**changes)
    return str(caught.value)


# What is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"head_dim": None, "hidden_size": 18}, ["hidden_size=18", "num_attention_heads=4", "head_dim"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
        ({"num_key_value_heads": 8}, ["num_attention_heads=4", "num_key_value_heads=8"]),
        ({"head_dim": 5}, ["head_dim=5", "even"]),
        ({"head_dim": 3}, ["head_dim=3", "even"]),
        ({"head_dim": 0}, ["head_dim=0"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers=0", "at least 1"]),
        ({"vocab_size": -5}, ["vocab_size=-5", "at least 1"]),
        ({"max_position_embeddings": 0}, ["max_position_embeddings=0"]),
        ({"initializer_range": 0}, ["initializer_range=0"]),
        ({"initializer_range": 20}, ["initializer_range=20"]),
        ({"attention_dropout": 1}, ["attention_dropout=1"]),
        ({"classifier_dropout": -0.1}, ["classifier_dropout=-0.1"]),
        ({"hidden_act": "sillu"}, ["hidden_act='sillu'", "silu"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_field_and_value(changes, says):
    message = error_of(**changes)
    assert all(fragment in message for fragment in says), message


@pytest.mark.parametrize("placement", ["pre", "post", "lns", "deepnorm", "mix", "pre_post"])
def test_frozen_gamma_is_refused_where_no_output_norm_is(placement):
    message = error_of(norm_placement=placement, output_norm_learnable=False)
    assert "output_norm_learnable=False" in message
    assert repr(placement) in message


@pytest.mark.parametrize("changes", [{"norm_placement": "output"}, {"layer_placements": ["pre", "pre", "peri"]}])
def test_frozen_gamma_is_allowed_where_one_layer_has_an_output_norm(changes):
    assert tiny_config(output_norm_learnable=False, **changes).output_norm_learnable is False


@pytest.mark.parametrize(
    ("eps", "says"),
    [
        (-1e-6, ["norm_eps=-1e-06", "at least 0"]),
        (math.nan, ["norm_eps=nan"]),
        (math.inf, ["norm_eps=inf"]),
        ({"atn_input_norm": 1e-5}, ["norm_eps['atn_input_norm']", "'attn_input_norm'"]),
        ({"input_layernorm": 1e-5}, ["norm_eps['input_layernorm']", "norm"]),
        ({"attn_input_norm": [1e-5, 1e-5]}, ["norm_eps['attn_input_norm']", "2 entries", "num_hidden_layers=3"]),
        ({"attn_input_norm": [1e-5, "x", 1e-5]}, ["norm_eps['attn_input_norm']", "'x'", "number"]),
        ({"mlp_input_norm": True}, ["norm_eps['mlp_input_norm']=True"]),
        ({"mlp_input_norm": None}, ["norm_eps['mlp_input_norm']=None"]),
        ({"final_norm": [1e-5, 1e-5, 1e-5]}, ["norm_eps['final_norm']=[1e-05"]),
        ({"embed_norm": -1}, ["norm_eps['embed_norm']=-1"]),
    ],
)
def test_an_epsilon_is_refused_by_slot_and_value(eps, says):
    message = error_of(norm_eps=eps)
    assert all(fragment in message for fragment in says), message


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("norm_placment", "norm_placement"),
        ("embed_norm", "embedding_norm"),
        ("residual_scales", "residual_scale"),
        ("layer_placement", "layer_placements"),
        ("num_key_value_head", "num_key_value_heads"),
        ("norm_epsilon", "norm_eps"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_field_that_was_meant(misspelt, meant):
    message = error_of(**{misspelt: "pre"})
    assert f"{misspelt!r} (value 'pre')" in message
    assert f"did you mean {meant!r}?" in message


def test_a_misspelt_field_in_a_saved_config_is_refused_too(tmp_path):
    fields = saved_dict(tiny_config()) | {"norm_placment": "pre"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="did you mean 'norm_placement'"):
        PeriLlamaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ({"norm_placment": "pre"}, "'norm_placment' .value 'pre'.: did you mean 'norm_placement'"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 2"),
        ({"norm_placement": "periln"}, "norm_placement='periln'.*'peri'"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 .*num_key_value_heads=3"),
        ({"layer_placements": ["pre"]}, "1 entries for num_hidden_layers=3"),
        ({"norm_type": "rms"}, "norm_type='rms'"),
    ],
)
@pytest.mark.parametrize("load", [PeriLlamaConfig.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_an_override_of_a_saved_configuration_is_checked_like_a_field(load, override, says, tmp_path):
    """Transformers drops an override that no field takes, and sets the others after the checks."""
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says):
        load(tmp_path, **override)
    assert PeriLlamaConfig.from_pretrained(tmp_path, norm_placement="post", cache_dir=None).norm_placement == "post"


def test_a_layer_is_offered_what_a_layer_can_be():
    message = error_of(layer_placements=["pre", "per", "pre"])
    assert "layer_placements[1]='per'" in message and "'peri'" in message
    assert "mix" not in message and "hybrid_star" not in message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"residual_dtype": "fp16"}, "residual_dtype"),
        ({"norm_type": "RMSNorm"}, "norm_type"),
        ({"qk_norm": "heads"}, "qk_norm"),
        ({"qk_norm": True}, "qk_norm"),
        ({"hidden_size": 16.0}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"head_dim": "6"}, "head_dim"),
        ({"norm_eps": "1e-6"}, "norm_eps"),
        ({"norm_eps": [1e-6, 1e-6, 1e-6]}, "norm_eps"),
        ({"norm_placement": ["pre"]}, "norm_placement"),
        ({"layer_placements": "pre"}, "layer_placements"),
        ({"layer_placements": ["pre", 1, "pre"]}, "layer_placements"),
        ({"embedding_norm": 1}, "embedding_norm"),
        ({"output_norm_learnable": None}, "output_norm_learnable"),
        ({"residual_scale": None}, "residual_scale"),
        ({"depth_scaled_init": "yes"}, "depth_scaled_init"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_field_and_value(changes, field):
    """A ValueError: what Transformers' strict configurations raise is none."""
    message = error_of(**changes)
    assert message.startswith(f"{field}={changes[field]!r}: ")


def test_types_are_checked_on_assignment_too():
    config = tiny_config()
    with pytest.raises(ValueError, match="residual_dtype='half'"):
        config.residual_dtype = "half"
    assert config.residual_dtype is None


def test_an_integer_does_where_a_json_file_may_hold_one():
    config = tiny_config(norm_eps=1, initializer_range=1, attention_dropout=0, residual_scale=2)
    assert (config.norm_eps, config.residual_scale) == (1, 2)
    assert config.eps_of("final_norm") == 1.0


# What is kept


def test_an_unknown_field_is_kept_with_a_warning(caplog, tmp_path):
    config = tiny_config(laboratory="north")
    assert "'laboratory'" in caplog.text
    assert config.laboratory == "north"
    config.save_pretrained(tmp_path)
    assert PeriLlamaConfig.from_pretrained(tmp_path).laboratory == "north"


def test_a_generation_parameter_is_dropped_with_a_warning(caplog):
    """Transformers drops it; silently, somebody who sets a temperature here would never know."""
    config = tiny_config(temperature=0.7)
    assert "drops 'temperature'" in caplog.text and "generation_config" in caplog.text
    assert "keeps" not in caplog.text
    assert not hasattr(config, "temperature")


def test_a_known_field_is_kept_without_a_warning(caplog):
    tiny_config(**UNUSUAL)
    tiny_config(rope_theta=10_000.0, torch_dtype="float32", attn_implementation="eager", output_hidden_states=True)
    assert "unknown field" not in caplog.text


def test_defaults_are_llama_3s_and_the_placement_peri():
    config = PeriLlamaConfig()
    assert config.model_type == "peri_llama"
    assert config.norm_placement == "peri"
    assert config.rope_parameters["rope_theta"] == 500_000.0
    assert (config.num_key_value_heads, config.head_dim) == (8, 128)
    assert config.residual_dtype is None


def test_heads_and_head_size_follow_the_sizes_unless_they_are_given():
    config = PeriLlamaConfig(hidden_size=24, num_attention_heads=6)
    assert (config.num_key_value_heads, config.head_dim) == (6, 4)
    assert tiny_config().head_dim == 6


def test_the_name_that_other_tools_look_for_is_an_alias_of_norm_eps():
    config = tiny_config(rms_norm_eps=1e-3)
    assert config.norm_eps == config.rms_norm_eps == 1e-3


def test_epsilon_of_a_slot_is_its_own_else_1e_6():
    config = tiny_config(norm_eps={"attn_input_norm": [0.1, 0.2, 0.3], "final_norm": 0.4})
    assert [config.eps_of("attn_input_norm", i) for i in range(3)] == [0.1, 0.2, 0.3]
    assert config.eps_of("final_norm") == 0.4
    assert config.eps_of("mlp_input_norm", 1) == config.eps_of("embed_norm") == 1e-6


def test_epsilons_reach_the_norms_of_their_slots():
    per_layer = {slot: [i / 10 + j / 100 for j in range(3)] for i, slot in enumerate(PER_LAYER_SLOTS, start=1)}
    both = {f"{part}_{place}_norm": True for part in ("attn", "mlp") for place in ("input", "output", "residual")}
    assert set(both) | {"q_norm", "k_norm"} == set(per_layer)
    row = {"input_norm": True, "output_norm": True, "residual_norm": True, "embedding_norm": True, "final_norm": True}
    eps = {**per_layer, "embed_norm": 0.91, "final_norm": 0.92}
    model = PeriLlamaForCausalLM(tiny_config(norm_placement=row, qk_norm="head", norm_eps=eps)).model
    for j, layer in enumerate(model.layers):
        for slot in both:
            assert getattr(layer, slot).variance_epsilon == per_layer[slot][j]
        assert layer.self_attn.q_norm.variance_epsilon == per_layer["q_norm"][j]
        assert layer.self_attn.k_norm.variance_epsilon == per_layer["k_norm"][j]
    assert (model.embed_norm.variance_epsilon, model.final_norm.variance_epsilon) == (0.91, 0.92)


# JSON and back


@pytest.mark.parametrize("placement", PLACEMENT_NAMES)
def test_round_trip_through_a_saved_file_changes_nothing(placement, tmp_path):
    config = tiny_config(norm_placement=placement)
    config.save_pretrained(tmp_path)
    loaded = PeriLlamaConfig.from_pretrained(tmp_path)
    assert saved_dict(loaded) == saved_dict(config)
    assert loaded.stream_plan() == config.stream_plan()
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("placement", ["pre", {"input_norm": True, "output_norm": True, "alpha": "(2L)^(1/4)", "s": 2}])
def test_round_trip_keeps_every_field_at_an_unusual_value(placement, tmp_path):
    config = tiny_config(**UNUSUAL, norm_placement=placement)
    config.save_pretrained(tmp_path)
    loaded = PeriLlamaConfig.from_pretrained(tmp_path)
    assert saved_dict(loaded) == saved_dict(config)
    for field, value in UNUSUAL.items():
        assert getattr(loaded, field) == value, field
    assert loaded.norm_placement == placement
    assert loaded.norm_eps["attn_input_norm"] == [1e-3, 1e-4, 1e-5]


def test_round_trip_keeps_layer_placements_and_frozen_gamma(tmp_path):
    config = tiny_config(layer_placements=["post", "peri", "output"], output_norm_learnable=False)
    config.save_pretrained(tmp_path)
    loaded = PeriLlamaConfig.from_pretrained(tmp_path)
    assert loaded.layer_placements == ["post", "peri", "output"]
    assert loaded.output_norm_learnable is False
    assert loaded.stream_plan() == config.stream_plan()


def test_config_json_holds_the_placement_even_where_it_is_the_default(tmp_path):
    PeriLlamaConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["norm_placement"] == "peri"
    assert written["model_type"] == "peri_llama"
    assert written["residual_dtype"] is None


# auto_map: where the auto classes find the code


def test_auto_map_names_config_and_models_without_a_repository(tmp_path):
    assert tiny_config().auto_map == AUTO_MAP
    tiny_config().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_auto_map_of_another_repository_loses_its_prefix_on_load_and_save(tmp_path):
    prefixed = {name: f"someone/peri-400m--{reference}" for name, reference in AUTO_MAP.items()}
    (tmp_path / "config.json").write_text(json.dumps(saved_dict(tiny_config()) | {"auto_map": prefixed}))
    config = PeriLlamaConfig.from_pretrained(tmp_path)
    assert config.auto_map == AUTO_MAP
    model = PeriLlamaForCausalLM(config)
    for saved, folder in ((config, tmp_path / "config"), (model, tmp_path / "lm"), (model.model, tmp_path / "base")):
        saved.save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_auto_map_keeps_a_class_that_somebody_added():
    more = {"AutoModelForSequenceClassification": "someone/x--classifier.PeriLlamaForSequenceClassification"}
    expected = {"AutoModelForSequenceClassification": "classifier.PeriLlamaForSequenceClassification"}
    assert tiny_config(auto_map=more).auto_map == AUTO_MAP | expected


@pytest.mark.parametrize("placement", ["post", "pre", "peri", "output"])
def test_pipeline_plan_names_exactly_the_modules_that_are_there(placement):
    config = tiny_config(norm_placement=placement)
    row = config.stream_plan()
    expected = [
        "embed_tokens",
        *["embed_norm"] * bool(row.embedding_norm),
        "layers",
        *["final_norm"] * bool(row.final_norm),
    ]
    assert list(config.base_model_pp_plan) == expected
    assert "base_model_pp_plan" not in saved_dict(config)


def test_tensor_plan_names_modules_that_exist():
    config = tiny_config(qk_norm="head")
    names = {name.replace(".0.", ".*.") for name, _ in PeriLlamaForCausalLM(config).model.named_modules()}
    assert set(config.base_model_tp_plan) <= names
    assert "layers.*.self_attn.q_norm" in config.base_model_tp_plan
    assert "layers.*.self_attn.q_norm" not in tiny_config().base_model_tp_plan


@pytest.mark.parametrize("slot", ["input_norm", "mlp_inner_norm", "q_norm", "final_norm"])
def test_an_epsilon_of_a_slot_needs_a_norm_that_has_one(slot):
    placement = {"input_norm": True, slot: {"eps": 1e-3}}
    assert tiny_config(norm_placement=placement).norm_type == "rmsnorm"
    tiny_config(norm_placement={"input_norm": True, slot: {"eps": 1e-3, "kind": "l2"}}, norm_type="dyt")
    with pytest.raises(ValueError, match=r"eps=0.001: dyt has no epsilon"):
        tiny_config(norm_placement=placement, norm_type="dyt")


def test_tensor_plan_keeps_the_heads_together_where_any_layer_norms_over_all_of_them():
    layers = [{"input_norm": True, "q_norm": over, "k_norm": over} for over in ("full", "head", "head")]
    for placements in (layers, layers[::-1]):
        plan = tiny_config(layer_placements=placements).base_model_tp_plan
        assert plan["layers.*.self_attn.q_proj"] == plan["layers.*.self_attn.k_proj"] == "colwise_gather_output"
        assert plan["layers.*.self_attn.o_proj"] == "rowwise_split_input"


def test_tensor_plan_may_be_given_a_tied_embedding_by_a_release_that_does_so_and_nothing_else():
    """Transformers 5.19 assigns that entry when a tied configuration is made; there, the assignment used to fail."""
    config = tiny_config(tie_word_embeddings=True)
    tied = {"embed_tokens": "embedding_rowwise"}
    config.base_model_tp_plan = {**config.base_model_tp_plan, **tied}
    assert tied.items() <= config.base_model_tp_plan.items()
    assert not tied.items() <= tiny_config().base_model_tp_plan.items()
    with pytest.raises(AttributeError, match="base_model_tp_plan"):
        config.base_model_tp_plan = tied


# Overrides, aliases and names that come from elsewhere


def test_mix_in_a_list_is_refused_without_proposing_mix():
    message = error_of(layer_placements=["mix", "pre", "pre"])
    assert "layer_placements[0]='mix'" in message
    assert "did you mean 'mix'" not in message


def test_frozen_gamma_without_output_norm_in_a_list_names_the_list():
    message = error_of(layer_placements=["pre", "pre", "post"], output_norm_learnable=False)
    assert "layer_placements=['pre', 'pre', 'post']" in message


def test_an_unknown_placement_is_refused_beside_a_list_too():
    assert "norm_placement='nonsense'" in error_of(norm_placement="nonsense", layer_placements=["pre"] * 3)


def test_an_epsilon_for_the_empty_slot_name_is_refused():
    assert "norm_eps['']" in error_of(norm_eps={"": 1e-5})


def test_a_bad_epsilon_under_its_alias_is_a_value_error_too():
    assert "norm_eps=-1.0" in error_of(rms_norm_eps=-1.0)


@pytest.mark.parametrize(
    "field", [{"attention_chunk_size": 4}, {"is_causal": False}, {"layer_types": ["chunked_attention"] * 3}]
)
def test_a_field_that_transformers_would_obey_is_refused(field):
    assert next(iter(field)) in error_of(**field)


@pytest.mark.parametrize("field", ["sep_token_id", "cls_token_id", "mask_token_id"])
def test_another_special_token_is_not_taken_for_a_misspelling(field):
    assert getattr(tiny_config(**{field: 5}), field) == 5


def test_pipeline_plan_follows_an_override_at_load(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config = PeriLlamaConfig.from_pretrained(tmp_path, embedding_norm=False)
    assert "embed_norm" not in config.base_model_pp_plan


def test_fsdp_plan_names_modules_that_exist():
    model = PeriLlamaForCausalLM(tiny_config())
    if not hasattr(model, "fsdp_plan"):
        pytest.skip(f"transformers {transformers.__version__} knows no plans for FSDP")
    names = {name.replace(".0", ".*") for name, _ in model.named_modules()}
    assert set(model.fsdp_plan) <= names


def test_epsilons_of_another_number_of_layers_are_refused_when_the_model_is_built():
    config = tiny_config(norm_eps={"attn_input_norm": [0.1, 0.2, 0.3]})
    config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="3 entries for num_hidden_layers=2"):
        PeriLlamaForCausalLM(config)


def test_the_model_checks_a_field_that_was_set_after_the_configuration_was_made():
    config = tiny_config()
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="num_attention_heads=4 is not a multiple of num_key_value_heads=3"):
        PeriLlamaForCausalLM(config)


def test_an_epsilon_and_its_alias_that_disagree_are_refused():
    with pytest.raises(ValueError, match="norm_eps=0.1 and its alias rms_norm_eps=0.2 are both given"):
        tiny_config(norm_eps=0.1, rms_norm_eps=0.2)
    assert tiny_config(rms_norm_eps=0.2).norm_eps == 0.2
