"""The source `installed`: which files are documents, what a near duplicate is, and what the index records."""

import gzip

import pytest

from periln.runkit.errors import UserError
from periln.runkit.folder import read_json
from periln.scripts.data import machine_text
from periln.scripts.data.machine_text import InstalledText, SeenLines, list_files, read_file
from periln.scripts.prepare_data import prepare


def text(start: int, lines: int = 20) -> str:
    return "\n".join(f"line number {number} says something of its own" for number in range(start, start + lines))


def test_a_document_is_a_near_duplicate_from_seventy_percent_of_its_lines():
    seen = SeenLines()
    assert seen.add(text(0))
    assert not seen.add(text(6))  # 14 of 20 are known
    assert seen.add(text(7))  # 13 of 20: the lines of the one left out were not entered
    assert not seen.add(text(0) + "\n" + text(0))  # distinct lines count


def test_short_lines_and_short_documents_are_no_evidence():
    seen = SeenLines()
    short = "\n".join(f"x = {n}" for n in range(100))
    assert seen.add(short) and seen.add(short)
    assert seen.add(text(0, 7)) and seen.add(text(0, 7))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A small machine: a library, packages with a copy of a file, and documentation."""
    library, packages, docs = (tmp_path / name for name in ("lib", "site-packages", "doc"))
    files = {
        library / "a.py": text(0),
        library / "site-packages" / "hidden.py": text(900),
        packages / "one" / "b.py": text(100, 200),
        packages / "one" / "LICENSE.txt": text(2000),
        packages / "two" / "copy.py": text(100, 200),
        packages / "two" / "data.json": text(500),
        docs / "book" / "html" / "en-US" / "x.html": f"<head>no</head><p>{text(300)} &lt;b&gt;</p>",
        docs / "book" / "html" / "de-DE" / "x.html": f"<p>{text(400)}</p>",
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (docs / "kernel").mkdir()
    (docs / "kernel" / "y.rst.gz").write_bytes(gzip.compress(text(600).encode()))
    roots = [("python-library", library), ("python-packages", packages), ("documentation", docs)]
    monkeypatch.setattr(machine_text, "_roots", lambda: roots)
    return tmp_path


def test_the_files_of_a_machine(machine):
    assert {name for name, _ in list_files()} == {
        "python-library/a.py",
        "python-packages/one/b.py",
        "python-packages/two/copy.py",
        "documentation/book/html/en-US/x.html",
        "documentation/kernel/y.rst.gz",
    }
    page = dict(list_files())["documentation/book/html/en-US/x.html"]
    assert read_file("x", page).text.strip() == text(300) + " <b>"


def test_the_index_names_the_rule_and_the_mixture(machine):
    index = prepare("installed", machine / "data", vocab_size=300, heldout_share=0.3)
    source = read_json(machine / "data" / "index.json")["source"]
    assert index["documents"] + index["heldout_documents"] == 5 - source["near_duplicates"]
    assert source["near_duplicates"] == 1 and "70%" in source["rule"]
    assert set(source["mixture"]) == {
        "python-library",
        "python-packages",
        "documentation/book",
        "documentation/kernel",
    }
    assert source["mixture"]["python-packages"] == {"documents": 1, "bytes": len(text(100, 200))}


def test_another_reading_finds_the_same(machine):
    first, second = InstalledText(), InstalledText()
    assert first.pin(None) == second.pin(None)
    assert [d.name for d in first.read(None)] == [d.name for d in second.read(None)]
    pinned = first.pin(None)
    (machine / "lib" / "a.py").write_text("changed\n" * 3)
    with pytest.raises(UserError, match="changed since its preparation began"):
        InstalledText().pin(pinned)
