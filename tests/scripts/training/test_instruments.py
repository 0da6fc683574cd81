"""What the trainer's instruments cost and leave alone: waits, memory, random numbers, what is observed."""

import json

import pytest
import torch
from tiny import timeless, train, write_recipe
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from periln.runkit import process
from periln.runkit.folder import RunFolder, weights_hash
from periln.scripts.pretrain import load_recipe
from periln.scripts.training.batches import document_boundaries, document_mask
from periln.scripts.training.layer_stats import Later
from periln.scripts.training.trainer import Trainer
from periln.scripts.training.witness import Witness

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerate")]

FP32 = {"mode": "fp32", "residual_dtype": None}


def trainer_of(tmp_path, data, **fields) -> Trainer:
    recipe, tokens = load_recipe(write_recipe(tmp_path, data, **fields))
    return Trainer(recipe, RunFolder(tmp_path / "run"), tokens)


class HostWaits(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers that are read from tensors, and shapes that depend on their values.

    Tensors say that they are not on a CPU, so that what only a CPU does is left out.
    """

    WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique2"}

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen: list[str] = []
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)
        for name in ("tolist", "numpy", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))

    def _counted(self, name, method):
        def counted(tensor, *args, **kwargs):
            self.seen.append(name)
            return method(tensor, *args, **kwargs)

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.overloadpacket.__name__) in self.WAITING:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("mode", ["fp16", "fp32"])
@pytest.mark.parametrize("micro", [4, 1])
def test_a_step_waits_for_the_device_once_and_a_micro_batch_never(tmp_path, data, monkeypatch, mode, micro, masking):
    precision = FP32 if mode == "fp32" else {"mode": "fp16"}
    trainer = trainer_of(tmp_path, data, micro_batch_size=micro, precision=precision, document_masking=masking)
    trainer._train_step(witness=True)
    trainer.step = 1
    with HostWaits(monkeypatch) as waits:
        trainer._train_step(witness=False)
    assert waits.seen == ["tolist"]


def test_a_wait_would_be_counted(tmp_path, data, monkeypatch):
    trainer = trainer_of(tmp_path, data, micro_batch_size=1, precision=FP32)
    trainer.model.model.layers[0].register_forward_hook(lambda m, args, out: bool(out.isfinite().all()) and None)
    trainer.step = 1
    with HostWaits(monkeypatch) as waits:
        trainer._train_step(witness=False)
    assert waits.seen == ["_local_scalar_dense"] * 4 + ["tolist"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_statistics_that_wait_are_those_of_each_tensor(dtype):
    later, rows, tensors = Later(), [tuple(torch.zeros(5)) for _ in range(3)], []
    for i in range(2 * Later.MOST + 3):
        tensors.append(torch.randn(7, 5, generator=torch.Generator().manual_seed(i)).to(dtype))
        later.add(rows[i % 3], tensors[-1], 0.25)
    later.flush()
    for i, row in enumerate(rows):
        x = torch.stack(tensors[i::3]).double()
        expected = [x.abs().sum(), x.sum(), x.square().sum(), x.abs().max(), torch.tensor(0.25 * len(x))]
        assert [n.item() for n in row] == pytest.approx([n.item() for n in expected], rel=1e-5)
    later.add(rows[0], torch.tensor([float("inf"), 1.0], dtype=dtype), 0.25)
    later.add(rows[1], torch.tensor([float("nan"), 1.0], dtype=dtype), 0.25)
    later.flush()
    assert all(n == float("inf") for n in rows[0][:4]) and all(n.isnan() for n in rows[1][:4])


def test_an_output_that_changes_while_it_waits_is_refused_and_a_dropped_one_is_not_counted():
    later, row, x = Later(), tuple(torch.zeros(5)), torch.ones(3)
    later.add(row, x, 1.0)
    later.drop()
    later.flush()
    assert all(n == 0 for n in row)
    later.add(row, x, 1.0)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="was changed in place before its statistics were taken"):
        later.flush()


def test_batches_are_read_ahead_in_the_order_of_the_steps(tmp_path, data):
    trainer = trainer_of(tmp_path, data, micro_batch_size=2, document_masking=True)
    for step in (0, 1, 2, 7, 8, 3):  # in turn, and after a jump
        found = trainer.batches.of(step)
        inputs, targets = trainer.order.batch(step)
        assert torch.equal(torch.cat([b["input_ids"] for b in found]), torch.from_numpy(inputs))
        assert torch.equal(torch.cat([b["shift_labels"] for b in found]), torch.from_numpy(targets))
        positions = torch.from_numpy(trainer.order.position_ids(step))
        assert torch.equal(torch.cat([b["position_ids"] for b in found]), positions)
        expected, reading = trainer.batches._next
        assert expected == step + 1
        assert torch.equal(reading.result()[0]["input_ids"], torch.from_numpy(trainer.order.batch(step + 1)[0][:2]))


def test_the_witness_leaves_no_trace(tmp_path, data):
    trainer = trainer_of(tmp_path, data)
    random = torch.get_rng_state()
    weights = {name: p.clone() for name, p in trainer.model.named_parameters()}
    seen = Witness(trainer.engine)
    seen.look(trainer._micro_batches(0)[0])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in trainer.model.named_parameters())
    with_it, without = trainer_of(tmp_path, data), trainer_of(tmp_path, data)
    for other, witness in ((with_it, True), (without, False)):
        other._train_step(witness=witness)
    for a, b in zip(with_it.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("attention", "kernels"),
    [("sdpa", ["scaled_dot_product_flash_attention_for_cpu"]), ("eager", [])],
)
def test_the_attention_that_ran_is_in_the_environment(tmp_path, data, attention, kernels):
    trainer = trainer_of(tmp_path, data)
    trainer.model.config._attn_implementation = attention
    trainer._train_step(witness=True)
    seen = json.loads((trainer.run.path / "environment.json").read_text())
    assert seen["attention"] == {"implementation": attention, "kernels": kernels}
    assert seen["deterministic_algorithms"] is False


def test_a_deterministic_run_is_asked_of_torch_and_recorded(tmp_path, data):
    try:
        run = train(tmp_path, data, steps=3, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        seen = json.loads((run.path / "environment.json").read_text())
        assert seen["deterministic_algorithms"] is True
        plain = train(tmp_path, data, name="plain", steps=3)
        assert not torch.are_deterministic_algorithms_enabled()  # one process, two recipes
    finally:
        torch.use_deterministic_algorithms(False)
    assert timeless(run.path) == timeless(plain.path)  # on a CPU they are so anyway
    assert weights_hash(run.checkpoints()[-1]) == weights_hash(plain.checkpoints()[-1])


def test_the_peak_memory_is_that_of_the_steady_step(tmp_path, data):
    if not process.reset_peak_rss():
        pytest.skip("this system does not let a process reset its peak")
    trainer, size = trainer_of(tmp_path, data), 300 * 2**20
    torch.ones(size // 4).sum()
    first = trainer._train_step(witness=True)["peak_memory_bytes"]
    trainer.step = 1
    second = trainer._train_step(witness=False)["peak_memory_bytes"]
    assert 0 < second < first - size // 2


# Documents


POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 0]])


def test_boundaries_are_where_documents_and_rows_begin():
    ends = document_boundaries(POSITIONS)
    assert ends.tolist() == [0, 3, 6, 7, 11, 12]
    assert ends.dtype == torch.int32


def test_the_mask_is_that_of_transformers():
    from transformers import LlamaConfig
    from transformers.masking_utils import create_causal_mask

    from modeling_periln.arguments import CACHE

    config = LlamaConfig(attn_implementation="sdpa")
    given = {"inputs_embeds": torch.zeros(2, 6, 8), "attention_mask": None, "position_ids": POSITIONS, CACHE: None}
    theirs = create_causal_mask(config=config, **given)
    assert torch.equal(document_mask(POSITIONS), theirs.expand(2, 1, 6, 6))
    assert document_mask(POSITIONS)[1, 0].int().tolist()[4] == [0, 1, 1, 1, 1, 0]


def packed_attention(module, query, key, value, attention_mask, cu_seq_lens_q, cu_seq_lens_k, **kwargs):
    """What flash attention is given, in plain torch: documents in rows that follow on each other, and no mask."""
    assert attention_mask is None
    assert cu_seq_lens_q is cu_seq_lens_k
    rows, heads, length, size = query.shape
    flat = (x.transpose(1, 2).reshape(1, rows * length, -1, size).transpose(1, 2) for x in (query, key, value))
    places = torch.arange(rows * length)
    documents = torch.searchsorted(cu_seq_lens_q, places, right=True)
    mask = (documents[:, None] == documents) & (places[:, None] >= places)
    more = {"scale": kwargs["scaling"], "enable_gqa": True}
    out = torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=mask, **more)
    return out.transpose(1, 2).reshape(rows, length, heads, size), None


@pytest.fixture
def flash_stand_in():
    AttentionInterface.register("flash_stand_in", packed_attention)
    yield "flash_stand_in"
    del AttentionInterface._global_mapping["flash_stand_in"]


def test_flash_attention_is_told_the_documents_and_gives_the_masks_gradients(tmp_path, data, flash_stand_in):
    gradients = []
    for attention in ("sdpa", flash_stand_in):
        fields = {"document_masking": True, "sequence_length": 128, "micro_batch_size": 16, "batch_size": 48}
        trainer = trainer_of(tmp_path, data, precision=FP32, **fields)
        trainer.batches.attention = trainer.model.config._attn_implementation = attention
        batches = trainer._micro_batches(0)
        assert sum((batch["position_ids"][:, 1:] == 0).sum() for batch in batches) > 3  # rows of several documents
        loss = trainer._gradients(batches)
        gradients.append((loss, torch.cat([p.grad.flatten() for p in trainer.model.parameters()])))
    (loss, expected), (other, ours) = gradients
    assert other == pytest.approx(loss, rel=1e-6)
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_other_numbers_of_documents_make_no_other_graphs(tmp_path, data, flash_stand_in, quick_compiler):
    fields = {"document_masking": True, "sequence_length": 128, "micro_batch_size": 16, "batch_size": 96}
    trainer = trainer_of(tmp_path, data, precision=FP32, compile=True, **fields)
    trainer.batches.attention = trainer.model.config._attn_implementation = flash_stand_in
    counts = {len(batch["cu_seq_lens_q"]) for batch in trainer._micro_batches(0)}
    assert len(counts) > 2
    trainer._train_step(witness=False)
    assert counters["stats"]["unique_graphs"] == 3
