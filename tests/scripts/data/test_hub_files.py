"""A dataset's files of JSON lines and Parquet are read as local ones are; what is in them is what `datasets` reads."""

import gzip
import json

import pandas as pd
import pyarrow as pa
import pytest

from periln.runkit.errors import UserError
from periln.runkit.texts import UNDECODABLE
from periln.scripts.data import readers
from periln.scripts.data.documents import NO_TEXT, TOO_LONG
from periln.scripts.data.hub_dataset import HubDataset
from periln.scripts.data.sources import open_source

RECORDS = [{"url": f"u{n}", "text": f"é line {n}\nof {n * 7}" if n % 5 else None} for n in range(23)]


def write(folder, kind: str) -> None:
    for number, rows in enumerate((RECORDS[:9], RECORDS[9:10], RECORDS[10:])):
        lines = "".join(json.dumps(row, ensure_ascii=number > 0) + "\n" for row in rows).encode()
        file = folder / f"part-{number}.{kind}"
        if kind == "parquet":
            pd.DataFrame(rows).to_parquet(file, row_group_size=4)
        elif kind == "jsonl.zst":
            with pa.CompressedOutputStream(str(file), "zstd") as opened:
                opened.write(lines)
        else:
            file.write_bytes(gzip.compress(lines, mtime=0) if kind.endswith("gz") else lines)


@pytest.fixture(params=["jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "parquet"])
def dataset(request, tmp_path):
    (tmp_path / "web").mkdir()
    write(tmp_path / "web", request.param)
    return f"hf:{tmp_path / 'web'}"


def through_datasets(source: str, position=None) -> list:
    plain = open_source(source)
    plain._files = lambda: None
    return list(plain.read(position))


def test_they_are_the_documents_of_datasets_under_the_same_names(dataset):
    read = list(open_source(dataset).read(None))
    assert [document.text for document in read] == [record["text"] or "" for record in RECORDS]
    assert [document.problem for document in read] == [None if record["text"] else NO_TEXT for record in RECORDS]
    assert [document.name.rpartition(":")[2] for document in read] == [str(n) for n in range(23)]
    if not dataset.endswith("zst"):  # for which datasets needs another package
        assert read == through_datasets(dataset)


def test_reading_resumes_behind_any_document(dataset):
    source = open_source(dataset)
    documents, positions = [], [None]
    for document in source.read(None):
        documents.append(document)
        positions.append(json.loads(json.dumps(source.position())))
    for number, position in enumerate(positions):
        again = open_source(dataset)
        assert list(again.read(position)) == documents[number:]
        if number:
            assert position["count"] == number and "state" not in position
    resumed = open_source(dataset)
    next(resumed.read(positions[11]))
    assert resumed.position() == positions[12]


def test_work_that_an_earlier_version_began_is_continued_through_datasets(tmp_path):
    write(tmp_path, "jsonl")
    old = HubDataset(str(tmp_path), None, "train", None, "text")
    old._files = lambda: None
    stream = old.read(None)
    first = [next(stream) for _ in range(12)]
    position = json.loads(json.dumps(old.position()))
    assert position["state"] is not None
    new = open_source(f"hf:{tmp_path}")
    assert first + list(new.read(position)) == through_datasets(f"hf:{tmp_path}")
    assert new.position()["state"] is not None


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_a_record_above_the_limit_is_named_and_never_decoded(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(readers, "LONGEST", 5_000)
    monkeypatch.setattr(readers, "LARGE_CHUNK", 5_000)
    RECORDS[10]["text"], kept = "word " * 2_000, RECORDS[10]["text"]
    try:
        write(tmp_path, kind)
    finally:
        RECORDS[10]["text"] = kept
    read = list(open_source(f"hf:{tmp_path}").read(None))
    assert [d.name.rpartition(":")[2] for d in read if d.problem == TOO_LONG] == ["10"] and len(read) == 23


def test_a_line_that_is_not_json_is_named_too(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": \n{"text": "\xff"}\n{"text": "two"}\n')
    read = list(open_source(f"hf:{tmp_path}").read(None))
    assert [(d.text, d.problem) for d in read] == [
        ("one", None), ("", UNDECODABLE), ("", UNDECODABLE), ("two", None)
    ]  # fmt: skip


def test_other_files_are_read_by_datasets(tmp_path):
    for name, content in {
        "csv/a.csv": "url,text\nu,one\nv,two\n",
        "array/a.json": json.dumps([{"text": "one"}, {"text": "two"}], indent=1),
        "lines/a.txt": "one\ntwo\n",
    }.items():
        file = tmp_path / name
        file.parent.mkdir()
        file.write_text(content)
        source = open_source(f"hf:{file.parent}")
        assert [document.text for document in source.read(None)] == ["one", "two"], name
        assert "state" in source.position()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_is_wrong_is_one_sentence(tmp_path, kind):
    write(tmp_path, kind)
    where = f"hf:{tmp_path}"
    with pytest.raises(UserError, match=r"has no column 'body' \(it has url, text\); --text-column names another"):
        list(open_source(where, "body").read(None))
    with pytest.raises(UserError, match="cannot read the dataset .*validation"):
        list(open_source(where, split="validation").read(None))
    with pytest.raises(UserError, match="cannot read the dataset .*extra"):
        list(open_source(where, config="extra").read(None))
    pd.DataFrame({"text": [1, 2]}).to_parquet(tmp_path / "part-0.parquet")
    (tmp_path / "part-1.parquet").unlink(missing_ok=True)
    (tmp_path / "part-2.parquet").unlink(missing_ok=True)
    if kind == "parquet":
        with pytest.raises(UserError, match="the column 'text' holds int64, not text"):
            list(open_source(where).read(None))
