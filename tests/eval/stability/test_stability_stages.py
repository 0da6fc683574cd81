"""The fast ways against the slow ones: a model in pieces, gradients a layer at a time, predicted loss scales."""

import dataclasses
import gc
import weakref
from contextlib import ExitStack, nullcontext

import pytest
import torch
from stability_families import FAMILIES, VOCABULARY, build

from periln.eval.stability.backward import accumulate_gradients, backward_rows
from periln.eval.stability.layer_gradients import _head, ends_in_place, kept_streams, layer_by_layer
from periln.eval.stability.measure import Options, measure
from periln.eval.stability.overflow import LEAST, MOST, HalfPasses, first_non_finite, half_copy
from periln.eval.stability.redundancy import skip_losses, staged_skip_losses
from periln.eval.structure.anatomy import find_anatomy
from periln.eval.structure.stages import find_stages
from periln.eval.texts.samples import random_samples
from periln.eval.texts.windows import loss_gradient, token_loss
from periln.runkit.fp16 import HalfMatmul

SAMPLES = random_samples(VOCABULARY, 5, 12, seed=3)
BATCHES = list(SAMPLES.batches(2))
SOME = [*FAMILIES, "peri_llama:peri", "peri_llama:post"]


@pytest.fixture(scope="module", params=SOME)
def model(request):
    return build(request.param).eval()


@pytest.fixture(scope="module")
def anatomy(model):
    return find_anatomy(model)


@torch.no_grad()
def loss_of(model) -> float:
    total = sum(token_loss(model(input_ids=ids, use_cache=False).logits, ids).double().item() for ids in BATCHES)
    return total / sum(ids[:, 1:].numel() for ids in BATCHES)


def test_the_loss_without_each_layer_is_equal_to_the_bit(model, anatomy):
    slow = skip_losses(anatomy, lambda: loss_of(model), step=0)
    assert staged_skip_losses(find_stages(anatomy), BATCHES, step=0) == slow
    assert all(value != 0 for *_, value in slow)
    assert not any("forward" in vars(layer) for _, layer in anatomy.layers)


def test_gradients_a_layer_at_a_time_are_those_of_the_whole(model, anatomy):
    slow = {row[:5]: row[5] for row in backward_rows(anatomy, BATCHES, 0)}
    fast = {row[:5]: row[5] for row in backward_rows(anatomy, BATCHES, 0, find_stages(anatomy))}
    assert fast.keys() == slow.keys() and {key[2] for key in fast} >= {"embedding", "attn", "mlp", "layer", "final"}
    for key, value in slow.items():
        assert fast[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
    assert all(p.grad is None for p in model.parameters())


def test_streams_that_are_computed_again_give_the_same_bits(anatomy, monkeypatch):
    stages, asked = find_stages(anatomy), []
    kept = backward_rows(anatomy, BATCHES, 0, stages)
    monkeypatch.setattr("periln.eval.stability.layer_gradients.kept_streams", lambda *a: (2, asked.append(a)))
    assert backward_rows(anatomy, BATCHES, 0, stages) == kept
    assert asked == [(anatomy.num_layers, 5, 12 * anatomy.hidden_size * 4)]


@pytest.mark.parametrize(
    ("layers", "samples", "mib", "kept"),
    [(18, 1, 0.625, (1, 19)), (18, 32, 0.625, (3, 288)), (26, 32, 1.125, (4, 352)), (64, 32, 2, (8, 512))],
)
def test_streams_beyond_the_bound_are_computed_again(layers, samples, mib, kept):
    """Of Gemma 3 270M, 1B, and of a deep model; a stream of 256 tokens."""
    assert kept_streams(layers, samples, int(mib * 2**20)) == kept


def test_a_table_has_one_gradient_and_the_logits_are_replaced_by_theirs(model, anatomy, monkeypatch):
    """What arrives at the tables: whole gradients once, then rows, and nothing from the head that added its own."""
    stages, table, head = find_stages(anatomy), anatomy.embedding.weight, anatomy.lm_head
    tokens, gradients, arrived = sum(ids[:, 1:].numel() for ids in BATCHES), {}, []
    products, filled = [], []

    def visit(number):
        if number in (None, 0):
            gradients[number] = {id(p): p.grad.clone() for p in (table, head.weight) if p.grad is not None}

    def fill(logits, ids, tokens):
        filled.append(logits.data_ptr())
        return loss_gradient(logits, ids, tokens)

    monkeypatch.setattr("periln.eval.stability.layer_gradients.loss_gradient", fill)

    def arrive(name):
        return lambda grad: arrived.append((name, "rows" if grad.is_sparse else "whole") if grad is not None else None)

    table.requires_grad_(True)
    with ExitStack() as stack:
        hooks = [
            table.register_hook(arrive("table")),
            head.register_forward_hook(lambda m, args, out: products.append(out)),
        ]
        if not anatomy.tied:
            hooks.append(head.weight.register_hook(arrive("head")))
        for hook in hooks:
            stack.callback(hook.remove)
        layer_by_layer(stages, BATCHES, tokens, visit)
    if anatomy.tied:
        assert arrived == [("table", "whole"), None, None, *[("table", "rows")] * 3]
    else:
        assert arrived == [("head", "whole"), None, None, ("table", "whole"), *[("table", "rows")] * 2]
    plain, _ = ends_in_place(anatomy, BATCHES[0])
    assert ([out.data_ptr() for out in products] == filled) == plain  # all are alive: no address was used twice
    assert not anatomy.embedding.sparse and "forward" not in vars(head)
    accumulate_gradients(model, BATCHES, tokens)
    for parameter, number in ((head.weight, 0 if anatomy.tied else None), (table, 0)):
        torch.testing.assert_close(gradients[number][id(parameter)], parameter.grad, rtol=1e-4, atol=1e-7)
    model.zero_grad(set_to_none=True)


class Capped(torch.nn.Module):
    """A causal LM's head and what follows it, which saves its result for the backward pass."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        logits = self.head(x)
        logits = logits / 3
        return torch.tanh(logits)


def test_where_the_logits_are_not_the_product_their_gradient_is_a_copy():
    """Gemma 2 caps them; a product that was changed, freed or made twice is not taken for the logits either."""
    ends = {family: ends_in_place(find_anatomy(build(family).eval()), BATCHES[0]) for family in ("llama", "gemma2")}
    assert ends == {"llama": (True, True), "gemma2": (False, True)}
    head = torch.nn.Linear(32, VOCABULARY, bias=False)
    x = torch.randn(2, 12, 32)
    for follow in (Capped(head), lambda x: head(x).tanh_(), lambda x: head(x) + head(x), lambda x: x @ head.weight.T):
        with torch.no_grad(), _head(head) as seen:
            assert not any(seen.gave(follow(x)) for _ in range(20))
    with _head(head) as seen:
        assert seen.gave(head(x)) and not seen.products


@pytest.mark.parametrize("head", ["bias", "subclass", "bf16"])
def test_other_heads_have_the_gradients_of_autograd(head):
    class Head(torch.nn.Linear):
        """A head that is more than the product."""

        def forward(self, x):
            return super().forward(x).tanh() * 3

    model = build("llama").eval()
    if head == "bf16":
        model.to(torch.bfloat16)
    else:
        weight = model.lm_head.weight
        model.lm_head = (Head if head == "subclass" else torch.nn.Linear)(*reversed(weight.shape), bias=head == "bias")
    anatomy, tokens = find_anatomy(model), sum(ids[:, 1:].numel() for ids in BATCHES)
    found, rows = {}, []
    assert ends_in_place(anatomy, BATCHES[0]) == (head != "subclass", head == "bf16")
    hook = anatomy.embedding.weight.requires_grad_().register_hook(lambda grad: rows.append(grad.is_sparse))
    layer_by_layer(
        find_stages(anatomy), BATCHES, tokens, lambda number: found.setdefault(number, anatomy.lm_head.weight.grad)
    )
    hook.remove()
    assert rows == [False, head != "bf16", head != "bf16"]  # in BF16 rows are summed before they are added
    accumulate_gradients(model, BATCHES, tokens)
    beside = {"rtol": 0.05, "atol": 1e-3} if head == "bf16" else {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(found[None], anatomy.lm_head.weight.grad, **beside)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_gradient_of_the_loss_is_autograds(value):
    ids = torch.randint(VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(2, 70, VOCABULARY, generator=torch.Generator().manual_seed(1))
    logits[1, 40, 3] = value
    logits.requires_grad_()
    (token_loss(logits, ids) / 138).backward()
    found = logits.detach().clone()
    assert loss_gradient(found, ids, 138) is found
    torch.testing.assert_close(found, logits.grad, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="69"):
        loss_gradient(found[:, 1:], ids, 138)


def test_their_norm_is_that_of_plain_autograd(model, anatomy):
    fast = {row[1:5]: row[5] for row in backward_rows(anatomy, BATCHES, 0, find_stages(anatomy))}
    accumulate_gradients(model, BATCHES, sum(ids[:, 1:].numel() for ids in BATCHES))
    plain = torch.cat([p.grad.double().flatten() for p in anatomy.layers[1][1].parameters()]).norm().item()
    model.zero_grad(set_to_none=True)
    assert fast[2, "layer", "gradient", "norm"] == pytest.approx(plain, rel=1e-6)


def test_a_model_whose_layers_share_more_than_the_stream_has_no_stages():
    model, plain = build("llama").eval(), build("llama").eval()
    first, second = model.model.layers
    run_first, run_second, kept = first.forward, second.forward, []

    def keep(*args, **kwargs):
        kept[:] = [run_first(*args, **kwargs)]
        return kept[0]

    first.forward = keep
    second.forward = lambda *args, **kwargs: run_second(*args, **kwargs) + 1e-3 * kept[0]
    layers = tuple((name, model.get_submodule(name)) for name, _ in find_anatomy(plain).layers)
    assert find_stages(dataclasses.replace(find_anatomy(plain), model=model, layers=layers)) is None
    assert first.forward is keep
    assert find_stages(find_anatomy(plain)) is not None


def every_scale(model, ids) -> float | None:
    """The largest 2^k with finite gradients, by trying each."""
    half, _ = half_copy(model)
    half.requires_grad_(True)
    found = None
    with HalfMatmul() if ids.device.type == "cpu" else nullcontext():
        for k in range(LEAST, MOST + 1):
            half.zero_grad(set_to_none=True)
            loss = token_loss(half(input_ids=ids, use_cache=False).logits, ids) / ids[:, 1:].numel()
            (loss * 2.0**k).backward()
            if not all(bool(p.grad.isfinite().all()) for p in half.parameters() if p.grad is not None):
                break
            found = 2.0**k
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "glm4"])
def test_the_predicted_loss_scale_is_the_one_that_trying_each_finds(family):
    model = build(family).eval()
    found = first_non_finite(find_anatomy(model), [SAMPLES.ids])
    assert found["largest_finite_loss_scale"] == every_scale(model, SAMPLES.ids)
    assert (found["backward_beyond"] is None) == (found["largest_finite_loss_scale"] == 2.0**MOST)


@pytest.mark.parametrize(("seen", "guess"), [(1.0, 15), (1e-3, 16), (1e3, 6), (60000.0, 0), (1990.0, 5)])
def test_a_wrong_prediction_is_mended_by_halving(monkeypatch, seen, guess):
    """What overflows where no gradient is seen makes a prediction too high, what is seen once too low; 2^5 is right."""
    tried: list[float] = []

    def backward(self, *scales):
        tried.extend(scales)
        self.largest |= {scale: seen * scale for scale in scales if scale <= 2.0**5}
        return [None if scale <= 2.0**5 else "overflow" for scale in scales]

    monkeypatch.setattr(HalfPasses, "backward", backward)
    passes = HalfPasses(find_anatomy(build("llama")), [])
    passes.backward(1.0)
    assert passes.largest_scale() == (2.0**5, "overflow")
    assert tried[1] == 2.0**guess and (guess != 5 or tried[1:] == [2.0**5, 2.0**6])


def test_fp16_passes_let_their_logits_go_and_return_memory(monkeypatch):
    called = []
    monkeypatch.setattr("periln.eval.stability.overflow.return_freed_memory", lambda collect: called.append(collect))
    passes = HalfPasses(find_anatomy(build("llama").eval()), [SAMPLES.ids[:1]], keep_logits=False)
    assert passes.forward() is None and passes.logits is None
    logits = weakref.ref(passes._graph.logits)
    assert logits() is not None
    assert passes.backward(1.0, 2.0) == [None, None]
    assert logits() is None and called == [False, False]
    passes.close()


def forwards_of(model) -> list[int]:
    """The tokens of every forward pass that begins from here on."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    return seen


def overflowing_at(scale: float):
    """A model whose gradients overflow FP16 at a loss scale: its head's weights are large, and its loss with them."""
    model = build("llama").eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(65504 / scale)
    return model


@pytest.mark.parametrize("model", [build("llama"), overflowing_at(2.0**8)], ids=["tame", "overflowing"])
def test_one_forward_pass_of_a_single_batch_serves_every_scale(model):
    ids, anatomy = SAMPLES.ids[:1], find_anatomy(model.eval())
    passes = HalfPasses(anatomy, [ids])
    seen = forwards_of(passes.half)
    assert passes.forward() is None and passes.backward(1.0) == [None]
    scale, beyond = passes.largest_scale()
    assert len(seen) == 1 and scale == every_scale(model, ids)
    passes.close()
    # A pass of its own gives the same: no graph of two batches is kept, and it knows nothing of the scales above.
    twice = HalfPasses(anatomy, [ids, ids])
    again = forwards_of(twice.half)
    assert twice.forward() is None and twice.backward(1.0) == [None] and len(again) == 4
    assert twice.largest_scale() == (scale, beyond)
    assert torch.equal(twice.logits, passes.logits)
    if beyond is not None:
        assert HalfPasses(anatomy, [ids]).backward(2 * scale) == [beyond]
        # A backward pass that ended early does not spoil the next one.
        assert passes.backward(4 * scale, scale / 2)[1] is None and len(seen) > 1


def test_what_was_run_is_not_run_again_and_nothing_is_held_behind_it():
    passes = HalfPasses(find_anatomy(build("llama").eval()), [SAMPLES.ids[:1]])
    seen = forwards_of(passes.half)
    passes.forward(), passes.backward(1.0)
    passes.close()
    assert passes.forward() is None and passes.backward(1.0) == [None] and len(seen) == 1
    assert not any(module._backward_hooks or module._forward_hooks for module in passes.half.modules())
    assert not any(parameter._backward_hooks for parameter in passes.half.parameters())


def test_the_copy_in_fp16_is_freed_with_its_passes():
    anatomy = find_anatomy(build("llama").eval())
    gc.collect()
    gc.disable()
    try:
        passes = HalfPasses(anatomy, [SAMPLES.ids[:1]])
        passes.forward(), passes.backward(1.0)
        passes.close()
        half = weakref.ref(passes.half)
        del passes
        assert half() is None
    finally:
        gc.enable()


def test_rotary_frequencies_are_not_rounded_with_the_weights():
    model = build("llama")
    before = model.model.rotary_emb.inv_freq.clone()
    half, _ = half_copy(model)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(half.model.rotary_emb.inv_freq, before)
    assert all(p.dtype == torch.float16 for p in half.parameters())


def test_a_tied_table_stays_one_in_fp16():
    model = build("gemma3")
    half, _ = half_copy(model)
    assert half.lm_head.weight is half.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32


def test_in_place_gives_what_a_copy_gives_and_leaves_the_model_in_fp16():
    copied = first_non_finite(find_anatomy(build("qwen3")), [SAMPLES.ids])
    model = build("qwen3")
    assert first_non_finite(find_anatomy(model), [SAMPLES.ids], in_place=True) == copied
    assert model.dtype == torch.float16


def test_the_bar_moves_in_every_part_to_the_end_and_says_what_to_expect():
    shares: list[tuple[str, float]] = []
    options = Options(batch_size=2, backward_samples=2, skip_samples=2, fp16_samples=1, certificate=True)
    measured = measure(build("gemma3"), SAMPLES, options, tell=lambda plan: shares.append((plan.part, plan.share)))
    values = [share for _, share in shares]
    assert values == sorted(values) and values[0] == 0 and values[-1] == pytest.approx(1)
    for part in ("forward", "certificate", "backward", "skipped layers", "FP16"):
        assert len({share for name, share in shares if name == part}) > 1, part
    assert measured.stopped is None and measured.certificate["rows"]


def test_a_stop_keeps_what_was_measured():
    def stop(plan):
        if plan.part == "skipped layers" and plan.parts[-2].share > 0:
            raise KeyboardInterrupt

    options = Options(batch_size=2, backward_samples=2, skip_samples=2, fp16_samples=1)
    measured = measure(build("llama"), SAMPLES, options, tell=stop)
    assert measured.stopped == "skipped layers" == measured.record["stopped"]
    assert "Stopped in the part 'skipped layers'" in measured.record["verdict"][-1]
    tensors = set(measured.rows.tensor)
    assert {"stream", "gradient"} <= tensors and "skip_loss" not in set(measured.rows.stat)
    assert measured.record["fp16"] is None


def test_a_stop_between_two_parts_keeps_what_was_measured(monkeypatch):
    calls = []

    def stop():
        calls.append(None)
        if len(calls) == 3:  # after the forward pass and the gradients
            raise KeyboardInterrupt

    monkeypatch.setattr("periln.eval.stability.measure.return_freed_memory", stop)
    options = Options(batch_size=2, backward_samples=2, skip_samples=2, fp16_samples=0)
    measured = measure(build("llama"), SAMPLES, options)
    assert measured.stopped == "skipped layers" and {"stream", "gradient"} <= set(measured.rows.tensor)


def test_a_stop_before_anything_is_known_keeps_nothing():
    def stop(plan):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(build("llama"), SAMPLES, Options(), tell=stop)
