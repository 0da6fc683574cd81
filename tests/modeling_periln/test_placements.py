"""A placement is a row of data: every row against numbers written by hand, for a model of eight layers."""

import math
import re

import pytest
import torch
from test_literature_rows import ROWS
from tiny_models import NORMS_OF, SIZES, random_ids, shaken_model, tiny_config, tiny_model

from modeling_periln import PLACEMENT_NAMES, PeriLlamaConfig, PeriLlamaForCausalLM
from modeling_periln.placements import get_placement, plan_stream
from modeling_periln.slots import RULES, Learned, evaluate_rule

ONES = [1.0] * 8
# name: norms A, B, C; alpha, s, c, init gain of layers 1 to 8; (embedding norm, final norm)
TABLE = {
    "post": ("--C", ONES, ONES, ONES, 1.0, (False, False)),
    "pre": ("A--", ONES, ONES, ONES, 1.0, (False, True)),
    "peri": ("AB-", ONES, ONES, ONES, 1.0, (True, True)),
    "output": ("-B-", ONES, ONES, ONES, 1.0, (False, True)),
    "pre_post": ("A-C", ONES, ONES, ONES, 1.0, (False, False)),
    "deepnorm": ("--C", [2.0] * 8, ONES, ONES, 0.353553, (False, False)),
    "lns": (
        "A--",
        ONES,
        ONES,
        [1.0, 0.707107, 0.577350, 0.5, 0.447214, 0.408248, 0.377964, 0.353553],
        1.0,
        (False, True),
    ),
}


def letters_of(sublayer) -> str:
    flags = (("A", sublayer.input_norm), ("B", sublayer.output_norm), ("C", sublayer.residual_norm))
    return "".join(letter if on else "-" for letter, on in flags)


def norms(layer) -> str:
    """The letters of a layer whose sublayers are alike, or of both."""
    both = [letters_of(sublayer) for sublayer in layer.sublayers]
    return both[0] if both[0] == both[1] else " ".join(both)


def factors(plan, name: str) -> list[float]:
    """A factor of each layer, the same in both sublayers."""
    assert [getattr(x.attn, name) for x in plan.layers] == [getattr(x.mlp, name) for x in plan.layers]
    return [getattr(x.attn, name) for x in plan.layers]


def ends_of(plan) -> tuple[bool, bool]:
    return plan.embedding_norm is not None, plan.final_norm is not None


@pytest.mark.parametrize("name", TABLE)
def test_row_says_what_the_paper_says(name):
    letters, alpha, s, c, gain, ends = TABLE[name]
    plan = plan_stream(name, 8)
    assert [norms(layer) for layer in plan.layers] == [letters] * 8
    assert factors(plan, "alpha") == pytest.approx(alpha, rel=1e-5)
    assert factors(plan, "s") == pytest.approx(s, rel=1e-5)
    assert factors(plan, "c") == pytest.approx(c, rel=1e-5)
    assert [layer.init_gain for layer in plan.layers] == pytest.approx([gain] * 8, rel=1e-5)
    assert ends_of(plan) == ends


def test_there_is_no_row_without_an_expectation_here():
    assert set(TABLE) == set(NORMS_OF) and not set(TABLE) & set(ROWS)
    assert set(PLACEMENT_NAMES) == {*TABLE, *ROWS, "mix"}


@pytest.mark.parametrize(("num_layers", "post"), [(1, 1), (2, 1), (4, 1), (7, 1), (8, 2), (24, 6), (32, 8)])
def test_mix_is_post_in_the_first_quarter_and_pre_in_the_rest(num_layers, post):
    plan = plan_stream("mix", num_layers)
    assert [norms(layer) for layer in plan.layers] == ["--C"] * post + ["A--"] * (num_layers - post)
    assert ends_of(plan) == (False, True)


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        ("1/sqrt(l)", 0.5),
        ("1/sqrt(L)", 1 / 3),
        ("1/sqrt(2L)", 0.2357023),
        ("1/L", 1 / 9),
        ("2L", 18.0),
        ("sqrt(log(2L))", 1.7001093),
        ("(2L)^(1/4)", 2.0597671),
        ("(8L)^(-1/4)", 0.3432945),
        ("admin", 2.3351322),
    ],
)
def test_rule_at_layer_4_of_9(rule, value):
    assert evaluate_rule(rule, 4, 9) == pytest.approx(value, rel=1e-6)


def test_every_rule_was_checked_and_a_number_is_itself():
    checked = {"1/sqrt(l)", "1/sqrt(L)", "1/sqrt(2L)", "1/L", "2L", "(2L)^(1/4)", "(8L)^(-1/4)", "sqrt(log(2L))"}
    assert set(RULES) == checked | {"admin"}
    assert evaluate_rule(0.25, 4, 9) == 0.25
    assert evaluate_rule(3, 4, 9) == 3.0


@pytest.mark.parametrize("code", ["l", "1/l", "1/sqrt(l) ", "2*L", "__import__('os').getcwd()"])
def test_rules_are_looked_up_and_never_evaluated(code):
    with pytest.raises(ValueError, match="not a known rule"):
        evaluate_rule(code, 1, 1)


# A list of placements, one a layer


def test_layer_placements_gives_each_layer_its_row_and_its_own_place_in_the_rules():
    plan = plan_stream("peri", 4, layer_placements=["deepnorm", "post", "lns", "peri"])
    assert [norms(layer) for layer in plan.layers] == ["--C", "--C", "A--", "AB-"]
    assert factors(plan, "alpha") == pytest.approx([8**0.25, 1, 1, 1])
    assert factors(plan, "c") == pytest.approx([1, 1, 3**-0.5, 1])
    assert [layer.init_gain for layer in plan.layers] == pytest.approx([32**-0.25, 1, 1, 1])


def test_layer_placements_has_the_ends_of_pre_unless_they_are_given():
    names = ["peri"] * 3
    assert ends_of(plan_stream("peri", 3, layer_placements=names))[0] is False
    assert ends_of(plan_stream("post", 3, layer_placements=names))[1] is True
    given = plan_stream("peri", 3, layer_placements=names, embedding_norm=True, final_norm=False)
    assert ends_of(given) == (True, False)


def test_mix_is_the_same_model_as_its_list():
    ids = random_ids()
    mix = shaken_model(norm_placement="mix", num_hidden_layers=4)
    spelt = shaken_model(layer_placements=["post", "pre", "pre", "pre"], num_hidden_layers=4)
    assert mix.state_dict().keys() == spelt.state_dict().keys()
    assert torch.equal(mix(ids).logits, spelt(ids).logits)


@pytest.mark.parametrize("name", PLACEMENT_NAMES)
@pytest.mark.parametrize("end", ["embedding_norm", "final_norm"])
@pytest.mark.parametrize("value", [True, False])
def test_an_end_that_is_given_overrides_the_row_and_nothing_else(name, end, value):
    changed, row = plan_stream(name, 8, **{end: value}), plan_stream(name, 8)
    other = {"embedding_norm": "final_norm", "final_norm": "embedding_norm"}[end]
    assert (getattr(changed, end) is not None) is value
    assert getattr(changed, other) == getattr(row, other)
    assert changed.layers == row.layers


# residual_scale


@pytest.mark.parametrize("name", PLACEMENT_NAMES)
@pytest.mark.parametrize(
    ("scale", "expected"), [(0.5, [0.5] * 4), ("1/sqrt(2L)", [8**-0.5] * 4), ("1/sqrt(l)", [1, 0.707107, 0.57735, 0.5])]
)
def test_residual_scale_multiplies_s_and_nothing_else(name, scale, expected):
    scaled, plain = plan_stream(name, 4, residual_scale=scale), plan_stream(name, 4)
    assert factors(scaled, "s") == pytest.approx(expected, rel=1e-5)
    for field in ("input_norm", "output_norm", "residual_norm", "inner_norm", "alpha", "c"):
        for changed, row in zip(scaled.layers, plain.layers, strict=True):
            assert [getattr(x, field) for x in changed.sublayers] == [getattr(x, field) for x in row.sublayers]
    assert [x.init_gain for x in scaled.layers] == [x.init_gain for x in plain.layers]


def test_residual_scale_multiplies_the_s_of_a_row_of_the_users_own():
    plan = plan_stream({"input_norm": True, "s": 0.5}, 8, residual_scale="1/sqrt(2L)")
    assert factors(plan, "s") == pytest.approx([0.125] * 8)


# The user's own row

SANDWICH = {
    "input_norm": True,
    "output_norm": True,
    "final_norm": True,
    "alpha": 0.75,
    "s": "1/sqrt(2L)",
    "c": "1/sqrt(l)",
}


def test_what_a_users_row_leaves_out_is_off_or_one():
    plan = plan_stream({}, 2)
    assert [norms(layer) for layer in plan.layers] == ["---"] * 2
    assert {(s.alpha, s.s, s.c) for x in plan.layers for s in x.sublayers} == {(1.0, 1.0, 1.0)}
    assert {x.init_gain for x in plan.layers} == {1.0}
    assert ends_of(plan) == (False, False)


def test_a_users_row_is_evaluated_like_any_other():
    plan = plan_stream(SANDWICH, 8)
    assert [norms(layer) for layer in plan.layers] == ["AB-"] * 8
    assert set(factors(plan, "alpha")) == {0.75}
    assert factors(plan, "s") == pytest.approx([0.25] * 8)
    assert factors(plan, "c") == pytest.approx(TABLE["lns"][3], rel=1e-5)
    assert ends_of(plan) == (False, True)


def test_peri_spelt_out_is_peri():
    spelt = {"input_norm": True, "output_norm": True, "embedding_norm": True, "final_norm": True}
    assert plan_stream(spelt, 8) == plan_stream("peri", 8)
    ids = random_ids()
    assert torch.equal(shaken_model(norm_placement=spelt)(ids).logits, shaken_model(norm_placement="peri")(ids).logits)


def test_a_users_row_survives_a_saved_checkpoint(tmp_path):
    model = shaken_model(norm_placement=SANDWICH, residual_scale="1/sqrt(L)")
    model.save_pretrained(tmp_path)
    loaded = PeriLlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.norm_placement == SANDWICH
    assert loaded.config.stream_plan() == model.config.stream_plan()
    ids = random_ids()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


# The plan reaches the modules


@pytest.mark.parametrize("name", [*PLACEMENT_NAMES, "users"])
def test_factors_of_the_plan_are_those_in_the_layers(name):
    model = tiny_model(norm_placement=SANDWICH if name == "users" else name, num_hidden_layers=4, residual_scale=0.5)
    plan = model.config.stream_plan()
    assert len(model.model.layers) == len(plan.layers) == 4
    for layer, row in zip(model.model.layers, plan.layers, strict=True):
        for name, sublayer in (("attn", row.attn), ("mlp", row.mlp)):
            residual = getattr(layer, f"{name}_residual")
            for factor in ("alpha", "s"):
                expected, found = getattr(sublayer, factor), getattr(residual, factor)
                if isinstance(expected, Learned):
                    assert isinstance(found, torch.nn.Parameter)
                    assert torch.equal(found, torch.full_like(found, expected.init))
                else:
                    assert found == expected
            assert getattr(layer, f"{name}_c") == sublayer.c


# Errors name the field, the value and the nearest name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm_placement": "perri"}, ["norm_placement='perri'", "did you mean 'peri'?", "'deepnorm'"]),
        ({"norm_placement": "prepost"}, ["norm_placement='prepost'", "did you mean 'pre_post'?"]),
        ({"norm_placement": "xyzzy"}, ["norm_placement='xyzzy'", "'post', 'pre', 'peri'"]),
        ({"layer_placements": ["pre", "pots", "pre"]}, ["layer_placements[1]='pots'", "did you mean 'post'?"]),
        ({"layer_placements": ["pre"]}, ["layer_placements", "1 entries", "num_hidden_layers=3"]),
        ({"norm_placement": {"input_nrom": True}}, ["norm_placement", "'input_nrom'", "did you mean 'input_norm'?"]),
        ({"norm_placement": {"input_norm": 1}}, ["norm_placement['input_norm']=1", "true or false"]),
        ({"norm_placement": {"final_norm": "yes"}}, ["norm_placement['final_norm']='yes'", "true or false"]),
        ({"norm_placement": {"alpha": "(2L)^(1/3)"}}, ["norm_placement['alpha']='(2L)^(1/3)'", "'(2L)^(1/4)'?"]),
        ({"norm_placement": {"s": True}}, ["norm_placement['s']=True", "finite number"]),
        ({"norm_placement": {"c": math.inf}}, ["norm_placement['c']=inf", "finite number"]),
        ({"norm_placement": {"s": None}}, ["norm_placement['s']=None", "finite number"]),
        ({"residual_scale": "1/sqrt(3L)"}, ["residual_scale='1/sqrt(3L)'", "did you mean '1/sqrt(L)'?"]),
        ({"residual_scale": math.nan}, ["residual_scale=nan", "finite number"]),
    ],
)
def test_error_names_field_value_and_nearest_name(changes, says):
    with pytest.raises(ValueError, match=re.escape(says[0])) as caught:
        tiny_config(**changes)
    assert all(fragment in str(caught.value) for fragment in says), caught.value


def test_a_placement_is_a_name_or_a_mapping():
    with pytest.raises(ValueError, match="norm_placement=3 must be a placement's name or a mapping"):
        get_placement(3)


def test_a_list_of_the_wrong_length_is_refused_when_the_model_is_built_from_a_changed_config():
    config = PeriLlamaConfig(**SIZES, layer_placements=["pre", "pre", "post"])
    config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="layer_placements has 3 entries for num_hidden_layers=2"):
        PeriLlamaForCausalLM(config)
