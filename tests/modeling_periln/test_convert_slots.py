"""Conversions of placements whose slots say what they hold: the same function, or refused by the slot's name."""

import pytest
import torch
from tiny_models import random_ids, shaken_model, tiny_config

from modeling_periln.convert import ConversionRefused, admissible_exports, to_native

PRE = {"input_norm": True, "final_norm": True}
OUTPUT = {"output_norm": True, "final_norm": True, "q_norm": "full", "k_norm": "full"}


@pytest.mark.parametrize(
    "norm", [{"kind": "layernorm"}, {"kind": "dyt"}, {"gain": "scalar"}, {"gain": "none"}], ids=str
)
@pytest.mark.parametrize(
    ("target", "row", "slot"),
    [
        ("llama", PRE, "input_norm"),
        ("llama", PRE, "final_norm"),
        ("llama", PRE, "embedding_norm"),
        ("olmo2", OUTPUT, "output_norm"),
        ("olmo2", OUTPUT, "q_norm"),
        ("olmo2", OUTPUT, "k_norm"),
    ],
)
def test_another_kind_or_gain_in_a_slot_is_refused_by_name(target, row, slot, norm):
    assert admissible_exports(tiny_config(norm_placement=row))[target] is None
    full = {"over": "full"} if slot in ("q_norm", "k_norm") else {}
    config = tiny_config(norm_placement=row | {slot: norm | full})
    key, value = next(iter(norm.items()))
    assert f"{key}={value!r}" in admissible_exports(config)[target]
    assert slot in admissible_exports(config)[target]


@pytest.mark.parametrize("slot", ["input_norm", "final_norm"])
def test_an_epsilon_in_one_slot_is_refused(slot):
    config = tiny_config(norm_placement=PRE | {slot: {"eps": 0.25}})
    assert "norm_eps is" in admissible_exports(config)["llama"]
    with pytest.raises(ConversionRefused, match=r"0\.25"):
        to_native(shaken_model(norm_placement=PRE | {slot: {"eps": 0.25}}), "llama")


@torch.no_grad()
@pytest.mark.parametrize(
    "row",
    [
        {"input_norm": {"eps": 0.25}, "final_norm": {"eps": 0.25}},
        {**PRE, "embedding_norm": {"eps": 0.25}},
    ],
    ids=["all", "embedding"],
)
def test_epsilons_of_slots_are_carried_over(row):
    model, ids = shaken_model(norm_placement=row), random_ids()
    torch.testing.assert_close(to_native(model, "llama")(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    without = shaken_model(norm_placement=dict.fromkeys(row, True))
    without.load_state_dict(model.state_dict())
    assert not torch.allclose(without(ids).logits, model(ids).logits, rtol=1e-2, atol=1e-2)
