"""Text: fixed order, no duplicates, a held-out split, and what was left out is counted."""

import gzip
import json

import pandas as pd
import pytest

from runkit.errors import UserError
from scripts.corpus import INSTALLED, read_corpus


def write_folder(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02d}.txt").write_text(f"document number {i}\nwith a second line")
    (tmp_path / "copy.txt").write_text("document number 3\nwith a second line\n")
    (tmp_path / "blank.txt").write_text(" \n")
    lines = [json.dumps({"text": f"record {i}"}) for i in range(5)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(b'{"text": "compressed record"}\n'))
    pd.DataFrame({"text": ["row a", "row b"]}).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


def names(documents):
    return [name for name, _ in documents]


def test_every_kind_of_file_is_read_once_in_one_order(tmp_path):
    corpus = read_corpus(str(write_folder(tmp_path)), max_bytes=10**6, heldout_share=0.2)
    again = read_corpus(str(tmp_path), max_bytes=10**6, heldout_share=0.2)
    assert (corpus.train, corpus.heldout) == (again.train, again.heldout)
    everything = set(names(corpus.train) + names(corpus.heldout))
    assert {"packed.jsonl.gz:0", "records.jsonl:4", "rows.parquet:1", "00.txt"} <= everything
    assert len(everything) == 30 + 5 + 1 + 2
    assert corpus.skipped == {"empty": ["blank.txt"], "duplicate": ["copy.txt"]}


def test_train_and_heldout_share_no_document_and_the_split_outlives_new_files(tmp_path):
    before = read_corpus(str(write_folder(tmp_path)), 10**6, 0.2)
    assert before.heldout
    assert not set(names(before.train)) & set(names(before.heldout))
    (tmp_path / "new.txt").write_text("a new document")
    after = read_corpus(str(tmp_path), 10**6, 0.2)
    assert set(names(before.heldout)) <= set(names(after.heldout))


def test_the_end_of_a_single_document_is_held_out(tmp_path):
    text = "\n".join(f"line {i}" for i in range(1000))
    (tmp_path / "all.txt").write_text(text)
    corpus = read_corpus(str(tmp_path / "all.txt"), 10**6, 0.02)
    (_, train), (_, heldout) = corpus.train[0], corpus.heldout[0]
    assert train + "\n" + heldout == text
    assert 0 < len(heldout) < 0.05 * len(text)


def test_no_more_text_is_read_than_asked_for(tmp_path):
    corpus = read_corpus(str(write_folder(tmp_path)), max_bytes=200, heldout_share=0.2)
    size = sum(len(text) for _, text in corpus.train + corpus.heldout)
    assert 200 <= size < 250


def test_the_installed_python_text_has_sources_and_documentation():
    corpus = read_corpus(INSTALLED, max_bytes=300_000, heldout_share=0.05)
    suffixes = {name.rsplit(".", 1)[-1] for name in names(corpus.train)}
    assert "py" in suffixes
    assert corpus.heldout
    assert sum(len(t.encode()) for _, t in corpus.train + corpus.heldout) >= 300_000


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, None, "no text found: .* has no .txt"),
        ("a.txt", b"  ", "no text found: every document"),
        ("a.txt", b"\xff\xfe\x00", r"cannot read .*a\.txt: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"body": 1}\n', r"a\.jsonl, line 2: no field 'text'"),
        ("a.jsonl", b"{\n", r"cannot read .*a\.jsonl"),
        ("a.parquet", b"no parquet", r"cannot read .*a\.parquet"),
    ],
)
def test_bad_text_is_one_sentence_with_the_path(tmp_path, file, content, message):
    if file:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_corpus(str(tmp_path), 10**6, 0.1)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_corpus(str(tmp_path / "nowhere"), 10**6, 0.1)
