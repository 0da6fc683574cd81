"""The chunked cross entropy is the plain one: same loss, same gradients, no logits of the whole batch, FP16-safe."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import SIZES, random_ids, shaken_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_periln.loss import IGNORE_INDEX, chunked_losses, shift_labels
from periln.runkit.fp16 import HalfMatmul


def problem(batch=2, length=11, hidden=8, vocab=31, ignored=0.3, seed=0):
    """Hidden states (B, S, D) that want a gradient, a head, and targets, some of which do not count."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, length, hidden, generator=generator).requires_grad_()
    head = nn.Linear(hidden, vocab, bias=False)
    head.weight.data.normal_(0, 0.5, generator=generator)
    targets = torch.randint(0, vocab, (batch, length), generator=generator)
    targets[torch.rand(batch, length, generator=generator) < ignored] = IGNORE_INDEX
    targets[0, 0] = 1
    return states, head, targets


def chunked_cross_entropy(*args, **kwargs):
    """The chunked loss without its z term."""
    return chunked_losses(*args, **kwargs)[0]


def plain_cross_entropy(states, head, targets, num_items_in_batch=None):
    """The definition, with all logits at once."""
    log_p = head(states).log_softmax(-1).flatten(0, -2)
    targets = targets.flatten()
    counts = targets != IGNORE_INDEX
    total = -log_p[counts].gather(1, targets[counts][:, None]).sum()
    return total / (counts.sum() if num_items_in_batch is None else num_items_in_batch)


def loss_and_gradients(function, states, head, targets, **more):
    states.grad = head.weight.grad = None
    loss = function(states, head, targets, **more)
    loss.backward()
    return loss.detach(), states.grad.clone(), head.weight.grad.clone()


def assert_same(ours, theirs, tolerance=1e-6):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# The same number


@pytest.mark.parametrize("chunk", [1, 2, 5, 11, 21, 22, 23, 1000])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.9])
def test_chunks_that_divide_and_that_do_not_give_the_plain_loss_and_gradients(chunk, ignored):
    args = problem(ignored=ignored)
    theirs = loss_and_gradients(plain_cross_entropy, *args)
    assert theirs[0] > 1
    assert theirs[2].abs().max() > 0.01
    assert_same(loss_and_gradients(chunked_cross_entropy, *args, chunk_tokens=chunk), theirs)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 9),
    hidden=st.integers(1, 6),
    vocab=st.integers(2, 40),
    chunk=st.integers(1, 40),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    items=st.one_of(st.none(), st.integers(1, 50)),
    seed=st.integers(0, 1000),
)
def test_any_shape_gives_the_plain_loss_and_gradients(batch, length, hidden, vocab, chunk, ignored, items, seed):
    args = problem(batch, length, hidden, vocab, ignored, seed)
    ours = loss_and_gradients(chunked_cross_entropy, *args, chunk_tokens=chunk, num_items_in_batch=items)
    theirs = loss_and_gradients(plain_cross_entropy, *args, num_items_in_batch=items)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_flat_states_and_targets_are_the_same_as_batched_ones():
    states, head, targets = problem()
    batched = chunked_cross_entropy(states, head, targets, chunk_tokens=4)
    assert torch.equal(chunked_cross_entropy(states.flatten(0, 1), head, targets.flatten(), chunk_tokens=4), batched)


@pytest.mark.parametrize("items", [7, torch.tensor(7), torch.tensor(7.0)])
def test_the_sum_is_divided_by_the_number_of_items_of_the_whole_batch(items):
    """Under gradient accumulation a batch is longer than a micro batch; the divisor is the batch's."""
    args = problem()
    assert_same(
        loss_and_gradients(chunked_cross_entropy, *args, num_items_in_batch=items, chunk_tokens=4),
        loss_and_gradients(plain_cross_entropy, *args, num_items_in_batch=7),
    )
    assert chunked_cross_entropy(*args, num_items_in_batch=items) != chunked_cross_entropy(*args)


def test_ignored_targets_get_no_gradient_and_do_not_count():
    states, head, targets = problem(ignored=0.5)
    _, gradient, _ = loss_and_gradients(chunked_cross_entropy, states, head, targets, chunk_tokens=4)
    ignored = targets == IGNORE_INDEX
    assert 0 < ignored.sum() < targets.numel()
    assert not gradient[ignored].any()
    assert gradient[~ignored].abs().sum(-1).min() > 0


def test_without_gradients_the_loss_is_the_same():
    args = problem()
    with torch.no_grad():
        loss = chunked_cross_entropy(*args, chunk_tokens=4)
    assert not loss.requires_grad
    assert torch.equal(loss, chunked_cross_entropy(*args, chunk_tokens=4).detach())


def test_a_frozen_backbone_still_trains_the_head():
    states, head, targets = problem()
    chunked_cross_entropy(states.detach(), head, targets, chunk_tokens=4).backward()
    ours, head.weight.grad = head.weight.grad, None
    plain_cross_entropy(states.detach(), head, targets).backward()
    assert torch.allclose(ours, head.weight.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_loss_is_in_fp32_at_least(dtype, expected):
    states, head, targets = problem()
    assert chunked_cross_entropy(states.to(dtype), head.to(dtype), targets).dtype == expected


def test_labels_shift_one_place_to_the_left():
    labels = torch.tensor([[5, 6, 7], [8, IGNORE_INDEX, 9]])
    expected = [[6, 7, IGNORE_INDEX], [IGNORE_INDEX, 9, IGNORE_INDEX]]
    assert shift_labels(labels).tolist() == expected


# In the model


def model_loss_and_gradients(model, **inputs):
    model.zero_grad()
    output = model(**inputs, use_cache=False)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


def labelled(batch=3, length=9):
    ids = random_ids(batch, length)
    labels = ids.clone()
    labels[:, :2] = IGNORE_INDEX
    return ids, labels


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["labels", "num_items int", "num_items tensor", "shift_labels"])
def test_skip_logits_gives_the_models_own_loss_and_gradients_and_no_logits(how, tied):
    model = shaken_model(tie_word_embeddings=tied)
    ids, labels = labelled()
    inputs = {"input_ids": ids, "labels": labels}
    if how.startswith("num_items"):
        inputs["num_items_in_batch"] = torch.tensor(50) if how.endswith("tensor") else 50
    if how == "shift_labels":
        inputs["shift_labels"] = shift_labels(labels).roll(1, 0)  # other targets than the labels give
    plain, expected = model_loss_and_gradients(model, **inputs)
    ours, gradients = model_loss_and_gradients(model, **inputs, skip_logits=True)
    assert ours.logits is None
    assert plain.logits.shape == (3, 9, SIZES["vocab_size"])
    assert ours.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 2e-6 * gradient.abs().max(), name


def test_shift_labels_alone_are_enough():
    model = shaken_model()
    ids, labels = labelled()
    expected = model(ids, labels=labels).loss
    for skip in (False, True):
        loss = model(ids, shift_labels=shift_labels(labels), skip_logits=skip).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_models_loss_is_next_token_cross_entropy_in_nats():
    model = shaken_model()
    ids = random_ids(2, 9)
    output = model(ids, labels=ids)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_skip_logits_without_labels_is_refused():
    with pytest.raises(ValueError, match="skip_logits=True needs labels"):
        shaken_model()(random_ids(), skip_logits=True)


# Memory


class LargestOf(TorchDispatchMode):
    """Records the most rows that any tensor with `vocab` columns had, forward and backward."""

    def __init__(self, vocab: int):
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.ndim and x.shape[-1] == self.vocab:
                self.rows = max(self.rows, x.numel() // self.vocab)
        return result


@pytest.mark.parametrize("chunk", [4, 7])
def test_no_logits_of_more_than_a_chunk_exist_forward_or_backward(chunk):
    args = problem(batch=3, length=10, hidden=2, vocab=37)
    with LargestOf(37) as ours:
        chunked_cross_entropy(*args, chunk_tokens=chunk).backward()
    with LargestOf(37) as plain:
        plain_cross_entropy(*args).backward()
    assert plain.rows == 30
    assert ours.rows == chunk


def test_nothing_of_the_logits_is_kept_from_forward_to_backward():
    kept = []

    def keep(x):
        kept.append(tuple(x.shape))
        return x

    args = problem(batch=3, length=10, hidden=2, vocab=37)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        plain_cross_entropy(*args)
        assert (30, 37) in {(x[0] * x[1], x[2]) for x in kept if len(x) == 3}
        kept.clear()
        chunked_cross_entropy(*args, chunk_tokens=7)
    assert not [shape for shape in kept if shape[-1:] == (37,) and shape != (2, 37)]


def test_the_head_of_the_model_sees_1024_tokens_at_a_time():
    model = shaken_model(num_hidden_layers=1)
    rows = []
    model.lm_head.register_forward_hook(lambda m, args, out: rows.append(out.numel() // out.shape[-1]))
    ids = random_ids(3, 500)
    with LargestOf(SIZES["vocab_size"]) as largest:
        model(ids, labels=ids, skip_logits=True, use_cache=False).loss.backward()
    assert rows == [1024, 476, 476, 1024]  # forward, then again in backward
    assert largest.rows == 1024


# FP16 under a loss scale


class GradientInForward(torch.autograd.Function):
    """What fused kernels do: the gradient of the logits is formed in forward, in FP16, before the loss scale."""

    @staticmethod
    def forward(ctx, states, weight, targets):
        logits = (states @ weight.T).float()
        p = logits.softmax(-1)
        p[torch.arange(len(targets)), targets] -= 1
        ctx.save_for_backward((p / len(targets)).half() @ weight)
        return F.cross_entropy(logits, targets)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None, None


def test_under_a_loss_scale_no_more_of_the_fp16_gradient_underflows_than_of_the_plain_loss():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(512, 16, generator=generator).half().requires_grad_()
    head = nn.Linear(16, 1000, bias=False)
    head.weight.data.normal_(0, 0.02, generator=generator)
    targets = torch.randint(0, 1000, (512,), generator=generator)
    head.weight.data[targets] *= 0.01  # their part of the gradient is what underflows

    def zeros(loss_of, scale=65_536.0) -> int:
        states.grad = None
        with HalfMatmul(), torch.autocast("cpu", dtype=torch.float16):
            (loss_of() * scale).backward()
        assert states.grad.dtype == torch.float16
        assert states.grad.isfinite().all()
        return int((states.grad == 0).sum())

    plain = zeros(lambda: F.cross_entropy(head(states).float(), targets))
    chunked = zeros(lambda: chunked_cross_entropy(states, head, targets, chunk_tokens=100))
    fused = zeros(lambda: GradientInForward.apply(states, head.weight.detach().half(), targets))
    assert chunked <= plain
    assert fused > plain + 100  # the count does see underflow
    assert zeros(lambda: chunked_cross_entropy(states, head, targets, chunk_tokens=100), scale=1.0) > plain + 100


def test_under_autocast_the_chunked_gradient_is_the_plain_one():
    """Recomputation in backward runs under the same autocast as the forward pass."""
    model = shaken_model()
    ids, labels = labelled()
    results = []
    for skip in (False, True):
        model.zero_grad()
        with HalfMatmul(), torch.autocast("cpu", dtype=torch.float16):
            loss = model(ids, labels=labels, skip_logits=skip, use_cache=False).loss
            (loss * 1024).backward()
        results.append((loss.item(), model.lm_head.weight.grad, model.model.layers[0].mlp.down_proj.weight.grad))
    (loss, *plain), (other, *chunked) = results
    assert other == pytest.approx(loss, rel=1e-6)
    for a, b in zip(chunked, plain, strict=True):
        assert (a - b).abs().max() <= 2e-3 * b.abs().max()


# The z term


@pytest.mark.parametrize("items", [None, 7])
def test_the_z_term_is_the_mean_square_of_the_log_partition_and_does_not_touch_the_loss(items):
    args = problem(ignored=0.4)

    def both(states, head, targets):
        loss, z = chunked_losses(states, head, targets, items, chunk_tokens=4, z_loss=0.1)
        return loss + z

    def plain(states, head, targets):
        counts = targets != IGNORE_INDEX
        z = head(states)[counts].logsumexp(-1).square().sum() / (counts.sum() if items is None else items)
        return plain_cross_entropy(states, head, targets, items) + 0.1 * z

    assert_same(loss_and_gradients(both, *args), loss_and_gradients(plain, *args))
    alone = chunked_losses(*args, items, chunk_tokens=4)
    assert alone[1] is None
    assert torch.equal(chunked_losses(*args, items, chunk_tokens=4, z_loss=0.1)[0], alone[0])


def test_the_model_adds_the_z_term_and_says_how_much_it_is():
    model, ids = shaken_model(), random_ids(2, 9)
    plain = model(ids, labels=ids, skip_logits=True)
    with_z = model(ids, labels=ids, skip_logits=True, z_loss=0.01)
    assert plain.z_loss is None
    assert with_z.z_loss > 0
    torch.testing.assert_close(with_z.loss - with_z.z_loss, plain.loss)
    assert torch.equal(with_z.cross_entropy, plain.loss)
    assert plain.cross_entropy is None
    with pytest.raises(ValueError, match="z_loss=0.01.*skip_logits"):
        model(ids, labels=ids, z_loss=0.01)


def test_another_ignored_label_counts_as_little_as_in_the_plain_loss():
    model, ids = shaken_model(), random_ids(2, 9)
    labels = ids.clone()
    labels[:, ::3] = 7
    plain = model(ids, labels=labels, ignore_index=7).loss
    torch.testing.assert_close(model(ids, labels=labels, ignore_index=7, skip_logits=True).loss, plain)
    assert not torch.isclose(model(ids, labels=labels, skip_logits=True).loss, plain)


# The gradient in the same pass


def one_pass(*args, loss_scale=1.0, **kwargs):
    return chunked_losses(*args, loss_scale=loss_scale, **kwargs)[0]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.integers(2, 40)),
    chunk=st.integers(1, 40),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    items=st.one_of(st.none(), st.integers(1, 50)),
    z_loss=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 1000),
)
def test_the_gradient_of_the_same_pass_is_that_of_recomputation(shape, chunk, ignored, items, z_loss, seed):
    args = problem(*shape, ignored, seed)

    def total(*args, **more):
        parts = chunked_losses(*args, items, chunk, z_loss=z_loss, **more)
        return sum(part for part in parts if part is not None)

    ours, theirs = loss_and_gradients(total, *args, loss_scale=1.0), loss_and_gradients(total, *args)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def half_gradients(args, scale, told, **more):
    """Gradients of a scaled loss in FP16, unscaled again, of states and head; and the share of zeros in the states'."""
    states, head, targets = args
    states.grad = head.weight.grad = None
    with HalfMatmul(), torch.autocast("cpu", dtype=torch.float16):
        loss = chunked_losses(states, head, targets, chunk_tokens=100, loss_scale=scale if told else None, **more)[0]
    (loss * scale).backward()
    assert states.grad.dtype == torch.float16 and head.weight.grad.dtype == torch.float32
    zeros = (states.grad == 0).float().mean().item()
    return states.grad.double() / scale, head.weight.grad.double() / scale, zeros


@pytest.mark.parametrize("scale", [2.0**n for n in range(0, 21, 4)])
def test_in_fp16_the_same_pass_is_as_exact_as_recomputation_at_every_loss_scale(scale):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(512, 16, generator=generator).half().requires_grad_()
    head = nn.Linear(16, 1000, bias=False)
    head.weight.data.normal_(0, 0.02, generator=generator)
    args = states, head, torch.randint(0, 1000, (512,), generator=generator)
    one, slow = half_gradients(args, scale, told=True), half_gradients(args, scale, told=False)
    wide = states.detach().double().requires_grad_()
    weight = head.weight.detach().half().double().requires_grad_()
    F.cross_entropy(wide @ weight.T, args[2]).backward()
    for ours, theirs, exact in zip(one, slow, (wide.grad, weight.grad), strict=False):
        size = exact.norm()
        assert ours.isfinite().all()
        assert (ours - exact).norm() / size <= 1.05 * (theirs - exact).norm() / size + 1e-4
        assert (ours - theirs).norm() <= 4e-3 * size or scale < 2**8  # below it underflows in both
    assert one[2] <= slow[2]
    assert scale < 2**12 or (one[0] - wide.grad).norm() <= 1e-3 * wide.grad.norm()


def test_a_scale_that_the_loss_was_not_told_is_still_right():
    args = problem()
    expected = loss_and_gradients(plain_cross_entropy, *args)
    states, head, targets = args
    states.grad = head.weight.grad = None
    (one_pass(states, head, targets, loss_scale=4.0) * 3).backward()
    assert_same((states.grad / 3, head.weight.grad / 3), expected[1:])


class Products(TorchDispatchMode):
    """Counts the products in place with a factor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == "mul_"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("factor", "count"), [(4.0, 0), (3.0, 2)])
def test_a_scale_that_the_loss_was_told_multiplies_no_gradient_again(factor, count):
    states, head, targets = problem()
    loss = one_pass(states, head, targets, loss_scale=4.0) * factor
    with Products() as seen:
        loss.backward()
    assert seen.count == count


def test_the_heads_gradient_is_summed_in_fp32():
    """A sum over many chunks: in FP16 it would come to a stop where a chunk's part is less than half a unit of it."""
    states = torch.ones(4096, 1).half().requires_grad_()
    head = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(head.weight)
    with HalfMatmul(), torch.autocast("cpu", dtype=torch.float16):
        loss = chunked_losses(states, head, torch.zeros(4096, dtype=torch.long), 1, chunk_tokens=1, loss_scale=1.0)[0]
    loss.backward()
    assert head.weight.grad.flatten().tolist() == [-2048.0, 2048.0]  # FP16 stops growing at 1024


def test_a_gradient_that_was_used_up_is_not_used_again():
    loss = one_pass(*problem())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has been used already"):
        loss.backward()


def test_a_head_that_is_more_than_its_weight_is_called():
    states, head, targets = problem()
    expected = loss_and_gradients(chunked_cross_entropy, states, head, targets)
    calls = []
    handle = head.register_forward_hook(lambda *_: calls.append(1))
    assert_same(loss_and_gradients(one_pass, states, head, targets), expected)
    assert calls
    handle.remove()
    biased = nn.Linear(8, 31)
    one_pass(states, biased, targets).backward()
    assert biased.bias.grad.abs().max() > 0


@pytest.mark.parametrize("chunk", [4, 7])
def test_the_same_pass_holds_no_more_than_a_chunk_of_logits(chunk):
    args = problem(batch=3, length=10, hidden=2, vocab=37)
    with LargestOf(37) as ours:
        one_pass(*args, chunk_tokens=chunk).backward()
    assert ours.rows == chunk


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_passes_the_scale_on(tied):
    model = shaken_model(tie_word_embeddings=tied)
    ids, labels = labelled()
    plain, expected = model_loss_and_gradients(model, input_ids=ids, labels=labels)
    ours, gradients = model_loss_and_gradients(model, input_ids=ids, labels=labels, skip_logits=True, loss_scale=1.0)
    assert ours.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 2e-6 * gradient.abs().max(), name
    with pytest.raises(ValueError, match="loss_scale=2.0.*skip_logits"):
        model(ids, labels=ids, loss_scale=2.0)
