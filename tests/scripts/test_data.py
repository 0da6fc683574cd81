"""Tokens on disk, and the fixed order in which they are read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from runkit.errors import UsageError, UserError
from scripts.data import FixedOrder, TokenData
from scripts.prepare_data import SPECIAL_TOKENS, prepare, train_tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("out") / "data"
    for i in range(40):
        (source / f"{i}.txt").write_text("".join(f"word{i * j % 97} " for j in range(200)) + "é漢字🙂")
    prepare(str(source), out, vocab_size=300, max_bytes=10**6, heldout_share=0.1, context=64)
    return source, out


def test_tokens_decode_to_the_documents_with_an_end_mark_each(prepared):
    data = TokenData(prepared[1])
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_path)
    start = 0
    for end in data.index["document_ends"]:
        ids = data.tokens[start:end].tolist()
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[:-1]
        assert tokenizer.decode(ids[:-1]).endswith("é漢字🙂")
        start = end
    assert start == len(data.tokens) == data.index["tokens"]


def test_data_that_is_there_is_kept_and_other_options_are_refused(prepared):
    source, out = prepared
    before = (out / "train.bin").stat().st_mtime_ns
    prepare(str(source), out, 300, 10**6, 0.1, 64)
    assert (out / "train.bin").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other options"):
        prepare(str(source), out, 310, 10**6, 0.1, 64)


def test_the_fingerprint_follows_the_text(prepared, tmp_path):
    source, out = prepared
    (tmp_path / "copy").mkdir()
    for file in source.iterdir():
        (tmp_path / "copy" / file.name).write_text(file.read_text())
    (tmp_path / "copy" / "0.txt").write_text("changed")
    other = prepare(str(tmp_path / "copy"), tmp_path / "data", 300, 10**6, 0.1, 64)
    assert other["fingerprint"] != TokenData(out).fingerprint


def test_any_text_survives_the_tokenizer():
    tokenizer = train_tokenizer(["some text to learn merges from, some text"], 270, 64)
    for text in ("héllo\x00 wörld\r\n\t", "漢字🙂", "  two  spaces 12345 "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(UsageError, match="vocab_size 256 is smaller than the 256 bytes and 5 special tokens"):
        train_tokenizer(["x"], 256, 64)


def test_a_cut_token_file_is_noticed(prepared, tmp_path):
    import shutil

    shutil.copytree(prepared[1], tmp_path / "data")
    with open(tmp_path / "data" / "train.bin", "rb+") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"train\.bin is missing or not \d+ bytes long"):
        TokenData(tmp_path / "data")
    with pytest.raises(UserError, match=r"no index\.json"):
        TokenData(tmp_path)


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


def test_too_little_text_for_one_sequence_is_said(prepared):
    with pytest.raises(UserError, match="fewer than one sequence of sequence_length"):
        FixedOrder(TokenData(prepared[1]), 10**7, 1, seed=1)
