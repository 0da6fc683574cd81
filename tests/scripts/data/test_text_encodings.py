"""Files as they come from elsewhere: line ends, marks and encodings of other systems, and how zstd files are made."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from periln.runkit.errors import UserError
from periln.runkit.texts import UNDECODABLE
from periln.scripts.data.sources import open_source

TEXTS = ["one\u2028line\u2029and \x85 no more", "zwei Äpfel\r\nund drei", "三つ 🙂"]
LINES = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in TEXTS]


def zstd(data: bytes) -> bytes:
    """One frame."""
    return pa.compress(data, codec="zstd", asbytes=True)


def read(path: Path) -> list[tuple[str, str | None]]:
    """(text, why it is left out) of every document."""
    return [(document.text, document.problem) for document in open_source(str(path)).read(None)]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_records_are_split_at_line_ends_alone(tmp_path, mark, end):
    """U+2028, U+2029 and U+0085, which `str.splitlines` takes for line ends, stand inside of records."""
    (tmp_path / "a.jsonl").write_bytes(mark + end.join(LINES) + end)
    assert read(tmp_path) == [(text, None) for text in TEXTS]


def test_a_text_keeps_its_line_ends_and_separators(tmp_path):
    text = "\r\n".join(TEXTS)
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read(tmp_path) == [(text, None)]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_another_encoding_is_counted_as_such_and_not_guessed_at(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("zwei Äpfel".encode(encoding))
    (tmp_path / "b.jsonl").write_bytes(LINES[0] + b"\n" + '{"text": "Äpfel"}'.encode(encoding) + b"\n" + LINES[2])
    found = read(tmp_path)
    assert found[0] == ("", UNDECODABLE)
    assert [text for text, why in found if why is None] == [TEXTS[0], TEXTS[2]]


def test_all_frames_of_a_zstd_file_are_read(tmp_path):
    """As `zstd a b` and parallel writers make them; a frame may end within a record."""
    whole = b"\n".join(LINES)
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstd(whole[i : i + 25]) for i in range(0, len(whole), 25)))
    assert read(tmp_path) == [(text, None) for text in TEXTS]


def test_a_truncated_zstd_file_is_an_error_and_not_an_end(tmp_path):
    file = tmp_path / "a.jsonl.zst"
    whole = zstd(b"\n".join(LINES * 50)) + zstd(b"\n" + LINES[0])
    for cut in (3, 40):
        file.write_bytes(whole[:-cut])
        with pytest.raises(UserError, match=r"cannot read .*a\.jsonl\.zst"):
            read(file)
