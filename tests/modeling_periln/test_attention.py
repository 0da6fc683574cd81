"""Every attention implementation gives the same logits: with padding on either side, and with documents packed.

FlashAttention is not installed where these tests run. Its two functions are replaced by plain torch under the
package's own signatures, so that everything around them is Transformers' own: the masks, the unpadding, the reading of
`position_ids` and of `cu_seq_lens_*`.
"""

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny_models import NORMS_OF, SIZES, random_ids, shaken_model, tiny_model
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, masking_utils
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flex_attention as flex
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

EVERY = [*NORMS_OF, "mix"]
VOCAB = SIZES["vocab_size"]
# Three documents in a row of 12 tokens, one of them a single token.
ENDS = [0, 5, 6, 12]
DOCUMENTS = list(itertools.pairwise(ENDS))
POSITIONS = torch.cat([torch.arange(end - start) for start, end in DOCUMENTS])[None]


def cu_seq_lens() -> dict:
    """The documents' boundaries as Transformers hands them to FlashAttention."""
    ends, longest = torch.tensor(ENDS, dtype=torch.int32), max(end - start for start, end in DOCUMENTS)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


@torch.no_grad()
def assert_documents_are_isolated(model, **packing) -> None:
    """Bit-equal logits when every other document's tokens change, and those of the document alone."""
    ids = random_ids(1, 12)
    logits = model(ids, use_cache=False, **packing).logits[0]
    assert logits.std() > 0.1
    for start, end in DOCUMENTS:
        changed = (ids + 1) % VOCAB
        changed[:, start:end] = ids[:, start:end]
        other = model(changed, use_cache=False, **packing).logits[0]
        assert torch.equal(other[start:end], logits[start:end])
        assert not torch.equal(other, logits)
        alone = model(ids[:, start:end], use_cache=False).logits[0]
        assert (alone - logits[start:end]).abs().max() < 1e-5


@torch.no_grad()
def assert_padding_changes_nothing(model) -> None:
    """The tokens of a padded batch have the logits of the unpadded rows, whatever is in the padding."""
    lengths, width = (4, 9, 1), 9
    rows = [random_ids(1, length, seed=length) for length in lengths]
    expected = torch.cat([model(row, use_cache=False).logits[0] for row in rows])
    for left in (True, False):
        ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            place = slice(width - length, None) if left else slice(length)
            ids[i, place], mask[i, place] = row[0], 1
        inputs = {"attention_mask": mask, "use_cache": False}
        for position_ids in (None, (mask.cumsum(-1) - 1).clamp(min=0)):
            logits = model(ids, position_ids=position_ids, **inputs).logits
            assert (logits[mask.bool()] - expected).abs().max() < 1e-5
            other = model(ids + 7 * (1 - mask), position_ids=position_ids, **inputs).logits
            assert torch.equal(other[mask.bool()], logits[mask.bool()])


# Padding


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("placement", EVERY)
def test_padding_on_either_side_changes_no_token(placement, attention):
    assert_padding_changes_nothing(shaken_model(norm_placement=placement, attn_implementation=attention))


def test_without_the_mask_padding_changes_every_token():
    model = shaken_model()
    ids = random_ids(1, 9)
    positions = torch.tensor([[0] * 4 + [*range(5)]])
    padded = model(ids, position_ids=positions, use_cache=True).logits[0, 4:]
    assert (padded - model(ids[:, 4:]).logits[0]).abs().amax(-1).min() > 0.01


# Flex attention


@pytest.fixture
def uncompiled_masks(monkeypatch):
    """The block masks step by step: Transformers compiles each kind of them, which takes up to 20 s."""
    step_by_step = lambda *args, _compile, **kwargs: create_block_mask(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(masking_utils, "create_block_mask", step_by_step)


@pytest.fixture
def uncompiled_flex(monkeypatch, uncompiled_masks):
    """Flex attention itself step by step too."""
    monkeypatch.setattr(flex, "WrappedFlexAttention", lambda training: lambda: flex_attention)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("placement", ["post", "peri", "mix"])
def test_flex_attention_is_sdpa_with_padding_and_with_packed_documents(uncompiled_flex, placement):
    model = shaken_model(norm_placement=placement, attn_implementation="flex_attention", num_hidden_layers=2)
    reference = shaken_model(norm_placement=placement, num_hidden_layers=2)
    ids = random_ids(2, 9)
    with torch.no_grad():
        difference = model(ids).logits - reference(ids).logits
    assert difference.abs().max() < 1e-5
    assert_padding_changes_nothing(model)
    assert_documents_are_isolated(model, position_ids=POSITIONS)
    assert_documents_are_isolated(model, **cu_seq_lens())


@pytest.mark.slow
@torch.no_grad()
def test_compiled_flex_attention_is_sdpa_with_packed_documents(uncompiled_masks):
    ids, changed = random_ids(1, 12), random_ids(1, 12)
    changed[:, 5] = (ids[:, 5] + 1) % VOCAB  # the second document
    outside = torch.arange(12) != 5
    for variant in ({}, {"norm_placement": "post", "norm_type": "layernorm", "qk_norm": "head"}):
        # On a CPU the compiled kernel takes head sizes that are powers of two.
        model = shaken_model(head_dim=8, attn_implementation="flex_attention", **variant)
        logits, other = (model(x, use_cache=False, position_ids=POSITIONS).logits for x in (ids, changed))
        reference = shaken_model(head_dim=8, **variant)(ids, use_cache=False, position_ids=POSITIONS).logits
        assert (logits - reference).abs().max() < 1e-5
        assert torch.equal(other[:, outside], logits[:, outside])
        assert not torch.equal(other, logits)


# Flash attention


@pytest.mark.parametrize(("version", "installed"), [(2, is_flash_attn_2_available), (3, is_flash_attn_3_available)])
def test_flash_attention_that_is_not_installed_is_refused_as_for_llama(version, installed):
    if installed():
        pytest.skip(f"FlashAttention {version} is installed here")
    name = f"flash_attention_{version}"
    with pytest.raises(ImportError) as llama:
        LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=name))
    with pytest.raises(ImportError, match=f"FlashAttention{version} doesn't seem to be installed") as ours:
        tiny_model(attn_implementation=name)
    assert str(ours.value) == str(llama.value)
    with pytest.raises(ImportError, match=f"FlashAttention{version} doesn't seem to be installed"):
        tiny_model().set_attn_implementation(name)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    """Attention within each sequence of a concatenation: q (tokens, H, E), k and v (tokens, K, E), documents + 1."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.diff().max() <= max_seqlen_q
    assert cu_seqlens_k.diff().max() <= max_seqlen_k
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for i in range(len(cu_seqlens_q) - 1):
        x = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]].transpose(0, 1)
        key, value = (t[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].repeat_interleave(groups, 1) for t in (k, v))
        queries, keys = x.shape[1], key.shape[0]
        mask = torch.ones(queries, keys, dtype=torch.bool)
        if causal:
            mask = mask.tril(keys - queries)  # the last query sees every key
        out = F.scaled_dot_product_attention(
            x, key.transpose(0, 1), value.transpose(0, 1), mask, dropout_p=dropout_p, scale=softmax_scale
        )
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """Attention within each row: q (B, S, H, E), k and v (B, T, K, E)."""
    q_ends, k_ends = (torch.arange(len(t) + 1, dtype=torch.int32) * t.shape[1] for t in (q, k))
    flat = (t.flatten(0, 1) for t in (q, k, v))
    more = {"dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal}
    return flash_attn_varlen_func(*flat, q_ends, k_ends, q.shape[1], k.shape[1], **more).view(q.shape)


@pytest.fixture
def flash(monkeypatch):
    """FlashAttention 2 in plain torch; gives the boundaries that the packed function was called with."""
    calls = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **kwargs):
        calls.append(cu_seqlens_q.tolist())
        return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **kwargs)

    varlen.__signature__ = inspect.signature(flash_attn_varlen_func)
    functions = (flash_attn_func, varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *_, **__: functions)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(flash_utils, name, None)
    return calls


def flash_model(**changes):
    """Past `set_attn_implementation`, which asks for the package and a GPU."""
    model = shaken_model(**changes)
    model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.mark.parametrize("qk_norm", [None, "head"])
def test_what_flash_attention_is_given_is_sdpas_with_and_without_padding(flash, qk_norm):
    model, reference = flash_model(qk_norm=qk_norm), shaken_model(qk_norm=qk_norm)
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert (model(ids).logits - reference(ids).logits).abs().max() < 1e-5
    assert flash == []  # rows of one length need no boundaries
    assert_padding_changes_nothing(model)
    assert [0, 4, 13, 14] in flash  # the three rows without their padding
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.tensor([[0, 0, 0] + [1] * 6, [1] * 9])
    ours, theirs = (m.generate(ids, attention_mask=mask, **more) for m in (model, reference))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("packing", ["position_ids", "cu_seq_lens", "both"])
def test_flash_attention_keeps_packed_documents_apart(flash, packing):
    positions, boundaries = {"position_ids": POSITIONS}, cu_seq_lens()
    given = {"position_ids": positions, "cu_seq_lens": boundaries, "both": positions | boundaries}[packing]
    assert_documents_are_isolated(flash_model(num_hidden_layers=2), **given)
    assert flash
    assert all(ends == ENDS for ends in flash)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_boundaries_reach_the_attention_of_every_layer_unchanged(checkpointing):
    seen = []

    def probe(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, kwargs))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("probe_of_boundaries", probe)
    try:
        model = shaken_model(attn_implementation="probe_of_boundaries")
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        given = {"position_ids": POSITIONS} | cu_seq_lens()
        model(random_ids(1, 12), use_cache=False, **given)
    finally:
        del AttentionInterface._global_mapping["probe_of_boundaries"]
    assert [layer for layer, _ in seen] == [0, 1, 2]
    for _, kwargs in seen:
        assert all(kwargs[name] is value for name, value in given.items())


# Packed documents


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("placement", EVERY)
def test_positions_that_restart_keep_packed_documents_apart(placement, attention):
    model = shaken_model(norm_placement=placement, attn_implementation=attention)
    assert_documents_are_isolated(model, position_ids=POSITIONS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("placement", EVERY)
def test_boundaries_alone_keep_packed_documents_apart(placement, attention):
    """With sdpa and eager attention Llama reads `cu_seq_lens_*` nowhere and attends across the documents."""
    model = shaken_model(norm_placement=placement, attn_implementation=attention)
    assert_documents_are_isolated(model, **cu_seq_lens())
    by_boundaries = model(random_ids(1, 12), use_cache=False, **cu_seq_lens()).logits
    by_positions = model(random_ids(1, 12), use_cache=False, position_ids=POSITIONS).logits
    assert torch.equal(by_boundaries, by_positions)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash"])
def test_boundaries_keep_documents_apart_whatever_their_positions_are(attention, flash):
    """Positions that continue over the boundaries turn the heads; they do not undo the boundaries."""
    model = flash_model() if attention == "flash" else shaken_model(attn_implementation=attention)
    going_on = torch.arange(12)[None]
    ids = random_ids(1, 12)
    logits = model(ids, use_cache=False, position_ids=going_on, **cu_seq_lens()).logits[0]
    for start, end in DOCUMENTS:
        changed = (ids + 1) % VOCAB
        changed[:, start:end] = ids[:, start:end]
        other = model(changed, use_cache=False, position_ids=going_on, **cu_seq_lens()).logits[0]
        assert torch.equal(other[start:end], logits[start:end])
        alone = model(ids[:, start:end], use_cache=False, position_ids=going_on[:, start:end]).logits[0]
        assert (alone - logits[start:end]).abs().max() < 1e-5


def test_layernorm_and_qk_norm_keep_packed_documents_apart():
    model = shaken_model(norm_type="layernorm", qk_norm="full", num_hidden_layers=2)
    assert_documents_are_isolated(model, position_ids=POSITIONS)
    assert_documents_are_isolated(model, **cu_seq_lens())


@pytest.mark.parametrize(
    "more",
    [
        {"use_cache": True},
        {"use_cache": None},  # the configuration's: a cache
        {"use_cache": False, "attention_mask": torch.ones(1, 12, dtype=torch.long)},
        {"use_cache": False, "input_ids": random_ids(2, 12)},
    ],
    ids=["a cache", "the cache of the configuration", "a mask", "two rows"],
)
def test_boundaries_that_would_be_ignored_are_refused(more):
    """A cache or a mask silently switches Transformers' masks of packed documents off."""
    with pytest.raises(ValueError, match="cu_seq_lens_q packs documents into one row"):
        shaken_model()(**({"input_ids": random_ids(1, 12)} | cu_seq_lens() | more))


def test_no_gradient_crosses_from_one_document_to_another():
    model = shaken_model()
    for packing in ({"position_ids": POSITIONS}, cu_seq_lens()):
        embeds = model.get_input_embeddings()(random_ids(1, 12)).detach().requires_grad_()
        logits = model(inputs_embeds=embeds, use_cache=False, **packing).logits[0]
        for start, end in DOCUMENTS:
            (gradient,) = torch.autograd.grad(logits[start:end].square().sum(), embeds, retain_graph=True)
            own = torch.zeros(12, dtype=torch.bool)
            own[start:end] = True
            assert not gradient[0, ~own].any()
            assert gradient[0, own].abs().amax(-1).min() > 0


@pytest.mark.parametrize("with_position_ids", [True, False])
def test_the_flattening_collators_batch_has_the_loss_of_the_documents(with_position_ids):
    """Transformers' own packing: labels without the documents' first tokens, and the boundaries as arguments."""
    model = shaken_model()
    documents = [random_ids(1, length, seed=length) for length in (5, 2, 8)]
    collate = DataCollatorWithFlattening(return_position_ids=with_position_ids, return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": document[0].tolist()} for document in documents])
    assert ("position_ids" in batch) == with_position_ids
    loss = model(**batch, use_cache=False).loss
    losses = [model(document, labels=document).loss * (document.shape[1] - 1) for document in documents]
    assert loss.item() == pytest.approx(sum(losses).item() / (4 + 1 + 7), abs=1e-5)
