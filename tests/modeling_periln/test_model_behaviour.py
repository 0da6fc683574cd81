"""What a user of the model relies on: gradients, attention backends, caches, packing, outputs, what reaches whom."""

import pytest
import torch
import transformers
from tiny_models import NORMS_OF, SIZES, random_ids, shaken_model, tiny_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from modeling_periln.arguments import CACHE

EVERY = [*NORMS_OF, "mix"]


# Scale-free weights: with an output norm the loss does not depend on the scale of the matrices before it


def alignment_with_gradient(model) -> dict[str, float]:
    """|<dL/dW, W>| / (|dL/dW| |W|) for each matrix of the layers, by the name of its projection, the largest."""
    ids = random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    result: dict[str, float] = {}
    for name, p in model.named_parameters():
        if name.endswith("_proj.weight"):
            cosine = torch.dot(p.grad.flatten(), p.flatten()).abs() / (p.grad.norm() * p.norm())
            projection = name.split(".")[-2]
            result[projection] = max(result.get(projection, 0.0), cosine.item())
    assert len(result) == 7
    return result


SCALED = {"o_proj", "v_proj", "down_proj", "up_proj"}  # the module's output is linear in each; in gate, q and k not


@pytest.mark.parametrize("placement", EVERY)
@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
def test_loss_is_free_of_the_scale_of_what_an_output_norm_follows(placement, norm_type):
    """An exact self-test of a placement: with B the gradient is orthogonal to W_o, W_v, W_down and W_up."""
    model = shaken_model(norm_placement=placement, norm_type=norm_type, norm_eps=0.0).double()
    alignment = alignment_with_gradient(model)
    free = SCALED if "B" in NORMS_OF.get(placement, "") else set()
    assert all(alignment[name] < 1e-12 for name in free), alignment
    assert all(alignment[name] > 1e-3 for name in alignment.keys() - free), alignment


def test_qk_norm_makes_the_loss_free_of_the_scale_of_q_and_k():
    model = shaken_model(norm_placement="pre", qk_norm="head", norm_eps=0.0).double()
    alignment = alignment_with_gradient(model)
    free = {"q_proj", "k_proj"}
    assert all(alignment[name] < 1e-12 for name in free), alignment
    assert all(alignment[name] > 1e-3 for name in alignment.keys() - free), alignment


@pytest.mark.parametrize(("placement", "changes"), [("peri", False), ("output", False), ("pre", True), ("post", True)])
def test_a_down_projection_a_thousand_times_larger_is_normalized_away_or_not(placement, changes):
    model = shaken_model(norm_placement=placement, norm_eps=0.0).double()
    before = model(random_ids()).logits
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 1024.0
    difference = (model(random_ids()).logits - before).abs().max()
    assert difference > 0.1 if changes else difference < 1e-10


# Attention backends


def test_fused_attention_is_the_default():
    """Without its flags a model silently falls back to eager attention."""
    assert tiny_model().config._attn_implementation == "sdpa"


@pytest.mark.parametrize("placement", EVERY)
@pytest.mark.parametrize("qk_norm", [None, "full", "head"])
def test_eager_and_sdpa_agree_with_left_padding(placement, qk_norm):
    model = shaken_model(norm_placement=placement, qk_norm=qk_norm)
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    logits = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        logits[attention] = model(ids, attention_mask=mask).logits[mask.bool()]
    assert (logits["eager"] - logits["sdpa"]).abs().max() < 1e-5
    assert logits["eager"].std() > 0.1


def test_output_attentions_are_causal_distributions():
    model = shaken_model(attn_implementation="eager")
    attentions = model(random_ids(2, 9), output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(2, 4, 9, 9)] * 3
    for a in attentions:
        assert torch.allclose(a.sum(-1), torch.ones(2, 4, 9), atol=1e-5)
        assert not a.triu(1).any()


@pytest.fixture
def probe():
    """An attention interface that records what it was given, under the name `probe`."""
    calls = []

    def record(module, query, key, value, attention_mask, **kwargs):
        calls.append({"layer": module.layer_idx, "query": query, "key": key, "value": value, **kwargs})
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS["probe"] = record
    yield calls
    del ALL_ATTENTION_FUNCTIONS["probe"]


def test_what_is_given_to_the_model_reaches_the_attention_interface(probe):
    """Serving engines pass their state through keyword arguments; flash attention infers packing from position_ids."""
    model = shaken_model()
    model.set_attn_implementation("probe")
    ids, position_ids = random_ids(2, 7), torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)
    marker = object()
    model(ids, position_ids=position_ids, use_cache=False, forward_batch=marker)
    assert [call["layer"] for call in probe] == [0, 1, 2]
    for call in probe:
        assert torch.equal(call["position_ids"], position_ids)
        assert call["forward_batch"] is marker
        assert call["scaling"] == pytest.approx(SIZES["head_dim"] ** -0.5)
        assert call["dropout"] == 0.0
        assert call["query"].shape == (2, 4, 7, 6)
        assert call["key"].shape == call["value"].shape == (2, 2, 7, 6)  # heads of a group are not repeated


def test_position_ids_are_made_and_passed_on_when_they_are_not_given(probe):
    model = shaken_model(num_hidden_layers=1)
    model.set_attn_implementation("probe")
    ids = random_ids(1, 5)
    cache = model(ids, use_cache=True)[CACHE]
    model(ids[:, :2], **{CACHE: cache})
    assert [call["position_ids"].tolist() for call in probe] == [[[0, 1, 2, 3, 4]], [[5, 6]]]


def test_attention_dropout_acts_in_training_only(probe):
    model = shaken_model(attention_dropout=0.5)
    model.set_attn_implementation("probe")
    ids = random_ids()
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert not torch.equal(model.train()(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert [call["dropout"] for call in probe] == [0.0] * 6 + [0.5] * 6


# Caches and generation


@pytest.mark.parametrize("placement", EVERY)
def test_greedy_generation_with_a_cache_is_that_without(placement):
    model = shaken_model(norm_placement=placement, qk_norm="head")
    more = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ids = random_ids(2, 5)
    with_cache, without = (model.generate(ids, use_cache=cached, **more) for cached in (True, False))
    assert with_cache.sequences.shape == (2, 17)
    assert torch.equal(with_cache.sequences, without.sequences)
    assert torch.allclose(torch.stack(with_cache.logits), torch.stack(without.logits), atol=1e-4)


@pytest.mark.parametrize("placement", ["post", "pre", "peri"])
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(placement):
    model = shaken_model(norm_placement=placement)
    prompts = [random_ids(1, length, seed=length) for length in (3, 8, 5)]
    alone = [model.generate(p, max_new_tokens=8, do_sample=False)[0, p.shape[1] :] for p in prompts]
    batch, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 8 - prompt.shape[1] :], mask[row, 8 - prompt.shape[1] :] = prompt[0], 1
    together = model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)[:, 8:]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("placement", EVERY)
def test_no_token_sees_a_later_one(placement):
    model = shaken_model(norm_placement=placement)
    ids = random_ids(1, 10)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % SIZES["vocab_size"]
    before, after = model(ids).logits[0], model(changed).logits[0]
    assert torch.equal(before[:6], after[:6])
    assert (before[6:] - after[6:]).abs().amax(-1).min() > 1e-4


def test_what_a_call_does_not_say_the_config_decides():
    model = shaken_model()
    assert model(random_ids())[CACHE].get_seq_length() == 7
    model.config.use_cache = False
    assert CACHE not in model(random_ids())
    assert CACHE in model(random_ids(), use_cache=True)
    model.config.output_hidden_states = True
    assert len(model(random_ids()).hidden_states) == 4


# Packing


def test_packed_documents_do_not_see_each_other():
    """Position ids that restart, without cache or mask: the logits of one document do not depend on the other."""
    model = shaken_model()
    ids = random_ids(1, 12)
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]]), "use_cache": False}
    logits = model(ids, **packed).logits[0]
    for start, end in ((0, 5), (5, 12)):
        changed = (ids + 1) % SIZES["vocab_size"]
        changed[:, start:end] = ids[:, start:end]
        other = model(changed, **packed).logits[0]
        assert torch.equal(other[start:end], logits[start:end])
        assert not torch.equal(other, logits)
    alone = model(ids[:, 5:]).logits[0]
    assert torch.allclose(logits[5:], alone, atol=1e-5)


def test_without_position_ids_the_documents_would_mix():
    model = shaken_model()
    ids = random_ids(1, 12)
    changed = ids.clone()
    changed[:, :5] = (ids[:, :5] + 1) % SIZES["vocab_size"]
    difference = model(ids, use_cache=False).logits[0, 5:] - model(changed, use_cache=False).logits[0, 5:]
    assert difference.abs().max() > 0.01


# Gradient checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("placement", ["post", "pre", "peri", "deepnorm"])
def test_gradient_checkpointing_gives_the_same_gradients(placement, use_reentrant):
    ids = random_ids(2, 9)
    gradients, runs = [], []
    for checkpointing in (False, True):
        model = shaken_model(norm_placement=placement).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_, c=checkpointing: runs.append(c))
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert runs == [False, True, True]  # the layer did run again in backward
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


# Outputs


@pytest.mark.parametrize("placement", ["post", "pre", "peri"])
def test_hidden_states_are_the_layers_inputs_and_the_last_is_what_the_head_reads(placement):
    model = shaken_model(norm_placement=placement)
    inputs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    output = model(random_ids(), output_hidden_states=True)
    assert len(output.hidden_states) == len(model.model.layers) + 1
    for state, seen in zip(output.hidden_states, inputs, strict=False):
        assert torch.equal(state, seen)
    assert torch.equal(output.hidden_states[0], model.model.embed_norm(model.model.embed_tokens(random_ids())))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)


def test_the_raw_stream_can_be_had_in_place_of_the_last_hidden_state():
    if "config.tie_last_hidden_states" not in (output_capturing.capture_outputs.__doc__ or ""):
        pytest.skip(f"transformers {transformers.__version__} does not read config.tie_last_hidden_states")
    model = shaken_model()
    model.config.tie_last_hidden_states = False
    output = model(random_ids(), output_hidden_states=True)
    raw = output.hidden_states[-1]
    assert not torch.equal(raw, model.model(random_ids()).last_hidden_state)
    assert torch.equal(model.model.final_norm(raw), model.model(random_ids()).last_hidden_state)


@pytest.mark.parametrize("placement", EVERY)
def test_everything_up_to_the_head_is_in_the_base_model(placement):
    """Fused losses and serving engines call the base model and multiply by the head's weight."""
    model = shaken_model(norm_placement=placement)
    hidden = model.base_model(random_ids()).last_hidden_state
    assert torch.equal(hidden @ model.get_output_embeddings().weight.T, model(random_ids()).logits)


def test_embeddings_in_place_of_ids_are_the_same_and_one_of_the_two_is_needed():
    model = shaken_model()
    ids = random_ids()
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    for both_or_none in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**both_or_none)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0, lambda x: x),
        (1, lambda x: x[:, -1:]),
        (3, lambda x: x[:, -3:]),
        (torch.tensor([0, 4, 2]), lambda x: x[:, [0, 4, 2]]),
        (torch.tensor([[0, 4], [6, 1]]), lambda x: torch.stack((x[0, [0, 4]], x[1, [6, 1]]))),
        (torch.tensor([[True] * 2 + [False] * 5, [False] * 6 + [True]]), lambda x: torch.cat((x[0, :2], x[1, 6:]))),
    ],
    ids=["all", "last", "last three", "one index for all rows", "an index a row", "mask"],
)
def test_logits_to_keep_selects_positions(keep, expected):
    model = shaken_model()
    ids = random_ids(2, 7)
    everything, kept = model(ids).logits, model(ids, logits_to_keep=keep).logits
    assert kept.shape == expected(everything).shape
    assert torch.allclose(kept, expected(everything), atol=1e-6)


def test_a_tuple_is_returned_where_it_is_asked_for():
    model = shaken_model()
    ids = random_ids()
    loss, logits, cache = model(ids, labels=ids, use_cache=True, return_dict=False)
    output = model(ids, labels=ids)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["post", "peri", "lns"])
def test_forward_is_one_graph(placement):
    """No data-dependent branch: `torch.compile(fullgraph=True)` traces every placement."""
    model = shaken_model(norm_placement=placement, residual_dtype="bfloat16", num_hidden_layers=2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = random_ids()
    assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_training_lowers_the_loss_of_every_placement():
    ids = random_ids(4, 16)
    for placement in EVERY:
        model = tiny_model(norm_placement=placement).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(25):
            loss = model(ids, labels=ids, use_cache=False).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < 0.7 * losses[0], (placement, losses[0], losses[-1])
