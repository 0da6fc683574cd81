"""Prepared data are those of a text and a tokenizer, wherever these lie."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import make_data

from periln.runkit.errors import UserError
from periln.runkit.folder import read_json, write_json
from periln.scripts.data.same_data import check_same_source
from periln.scripts.prepare_data import prepare

HOW = {"vocab_size": 300, "max_bytes": 10**6, "heldout_share": 0.05, "context": 128}


@pytest.fixture
def made(tmp_path) -> Path:
    return make_data(tmp_path)


def test_a_moved_text_is_the_same_and_the_data_stay(made, tmp_path, monkeypatch, capsys):
    stood = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    shutil.move(tmp_path / "text", tmp_path / "archive")
    monkeypatch.chdir(tmp_path)
    index = prepare("archive/", made, **HOW)
    assert index == read_json(made / "index.json") and {p: p.stat().st_mtime_ns for p in made.rglob("*")} == stood
    assert "(only the place differs)" in capsys.readouterr().out
    check_same_source(made, "archive")
    again = prepare("archive", tmp_path / "again", **HOW)
    assert again["fingerprint"] == index["fingerprint"]  # what the data are, not where the text was


@pytest.mark.parametrize("change", ["content", "name", "more"])
def test_another_text_is_refused_wherever_it_lies(made, tmp_path, change):
    other = Path(shutil.copytree(tmp_path / "text", tmp_path / "other"))
    if change == "content":  # of the same size
        (other / "7.txt").write_text((other / "7.txt").read_text().replace("the", "teh"))
    elif change == "name":
        (other / "7.txt").rename(other / "seven.txt")
    else:
        (other / "more.txt").write_text("more")
    for refused in (lambda: prepare(str(other), made, **HOW), lambda: check_same_source(made, str(other))):
        with pytest.raises(UserError, match=r"holds data of another source: the files of .*other are not those of"):
            refused()
    with pytest.raises(UserError, match=r"holds data of another source \(.*text, not installed-python\)"):
        prepare("installed-python", made, **HOW)
    with pytest.raises(UserError, match=r"of other options \(heldout_share: 0\.05 -> 0\.1\)"):
        prepare(str(tmp_path / "text"), made, **HOW | {"heldout_share": 0.1})


def test_a_moved_tokenizer_is_the_same_and_another_is_refused(made, tmp_path):
    tokenizer = Path(shutil.copytree(made / "tokenizer", tmp_path / "tokenizer"))
    text, out = str(tmp_path / "text"), tmp_path / "out"
    index = prepare(text, out, heldout_share=0.05, tokenizer=str(tokenizer))
    moved = Path(shutil.move(tokenizer, tmp_path / "moved"))
    assert prepare(text, out, heldout_share=0.05, tokenizer=str(moved)) == index
    config = moved / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 77}))
    with pytest.raises(UserError, match="holds data of another tokenizer: the files of .*moved are not those of"):
        prepare(text, out, heldout_share=0.05, tokenizer=str(moved))


def test_data_of_an_older_version_stay_where_their_text_is_and_are_refused_elsewhere(made, tmp_path):
    index = read_json(made / "index.json")
    del index["options"]["shard_tokens"], index["source"]["source_sha256"]
    write_json(made / "index.json", index)
    assert prepare(str(tmp_path / "text"), made, **HOW) == index
    shutil.copytree(tmp_path / "text", tmp_path / "copy")
    with pytest.raises(UserError, match="keeps no hash to tell whether .*copy is the same"):
        prepare(str(tmp_path / "copy"), made, **HOW)


def test_a_refused_preparation_leaves_nothing_and_the_corrected_one_runs(made, tmp_path):
    before = sorted(tmp_path.iterdir())
    for wrong in ({"tokenizer": str(tmp_path / "nowhere" / "x")}, {"max_bytes": 0}):
        with pytest.raises(UserError):
            prepare(str(tmp_path / "text"), tmp_path / "new", heldout_share=0.05, **wrong)
    with pytest.raises(UserError, match="no text found"):
        prepare(str(tmp_path / "nowhere"), tmp_path / "new", **HOW)
    assert sorted(tmp_path.iterdir()) == before
    assert prepare(str(tmp_path / "text"), tmp_path / "new", **HOW)["tokens"] > 0
