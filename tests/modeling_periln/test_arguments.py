"""The cache under both of its names, and what a forward pass refuses to drop."""

import logging

import pytest
import torch
from tiny_models import random_ids, shaken_model
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache
from transformers.utils import logging as transformers_logging

from modeling_periln import PLACEMENT_NAMES, PeriLlamaForCausalLM, PeriLlamaForSequenceClassification
from modeling_periln.arguments import CACHE, IGNORED, PASSED_ON, one_cache

NAMES = ("cache", "past_key_values")
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def filled(model: PeriLlamaForCausalLM, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(ids, **{CACHE: cache})
    return cache


@pytest.fixture
def warnings_of_transformers():
    """What Transformers' logger says, which warns of old names there and not through `warnings`."""
    records, handler = [], logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    logger.addHandler(handler)
    transformers_logging.get_logger("transformers.utils.generic").warning_once.__func__.cache_clear()
    yield records
    logger.removeHandler(handler)
    transformers_logging.set_verbosity(level)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("placement", PLACEMENT_NAMES)
def test_the_cache_works_under_both_names_in_every_version(placement, name):
    model, ids = shaken_model(norm_placement=placement), random_ids(2, 9)
    expected = model(ids, use_cache=False).logits[:, 5:]
    cache = filled(model, ids[:, :5])
    output = model(ids[:, 5:], **{name: cache})
    assert (output.logits - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())
    assert output[CACHE] is cache and cache.get_seq_length() == 9
    base = model.model(ids[:, :2], **{name: filled(model, ids[:, :5])})
    assert base[CACHE].get_seq_length() == 7


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_and_its_attention_take_the_cache_under_both_names(name):
    """Transformers, hooks and other callers reach them without the model."""
    model = shaken_model(num_hidden_layers=1)
    x, positions = torch.randn(1, 4, model.config.hidden_size), torch.arange(4)[None]
    rotary = model.model.rotary_emb(x, positions)
    for module in (model.model.layers[0], model.model.layers[0].self_attn):
        cache = DynamicCache(config=model.config)
        module(x, position_embeddings=rotary, position_ids=positions, **{name: cache})
        assert cache.get_seq_length() == 4


@torch.no_grad()
def test_of_two_caches_the_filled_one_counts_and_two_filled_ones_are_refused():
    model, ids = shaken_model(), random_ids(2, 9)
    expected = model(ids, use_cache=False).logits[:, 5:]
    for name, other in (NAMES, NAMES[::-1]):
        both = {name: filled(model, ids[:, :5]), other: DynamicCache(config=model.config)}
        assert (model(ids[:, 5:], **both).logits - expected).abs().max() < 1e-5
    with pytest.raises(ValueError, match="two filled caches"):
        model(ids[:, 5:], cache=filled(model, ids[:, :5]), past_key_values=filled(model, ids[:, :5]))


@torch.no_grad()
@pytest.mark.parametrize("implementation", [None, "static"])
def test_no_warning_of_a_deprecated_name_comes_from_generate_or_forward(
    implementation, recwarn, warnings_of_transformers
):
    model, ids = shaken_model(), random_ids(2, 5)
    assert model.generate(ids, **GREEDY, cache_implementation=implementation).shape == (2, 11)
    model(ids)
    said = [*warnings_of_transformers, *(str(w.message) for w in recwarn)]
    assert not [text for text in said if "deprecated" in text and ("cache" in text or "past_key" in text)]


@torch.no_grad()
def test_a_version_that_calls_the_cache_by_another_name_is_refused_and_not_decoded_without_context(monkeypatch):
    """What 5.24 did to every model that swallows arguments, done once more with a name of the future."""
    model, ids = shaken_model(), random_ids(1, 5)
    prepare = PeriLlamaForCausalLM.prepare_inputs_for_generation

    def renaming(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        for name in NAMES:
            cache = inputs.pop(name, None)
        return inputs | {"context": cache}

    monkeypatch.setattr(PeriLlamaForCausalLM, "prepare_inputs_for_generation", renaming)
    with pytest.raises(TypeError, match=r"does not know the argument 'context' \(a DynamicCache\)"):
        model.generate(ids, **GREEDY)


CARRIES = {
    "kv_store": object(),  # by its name
    "past": 3,
    "padding_mask": torch.ones(1, 5),
    "positions": torch.arange(5)[None],
    "encoder_hidden_states": torch.zeros(1, 2, 8),
    "document": torch.ones(1, 5, dtype=torch.bool),  # by its value
    "bias": torch.zeros(1, 1, 5, 5),
    "legacy": ((torch.zeros(1, 2, 5, 6), torch.zeros(1, 2, 5, 6)),),
    "blocks": create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 128, 128, device="cpu"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CARRIES)
def test_an_unknown_argument_that_carries_a_cache_a_mask_or_positions_is_refused(name):
    model, ids = shaken_model(), random_ids(1, 5)
    for forward in (model, model.model):
        with pytest.raises(TypeError, match=f"{name}.*{type(CARRIES[name]).__name__}"):
            forward(ids, **{name: CARRIES[name]})
    assert torch.equal(model(ids, **{name: None}).logits, model(ids).logits)


@torch.no_grad()
def test_static_caches_and_classification_refuse_too():
    model = shaken_model(pad_token_id=0)
    head = PeriLlamaForSequenceClassification(model.config)
    with pytest.raises(TypeError, match="'keys' .a StaticCache"):
        head(random_ids(1, 5), keys=StaticCache(config=model.config, max_cache_len=8))


@torch.no_grad()
def test_what_engines_and_transformers_pass_goes_through():
    """Serving engines' objects reach the attention; `cache_position` and what tokenizers add do not matter."""
    model, ids = shaken_model(), random_ids(1, 5)
    expected = model(ids).logits
    extras = {
        "attention_instances": {0: object()},
        "forward_batch": object(),
        "cache_position": torch.arange(5),
        "special_tokens_mask": torch.zeros(1, 5),
        "token_type_ids": torch.zeros(1, 5, dtype=torch.long),
        "temperature_of_mine": 0.5,  # unknown, and nothing that could be a cache or a mask
    }
    assert torch.equal(model(ids, **extras).logits, expected)
    assert {"attention_instances", "forward_batch"} <= PASSED_ON and "cache_position" in IGNORED


def test_a_paged_cache_goes_where_the_installed_version_reads_it():
    """Before the renaming the attention interface updates it, found in the keyword arguments."""
    paged, kwargs = object(), {}
    cache = one_cache(paged, None, kwargs)
    assert (cache, kwargs) == ((paged, {}) if CACHE == "cache" else (None, {"cache": paged}))
