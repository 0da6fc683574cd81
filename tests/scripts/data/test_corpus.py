"""Text: fixed order, no duplicates, a held-out split, and what was left out is counted."""

import gzip
import json
import random
import tracemalloc
from itertools import islice

import pandas as pd
import pyarrow as pa
import pytest

from periln.runkit.errors import UserError
from periln.scripts.data import corpus as corpus_module
from periln.scripts.data import readers
from periln.scripts.data.corpus import INSTALLED, Corpus, HashSet, Limits, Mark, SideFiles
from periln.scripts.data.sources import open_source

FIFTH = Limits(0.2)
JSONL = b'{"text": "compressed record"}\n'


def write_folder(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02d}.txt").write_text(f"document number {i}\nwith a second line")
    (tmp_path / "copy.txt").write_text("document number 3\nwith a second line\n")
    (tmp_path / "blank.txt").write_text(" \n")
    lines = [json.dumps({"text": f"record {i}"}) for i in range(5)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(JSONL, mtime=0))
    with pa.CompressedOutputStream(str(tmp_path / "dense.jsonl.zst"), "zstd") as file:
        file.write(b'{"text": "dense a"}\n\n{"text": "dense b"}')
    pd.DataFrame({"text": [f"row {i}" for i in range(9)]}).to_parquet(tmp_path / "rows.parquet", row_group_size=4)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


def read_all(source, folder, limits=FIFTH):
    """(training texts, held-out records, last mark) of a reading that writes its records into `folder`."""
    folder.mkdir(exist_ok=True)
    records = SideFiles(folder, {})
    batches = list(Corpus(open_source(str(source)), limits, records).batches())
    records.end(batches[-1].mark.lengths)
    heldout = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    return [text for batch in batches for text in batch.texts], heldout, batches[-1].mark


def listed(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    return tmp_path / "text"


def test_every_kind_of_file_is_read_once_in_one_order(tmp_path, text):
    train, heldout, mark = read_all(write_folder(text), tmp_path / "a")
    assert (train, heldout, mark) == read_all(text, tmp_path / "b")
    everything = set(train) | {record["text"] for record in heldout}
    assert {"compressed record", "dense a", "dense b", "record 4", "row 0", "row 8"} <= everything
    assert len(everything) == len(train) + len(heldout) == mark.documents == 30 + 5 + 1 + 2 + 9
    assert mark.skipped == {"empty": 1, "duplicate": 1}
    assert listed(tmp_path / "a") == [
        {"reason": "empty", "name": "blank.txt"},
        {"reason": "duplicate", "name": "copy.txt"},
    ]


def test_train_and_heldout_share_no_document_and_the_split_outlives_new_files(tmp_path, text):
    train, before, _ = read_all(write_folder(text), tmp_path / "a")
    assert before and not {record["text"] for record in before} & set(train)
    (text / "new.txt").write_text("a new document")
    _, after, _ = read_all(text, tmp_path / "b")
    assert {record["name"] for record in before} <= {record["name"] for record in after}


def test_no_more_documents_are_held_out_than_asked_for(tmp_path, text):
    _, heldout, mark = read_all(write_folder(text), tmp_path / "a", Limits(0.5, heldout_documents=3))
    assert len(heldout) == mark.heldout_documents == 3


def test_the_end_of_a_single_document_is_held_out(tmp_path, text):
    whole = "\n".join(f"line {i}" for i in range(1000))
    (text / "all.txt").write_text(whole)
    (train,), (heldout,), _ = read_all(text / "all.txt", tmp_path / "a", Limits(0.02))
    assert train + "\n" + heldout["text"] == whole
    assert 0 < len(heldout["text"]) < 0.05 * len(whole)


@pytest.mark.parametrize("share", [0.0001, 0.9999])
def test_where_chance_leaves_a_part_empty_the_last_document_is_held_out(tmp_path, text, share):
    train, heldout, _ = read_all(write_folder(text), tmp_path / "a", Limits(share))
    assert [record["name"] for record in heldout] == ["rows.parquet:8"]
    assert train[0] == "document number 0\nwith a second line" and train[-1] == "row 7"


def test_no_more_text_is_read_than_asked_for(tmp_path, text):
    train, heldout, mark = read_all(write_folder(text), tmp_path / "a", Limits(0.2, max_bytes=200))
    assert 200 <= sum(map(len, train)) + sum(len(record["text"]) for record in heldout) == mark.bytes < 250


@pytest.mark.slow
def test_the_installed_python_text_has_sources_and_documentation():
    source = open_source(INSTALLED)
    batches = list(Corpus(source, Limits(0.05, max_bytes=300_000)).batches())
    assert batches[-1].mark.heldout_documents and batches[-1].mark.bytes >= 300_000
    suffixes = {document.name.rsplit(".", 1)[-1] for document in islice(source.read(None), 99)}
    assert "py" in suffixes and suffixes & {"md", "rst", "txt"}


def test_what_cannot_be_a_document_is_counted_and_listed(tmp_path, text):
    lines = [
        b'{"text": "good"}',
        b"{broken",
        b'{"text": "\xff"}',
        b'{"text": "half a pair \\ud800"}',
        b'{"text": null}',
        b'{"body": "elsewhere"}',
        json.dumps({"text": "x" * 101}).encode(),
        b'{"text": "last"}',
    ]
    (text / "a.jsonl").write_bytes(b"\n".join(lines))
    (text / "b.txt").write_bytes(b"\xff\xfe\x00")
    train, heldout, mark = read_all(text, tmp_path / "a", Limits(0.1, max_document_bytes=100))
    assert {*train, heldout[0]["text"]} == {"good", "last"}
    assert mark.skipped == {"undecodable": 4, "no text": 2, "too long": 1}
    assert [record["name"] for record in listed(tmp_path / "a")] == [*(f"a.jsonl:{i}" for i in range(1, 7)), "b.txt"]


def test_endless_runs_are_named_and_counted_wherever_they_stand(tmp_path, text):
    runs = {
        "blanks": " " * 30_000 + "end",
        "letters": "x" * 20_001,
        "others": "a " + "=_" * 20_000,
        "digits": "1" * 99_999,
    }
    (text / "a.jsonl").write_text("".join(json.dumps({"text": f"start {run}"}) + "\n" for run in runs.values()))
    (text / "b.jsonl").write_text('{"text": "good"}\n{"text": "' + "y" * 20_000 + '"}\n')
    train, heldout, mark = read_all(text, tmp_path / "a")
    assert {*train, heldout[0]["text"]} == {"good", "y" * 20_000}
    assert mark.skipped == {"long run": 4}
    assert listed(tmp_path / "a") == [{"reason": "long run", "name": f"a.jsonl:{i}"} for i in range(4)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_document_that_is_too_long_is_passed_over_without_being_held(tmp_path, text, monkeypatch, name):
    monkeypatch.setattr(readers, "LONGEST", 5_000)
    monkeypatch.setattr(corpus_module, "LONGEST", 5_000)
    texts = ["first", "word " * 2_000, "é " * 1_500, "last"]
    lines = "".join(json.dumps({"text": one}, ensure_ascii=False) + "\n" for one in texts).encode()
    if name == "a.parquet":
        monkeypatch.setattr(readers, "LARGE_CHUNK", 5_000)
        pd.DataFrame({"text": texts}).to_parquet(text / name, row_group_size=3)
    elif name == "a.jsonl.zst":
        with pa.CompressedOutputStream(str(text / name), "zstd") as file:
            file.write(lines)
    else:
        (text / name).write_bytes(gzip.compress(lines, mtime=0) if name.endswith("gz") else lines)
    train, heldout, mark = read_all(text, tmp_path / "a")
    assert {*train, *(record["text"] for record in heldout)} == {"first", texts[2].strip(), "last"}
    assert mark.skipped == {"too long": 1} and listed(tmp_path / "a")[0]["name"] == f"{name}:1"
    source, positions = open_source(str(text)), []
    for _ in source.read(None):
        positions.append(source.position())
    assert [document.text for document in open_source(str(text)).read(positions[1])] == texts[2:]


def test_rows_of_a_large_chunk_are_read_one_by_one(text, monkeypatch):
    pd.DataFrame({"text": [f"row {i}" for i in range(9)]}).to_parquet(text / "a.parquet", row_group_size=4)
    expected = list(open_source(str(text)).read(None))
    asked, real = [], readers._values
    monkeypatch.setattr(readers, "LARGE_CHUNK", 10)
    monkeypatch.setattr(readers, "_values", lambda *args: asked.append(args[-1]) or real(*args))
    assert list(open_source(str(text)).read(None)) == expected and asked == [True] * 3


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.md", "notes"])
def test_a_byte_order_mark_is_not_text(tmp_path, name):
    content = b'{"text": "the text"}\n' if name == "a.jsonl" else b"the text"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert [document.text for document in open_source(str(tmp_path / name)).read(None)] == ["the text"]


def test_a_single_file_is_read_by_its_content_whatever_its_name(tmp_path):
    (tmp_path / "story.md").write_text("# A story\nof two lines é")
    (tmp_path / "records.json").write_text('\n{"text": "one"}\n{"text": "two"}\n')
    assert [d.text for d in open_source(str(tmp_path / "story.md")).read(None)] == ["# A story\nof two lines é"]
    assert [d.text for d in open_source(str(tmp_path / "records.json")).read(None)] == ["one", "two"]
    (tmp_path / "large.dat").write_text(json.dumps({"text": "word " * 40_000}) + "\n")
    assert [len(d.text) for d in open_source(str(tmp_path / "large.dat")).read(None)] == [200_000]
    (tmp_path / "short").write_text("x")
    assert [d.text for d in open_source(str(tmp_path / "short")).read(None)] == ["x"]
    (tmp_path / "list.json").write_text('[{"text": "one"}]')
    with pytest.raises(UserError, match=r"list\.json is not a JSON record a line"):
        open_source(str(tmp_path / "list.json"))
    for content in (b"\x89PNG\r\n\x1a\n", b"a\x00b", "text".encode("utf-16")):
        (tmp_path / "picture.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"picture\.bin is not plain text"):
            open_source(str(tmp_path / "picture.bin"))


def test_the_list_of_the_skipped_ends_but_their_count_does_not(tmp_path, text, monkeypatch):
    monkeypatch.setattr(corpus_module, "LISTED", 3)
    (text / "a.jsonl").write_text('{"text": "same"}\n' * 9 + '{"text": "other"}\n')
    _, _, mark = read_all(text, tmp_path / "a")
    assert mark.skipped == {"duplicate": 8} and len(listed(tmp_path / "a")) == 3


def test_a_long_text_file_is_cut_at_line_ends_and_nowhere_else(tmp_path, text, monkeypatch):
    monkeypatch.setattr(readers, "PIECE", 64)
    whole = "".join(f"é line {i}\n" for i in range(40)) + "x漢🙂é" * 40
    (text / "a.txt").write_text(whole)
    pieces = [document.text for document in open_source(str(text)).read(None)]
    assert "".join(pieces) == whole
    assert len(pieces) > 5 and all(len(piece.encode()) <= 64 for piece in pieces)
    assert all(piece.endswith("\n") for piece in pieces[:5])


def test_a_source_goes_on_after_any_document(text, monkeypatch):
    monkeypatch.setattr(readers, "PIECE", 16)  # so that some .txt are several documents
    write_folder(text)
    source = open_source(str(text))
    documents, positions = [], [None]
    for document in source.read(None):
        documents.append(document)
        positions.append(json.loads(json.dumps(source.position())))
    assert len(documents) > 60
    for number, position in enumerate(positions):
        assert list(open_source(str(text)).read(position)) == documents[number:]


def test_a_reading_goes_on_after_any_batch(tmp_path, text, monkeypatch):
    monkeypatch.setattr(corpus_module, "BATCH_DOCUMENTS", 4)
    write_folder(text)
    records = SideFiles(tmp_path, {})
    batches = list(Corpus(open_source(str(text)), Limits(0.05), records).batches())
    records.end(batches[-1].mark.lengths)
    assert len(batches) > 8
    assert not batches[0].mark.settled  # some marks are taken while a document waits for its part
    hashes = (tmp_path / "hashes.bin").read_bytes()
    for number, batch in enumerate(batches[:-1]):
        mark = Mark(**json.loads(json.dumps(vars(batch.mark))))
        seen = memoryview(hashes[: mark.lengths["hashes.bin"]]).cast("Q")
        rest = list(Corpus(open_source(str(text)), Limits(0.05), None, mark, seen).batches())
        assert [b.texts for b in rest] == [b.texts for b in batches[number + 1 :]]
        assert vars(rest[-1].mark) | {"lengths": 0} == vars(batches[-1].mark) | {"lengths": 0}


def test_a_large_file_is_never_in_memory(text):
    with open(text / "a.jsonl", "w") as file:
        for i in range(16_000):
            file.write(json.dumps({"text": f"{i} " * 200}) + "\n")
    tracemalloc.start()
    for batch in Corpus(open_source(str(text)), FIFTH).batches():
        del batch
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6 < (text / "a.jsonl").stat().st_size / 3


def test_the_table_of_hashes_is_a_set():
    random.seed(0)
    numbers = [random.choice((random.getrandbits(64), random.randrange(5000) << 12)) for _ in range(20_000)]
    table, reference = HashSet(), set()
    for number in [1, 2**64 - 1, *numbers]:
        assert table.add(number) is (number not in reference)
        reference.add(number)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, None, "no text found: .* has no .txt"),
        ("a.txt", b"  ", r"no text found: every document of the source was skipped \(1 empty\)"),
        ("a.txt", b"\xff\xfe\x00", r"was skipped \(1 undecodable\)"),
        ("a.jsonl", b'{"body": 1, "url": 2}\n', r"a\.jsonl, line 1: no field 'text' .*it has body, url"),
        ("a.jsonl.gz", gzip.compress(JSONL * 99, mtime=0)[:-20], r"cannot read .*a\.jsonl\.gz"),
        ("a.jsonl.zst", b"no zstd", r"cannot read .*a\.jsonl\.zst"),
        ("a.parquet", b"no parquet", r"cannot read .*a\.parquet"),
    ],
)
def test_bad_text_is_one_sentence_with_the_path(tmp_path, text, file, content, message):
    if file:
        (text / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_all(text, tmp_path / "a")


def test_a_column_that_is_not_there_or_is_not_text_is_named_with_those_there_are(text):
    pd.DataFrame({"body": ["x"], "n": [1]}).to_parquet(text / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'text' \(it has body, n\); --text-column names another"):
        next(open_source(str(text)).read(None))
    with pytest.raises(UserError, match="the column 'n' holds int64, not text"):
        next(open_source(str(text), "n").read(None))
    assert next(open_source(str(text), "body").read(None)).text == "x"


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"unknown source 'installed_python' \(did you mean 'installed-python'\?\)"):
        open_source("installed_python")
    with pytest.raises(UserError, match="revision belong to a source hf:..., not to installed-python"):
        open_source("installed-python", revision="v1")
