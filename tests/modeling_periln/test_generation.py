"""generate() in every mode, each against an answer made without it: greedy by hand, exhaustive search, Llama.

Contrastive search, DoLa, group and constrained beams left Transformers for repositories on the Hub
(`custom_generate`); what is left here is the refusal, which is tested.
"""

from unittest.mock import MagicMock

import pytest
import torch
import transformers
from test_equal_to_llama import LLAMA_NAMES, twin
from tiny_models import NORMS_OF, SIZES, random_ids, shaken_model, tiny_config
from transformers import (
    Cache,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    QuantizedCache,
)
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from modeling_periln.arguments import CACHE

VOCAB = SIZES["vocab_size"]
MODELS = {placement: {"norm_placement": placement} for placement in (*NORMS_OF, "mix")}
MODELS["layernorm, qk_norm over a head"] = {"norm_type": "layernorm", "qk_norm": "head"}
MODELS["layernorm, qk_norm over all heads"] = {"norm_placement": "output", "norm_type": "layernorm", "qk_norm": "full"}
TOKENS = 10
# No pad_token_id: generate() would take a prompt's token of that number for padding.
GREEDY = {"max_new_tokens": TOKENS, "do_sample": False}
# Transformers 5.4 called the pages blocks.
PAGE = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def model_of(name: str, **more):
    return shaken_model(**({"num_hidden_layers": 2} | MODELS[name] | more))


def greedy_by_hand(model, ids: torch.Tensor, tokens: int = TOKENS) -> torch.Tensor:
    """The most likely token, one at a time, each from a forward pass over everything so far."""
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def left_padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(prompt.shape[1] for prompt in prompts)
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.shape[1] :], mask[row, width - prompt.shape[1] :] = prompt[0], 1
    return {"input_ids": ids, "attention_mask": mask}


def calls_of(module) -> list[int]:
    """Fills, as the module runs, with the number of positions of each call."""
    seen: list[int] = []

    def note(_, args, kwargs):
        inputs = args[0] if args else kwargs["input_ids"]
        seen.append(inputs.shape[1])

    module.register_forward_pre_hook(note, with_kwargs=True)
    return seen


# Greedy, and every cache


@every_model
def test_greedy_generation_is_the_most_likely_token_each_time_with_every_cache(name):
    model, ids = model_of(name), random_ids(2, 5)
    expected = greedy_by_hand(model, ids)
    assert expected[:, 5:].unique().numel() > 2
    for more in (
        {},
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 2},
    ):
        assert torch.equal(model.generate(ids, **GREEDY, **more), expected), more


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@every_model
def test_an_offloaded_cache_gives_the_same_tokens(name, cache, monkeypatch):
    """Layers come and go between two memories in a GPU's streams; without a GPU the streams are replaced."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr(torch, "Stream", MagicMock)
        monkeypatch.setattr(torch.cuda, "default_stream", MagicMock())
    moved = []
    offload = Cache.offload
    monkeypatch.setattr(Cache, "offload", lambda self, layer, *more: (moved.append(layer), offload(self, layer, *more)))
    model, ids = model_of(name).to(device), random_ids(2, 5).to(device)
    assert torch.equal(model.generate(ids, **GREEDY, cache_implementation=cache), greedy_by_hand(model, ids))
    assert moved == [0, 1] * TOKENS


@every_model
def test_generation_needs_no_logits_but_those_of_the_last_position(name):
    model, ids = model_of(name), random_ids(2, 5)
    positions, stream = calls_of(model.lm_head), calls_of(model.model.layers[0])
    model.generate(ids, **GREEDY)
    assert positions == [1] * TOKENS
    assert stream == [5] + [1] * (TOKENS - 1)  # and with the cache each token is computed once


def test_a_row_ends_with_its_end_of_sequence_and_is_padded():
    model, ids = model_of("peri"), random_ids(2, 5)
    expected = greedy_by_hand(model, ids)
    end = next(token.item() for token in expected[0, 6:] if token not in expected[1, 5:])
    at = 5 + expected[0, 5:].tolist().index(end)
    expected[0, at + 1 :] = 60
    tokens = model.generate(ids, **GREEDY | {"pad_token_id": 60, "eos_token_id": end})
    assert torch.equal(tokens, expected)


def test_embeddings_in_place_of_the_prompt_give_the_same_tokens():
    model, ids = model_of("peri"), random_ids(2, 5)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), greedy_by_hand(model, ids)[:, 5:])


def needs_fp8() -> None:
    try:
        QuantizedCache("fp8", config=tiny_config())
    except ValueError:
        pytest.skip(f"transformers {transformers.__version__} has no FP8 cache")


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("fp8", {}),
        ("quanto", {"nbits": 4, "q_group_size": 16, "residual_length": 4}),
        ("hqq", {"nbits": 4, "axis_key": 1, "axis_value": 1, "q_group_size": 16, "residual_length": 4}),
    ],
)
def test_a_quantized_cache_gives_llamas_tokens(backend, options):
    if backend == "fp8":
        needs_fp8()
    if backend == "quanto" and not is_optimum_quanto_available():
        pytest.skip("optimum-quanto is not installed")
    if backend == "hqq" and not is_hqq_available():
        pytest.skip("hqq is not installed")
    model = model_of("pre", head_dim=16)
    llama = twin(model, LlamaForCausalLM, LlamaConfig, LLAMA_NAMES)
    more = GREEDY | {"cache_implementation": "quantized", "cache_config": {"backend": backend} | options}
    for seed in range(4):
        ids = random_ids(2, 8, seed=seed)
        assert torch.equal(model.generate(ids, **more), llama.generate(ids, **more))


@every_model
def test_a_quantized_cache_changes_the_logits_by_what_quantization_costs(name):
    needs_fp8()
    model, ids = model_of(name), random_ids(2, 12)
    expected = model(ids, use_cache=False).logits[:, 8:]
    logits = {}
    for cache in (DynamicCache(config=model.config), QuantizedCache("fp8", config=model.config)):
        model(ids[:, :8], **{CACHE: cache})
        logits[type(cache)] = model(ids[:, 8:], **{CACHE: cache}).logits - expected
    assert logits[DynamicCache].abs().max() < 1e-5
    assert 1e-5 < logits[QuantizedCache].pow(2).mean().sqrt() < 0.1 * expected.std()


# Sampling, beams


@every_model
def test_sampling_with_a_seed_draws_from_the_models_distribution_with_a_cache_and_without(name):
    model, ids = model_of(name), random_ids(2, 5)
    torch.manual_seed(3)
    expected = ids
    for _ in range(TOKENS):
        probabilities = (model(expected, use_cache=False).logits[:, -1] / 0.7).softmax(-1)
        expected = torch.cat([expected, torch.multinomial(probabilities, 1)], 1)
    sampled = {}
    for seed, use_cache in ((3, True), (3, False), (4, True)):
        torch.manual_seed(seed)
        more = GREEDY | {"do_sample": True, "temperature": 0.7, "top_k": 0, "use_cache": use_cache}
        sampled[seed, use_cache] = model.generate(ids, **more)
    assert torch.equal(sampled[3, True], expected)
    assert torch.equal(sampled[3, False], expected)
    assert not torch.equal(sampled[4, True], expected)


@every_model
def test_as_many_beams_as_tokens_find_the_best_pair_of_all(name):
    """With a beam for every first token, two steps are an exhaustive search."""
    model, ids = model_of(name), random_ids(1, 5)
    first = model(ids).logits[0, -1].log_softmax(-1)
    followed = torch.cat([ids.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], 1)
    scores = first[:, None] + model(followed).logits[:, -1].log_softmax(-1)  # first token, second token
    best = scores.flatten().topk(3)
    pairs = torch.stack((best.indices // VOCAB, best.indices % VOCAB), 1)
    found = model.generate(
        ids,
        **GREEDY | {"max_new_tokens": 2, "num_beams": VOCAB, "num_return_sequences": 3, "length_penalty": 0.0},
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert torch.equal(found.sequences[:, 5:], pairs)
    assert torch.allclose(found.sequences_scores, best.values, atol=1e-5)


@every_model
def test_beams_of_a_left_padded_batch_are_those_of_each_prompt_alone_with_every_cache(name):
    model = model_of(name)
    prompts = [random_ids(1, length, seed=length) for length in (3, 8, 5)]
    beams = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    alone = [model.generate(prompt, **beams)[:, prompt.shape[1] :] for prompt in prompts]
    assert not torch.equal(alone[0][0], greedy_by_hand(model, prompts[0])[0, 3:]) or name != "peri"
    for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        together = model.generate(**left_padded(prompts), **beams, **more)[:, 8:]
        assert torch.equal(together, torch.cat(alone)), more


# Drafts


@every_model
def test_assisted_decoding_is_greedy_whoever_assists(name):
    model = model_of(name)
    other = shaken_model(seed=5, num_hidden_layers=1, hidden_size=8, norm_placement="pre")
    for seed in (0, 1):
        ids = random_ids(1, 5, seed=seed)
        expected = greedy_by_hand(model, ids, 16)
        for assistant in (other, model_of(name)):
            more = GREEDY | {"max_new_tokens": 16}
            assert torch.equal(model.generate(ids, assistant_model=assistant, **more), expected)


def test_an_assistant_that_is_always_right_saves_calls():
    model = model_of("peri")
    calls = calls_of(model)
    model.generate(random_ids(1, 5), assistant_model=model_of("peri"), **GREEDY)
    assert 0 < len(calls) <= TOKENS / 2


@every_model
def test_prompt_lookup_is_greedy(name):
    model = model_of(name)
    ids = random_ids(1, 5)
    ids = greedy_by_hand(model, torch.cat([ids, ids], 1), 12)[:, :16]  # with something to look up
    calls = calls_of(model)
    # An end that is never drawn: without one, the lookup of Transformers 5.4 fails.
    tokens = model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY | {"eos_token_id": 10_000})
    assert max(calls[1:]) > 1  # drafts were looked up
    assert torch.equal(tokens, greedy_by_hand(model, ids))


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("Contrastive Search", {"penalty_alpha": 0.6, "top_k": 4}),
        ("Dola Generation", {"dola_layers": "low"}),
        ("Group Beam Search", {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}),
    ],
)
def test_modes_that_live_on_the_hub_say_so(mode, more):
    with pytest.raises(ValueError, match=f"{mode} requires `trust_remote_code=True`"):
        model_of("peri").generate(random_ids(1, 5), **GREEDY | more)


# Going on from a cache


@every_model
def test_going_on_from_a_cache_is_a_full_forward(name):
    model, ids = model_of(name), random_ids(2, 12)
    expected = model(ids, use_cache=False).logits
    for pieces in ([5, 7], [1] * 12, [3, 1, 6, 2]):
        cache, logits = None, []
        for piece in ids.split(pieces, 1):
            output = model(piece, **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            logits.append(output.logits)
        assert cache.get_seq_length() == 12
        assert (torch.cat(logits, 1) - expected).abs().max() < 1e-5


@every_model
def test_generation_in_two_calls_is_generation_at_once(name):
    model, ids = model_of(name), random_ids(2, 5)
    half = model.generate(ids, **GREEDY | {"max_new_tokens": 4}, return_dict_in_generate=True)
    calls = calls_of(model.model.layers[0])
    rest = model.generate(half.sequences, **{CACHE: half[CACHE]}, **GREEDY | {"max_new_tokens": 6})
    assert calls == [1] * 6  # nothing was computed again
    assert torch.equal(rest, greedy_by_hand(model, ids, 10))


# Continuous batching


def generated(model, prompts: list[torch.Tensor]) -> list[list[int]]:
    outputs = model.generate_batch(
        [prompt[0].tolist() for prompt in prompts],
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=TOKENS),
        # By default the cache fills the memory. Few tokens a step: the longest prompt is read in pieces.
        continuous_batching_config=ContinuousBatchingConfig(**{PAGE: 4}, num_blocks=16, max_batch_tokens=8),
    )
    found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [found[tuple(prompt[0].tolist())] for prompt in prompts]


def greedy(model, prompts: list[torch.Tensor]) -> list[list[int]]:
    return [greedy_by_hand(model, prompt)[0, prompt.shape[1] :].tolist() for prompt in prompts]


@pytest.mark.parametrize(
    ("name", "attention"),
    [("post", "sdpa"), ("peri", "sdpa"), ("peri", "eager"), ("layernorm, qk_norm over a head", "sdpa")],
)
def test_continuous_batching_gives_each_prompt_its_greedy_tokens(name, attention):
    model = model_of(name, attn_implementation=attention)
    prompts = [random_ids(1, length, seed=length) for length in (3, 11, 1, 6)]
    found, expected = generated(model, prompts), greedy(model, prompts)
    if found != expected:
        llama = twin(model_of("pre"), LlamaForCausalLM, LlamaConfig, LLAMA_NAMES)
        if generated(llama, prompts) != greedy(llama, prompts):
            pytest.skip(f"continuous batching of transformers {transformers.__version__} gives Llama wrong tokens, too")
    assert found == expected
