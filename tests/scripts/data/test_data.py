"""Tokens on disk, and the fixed order in which they are read."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MODEL
from transformers import AutoTokenizer

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from periln.runkit.errors import UserError
from periln.scripts.data.token_data import FixedOrder, TokenData
from periln.scripts.prepare_data import prepare

SHARD = 997  # tokens: every document lies across a boundary


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("out") / "data"
    for i in range(40):
        (source / f"{i}.txt").write_text("".join(f"word{i * j % 97} " for j in range(200)) + "é漢字🙂")
    prepare(str(source), out, vocab_size=300, max_bytes=10**6, heldout_share=0.1, context=64, shard_tokens=SHARD)
    return source, out


@pytest.fixture
def copy(prepared, tmp_path):
    shutil.copytree(prepared[1], tmp_path / "data")
    return tmp_path / "data"


def change_index(folder, **changes):
    index = json.loads((folder / "index.json").read_text())
    for key, value in changes.items():
        target, last = index, key.split("__")
        for part in last[:-1]:
            target = target[int(part) if part.isdigit() or part == "-1" else part]
        target[last[-1]] = value
    (folder / "index.json").write_text(json.dumps(index))


def test_tokens_decode_to_the_documents_with_an_end_mark_each(prepared):
    data = TokenData(prepared[1])
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_path)
    start, ends = 0, data.document_ends(0, len(data))
    assert len(ends) == data.index["documents"] > 30 and ends[-1] == len(data)
    for end in ends:
        ids = data.read(start, end).tolist()
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[:-1]
        assert tokenizer.decode(ids[:-1]).startswith("word0 word") and tokenizer.decode(ids[:-1]).endswith("é漢字🙂")
        start = end


def test_shards_are_one_stream_cut_at_equal_lengths(prepared, tmp_path):
    source, out = prepared
    prepare(str(source), tmp_path / "one", 300, 10**6, 0.1, 64)
    data, whole = TokenData(out), TokenData(tmp_path / "one")
    assert len(whole.index["shards"]) == 1 and len(data.index["shards"]) > 15
    assert {len(tokens) for tokens in data._tokens[:-1]} == {SHARD}
    assert np.array_equal(data.read(0, len(data)), whole.read(0, len(whole)))
    rng = np.random.default_rng(0)
    for start in rng.integers(0, len(data) - 2 * SHARD, 30):
        stop = start + rng.integers(1, 2 * SHARD)
        assert np.array_equal(data.read(start, stop), whole.read(start, stop))
        assert np.array_equal(data.document_ends(start, stop), whole.document_ends(start, stop))


def test_places_beyond_32_bits_are_read(copy):
    size, count = 1 << 27, 33  # the files are holes but for their last bytes
    entry = {"tokens": size, "documents": 1}
    shards = [{"file": f"big-{i}.bin", "ends": f"big-{i}.ends", **entry} for i in range(count)]
    for shard in shards:
        with open(copy / shard["file"], "wb") as file:
            file.truncate(2 * size)
            file.seek(2 * size - 8)
            file.write(np.arange(1, 5, dtype="<u2").tobytes())
        np.array([size], dtype="<u4").tofile(copy / shard["ends"])
    change_index(copy, shards=shards, tokens=count * size, documents=count, shard_tokens=size)
    data = TokenData(copy)
    assert data.read(len(data) - 5, len(data)).tolist() == [0, 1, 2, 3, 4]
    assert data.document_ends(len(data) - size - 2, len(data)).tolist() == [len(data) - size, len(data)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "uint32"}, "300 ids are uint16, not uint32"),
        ({"tokens": 12}, "the shards' tokens do not sum to 12"),
        ({"documents": 3}, "the shards' documents do not sum to 3"),
        ({"shard_tokens": 500}, "a shard other than the last has not 500 tokens"),
        ({"shards": []}, "do not sum"),
    ],
)
def test_an_index_that_lies_is_noticed_when_it_is_opened(copy, changes, message):
    change_index(copy, **changes)
    with pytest.raises(UserError, match=message):
        TokenData(copy)


def test_a_cut_or_missing_shard_is_noticed_when_it_is_opened(copy, tmp_path):
    with open(copy / "train-00002.bin", "rb+") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"train-00002\.bin is missing or not 1994 bytes long"):
        TokenData(copy)
    (copy / "train-00001.ends").unlink()
    (copy / "train-00002.bin").unlink()
    with pytest.raises(UserError, match=r"train-0000[12]\.\w+ is missing"):
        TokenData(copy)
    with pytest.raises(UserError, match=r"no index\.json"):
        TokenData(tmp_path)
    (copy / "index.json").write_text('{"dtype": "uint16", "tokens": 3}')
    with pytest.raises(UserError, match=r"index\.json has no vocab_size, documents, .*: prepare the data again"):
        TokenData(copy)


@pytest.mark.parametrize("file", ["train-00003.bin", "train-00003.ends"])
def test_a_flipped_bit_is_found_by_verify(copy, file):
    TokenData(copy).verify()
    data = bytearray((copy / file).read_bytes())
    data[0] ^= 4
    (copy / file).write_bytes(data)
    with pytest.raises(UserError, match=rf"{file} has changed since it was prepared"):
        TokenData(copy).verify()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 5), batch=st.integers(1, 9), length=st.integers(2, 40))
def test_every_epoch_reads_every_window_once_whatever_the_batch(prepared, seed, batch, length):
    order = FixedOrder(TokenData(prepared[1]), length, batch, seed)
    steps = -(-2 * order.windows // batch)
    numbers = np.concatenate([order.window_numbers(k) for k in range(steps)])[: 2 * order.windows]
    for epoch in np.split(numbers, 2):
        assert sorted(epoch) == list(range(order.windows))


def test_a_step_depends_on_seed_and_number_alone(prepared):
    data = TokenData(prepared[1])
    forward = FixedOrder(data, 16, 4, seed=1)
    walked = [forward.batch(k) for k in range(20)]
    for k in (19, 3, 11):
        fresh = FixedOrder(data, 16, 4, seed=1).batch(k)
        assert all(np.array_equal(a, b) for a, b in zip(fresh, walked[k], strict=True))
    assert not np.array_equal(FixedOrder(data, 16, 4, seed=2).batch(3)[0], walked[3][0])


def test_targets_are_the_next_tokens(prepared):
    data = TokenData(prepared[1])
    inputs, targets = FixedOrder(data, 16, 4, seed=1).batch(0)
    assert inputs.shape == targets.shape == (4, 16)
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_that_read_their_rows_read_together_the_batch_of_one(prepared, processes):
    def order():
        return FixedOrder(TokenData(prepared[1]), 100, 8, seed=3)

    for step in (0, 7, 50):
        share = 8 // processes
        blocks = [slice(rank * share, (rank + 1) * share) for rank in range(processes)]
        strided = [slice(rank, None, processes) for rank in range(processes)]
        inputs, targets = order().batch(step)
        positions = order().position_ids(step)
        parts = [order().batch(step, rows) for rows in blocks]
        assert np.array_equal(np.concatenate([x for x, _ in parts]), inputs)
        assert np.array_equal(np.concatenate([y for _, y in parts]), targets)
        assert np.array_equal(np.concatenate([order().position_ids(step, rows) for rows in blocks]), positions)
        for rank, rows in enumerate(strided):
            assert np.array_equal(order().batch(step, rows)[0], inputs[rank::processes])


@pytest.mark.parametrize("length", [7, 450])
def test_positions_restart_behind_each_end_mark(prepared, length):
    data = TokenData(prepared[1])
    order, eos = FixedOrder(data, length, 5, seed=1), 0
    restarts = 0
    for step in range(20):
        inputs, _ = order.batch(step)
        for ids, found in zip(inputs.tolist(), order.position_ids(step).tolist(), strict=True):
            expected, position = [], 0
            for token in ids:  # the slow twin: looks at the tokens, not at the index
                expected.append(position)
                position = 0 if token == eos else position + 1
            assert found == expected
            restarts += expected.count(0) - 1
    assert restarts > 0


@pytest.mark.parametrize("placement", ["post", "peri"])
def test_with_document_masking_a_document_does_not_see_the_one_before_it(placement):
    torch.manual_seed(0)
    model = PeriLlamaForCausalLM(
        PeriLlamaConfig(**MODEL, vocab_size=61, initializer_range=0.4, norm_placement=placement)
    )
    model.eval()
    ids = torch.randint(0, 61, (2, 12))
    changed = ids.clone()
    changed[:, :5] = (changed[:, :5] + 1) % 61
    positions = torch.tensor([[*range(5), *range(7)]] * 2)
    with torch.no_grad():
        masked = [model(x, position_ids=positions, use_cache=False).logits[:, 5:] for x in (ids, changed)]
        plain = [model(x, use_cache=False).logits[:, 5:] for x in (ids, changed)]
        alone = model(ids[:, 5:], use_cache=False).logits
    assert torch.equal(*masked)
    assert not torch.allclose(*plain, atol=1e-3)
    torch.testing.assert_close(masked[0], alone, atol=1e-4, rtol=1e-4)


def test_too_little_text_for_one_sequence_is_said(prepared):
    with pytest.raises(UserError, match="fewer than one sequence of sequence_length"):
        FixedOrder(TokenData(prepared[1]), 10**7, 1, seed=1)
