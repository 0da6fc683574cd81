"""What may leave the machine: paths are cut, and tokens and local places are found wherever they stand."""

from pathlib import Path

import pytest

from periln.runkit import public as module
from periln.runkit.public import found_in, local_roots, path_in, public, secrets


@pytest.mark.parametrize(
    ("value", "cleaned"),
    [
        ("/home/me/data/tokens", "…/tokens"),
        ("~/data/x", "…/x"),
        ("C:\\Users\\me\\x", "…/x"),
        ("loaded from /srv/a/b.json today", "loaded from …/b.json today"),
        ("https://hub.example/a/b", "https://hub.example/a/b"),
        ("runs/demo/x", "runs/demo/x"),
        ("file:///home/me/x.json", "…/x.json"),
        ("PATH=/usr/bin:/home/me/bin", "PATH=…/bin"),
        ("the largest |x| of the stream", "the largest |x| of the stream"),
        ("in a table \\|x\\| is so", "in a table \\|x\\| is so"),
        ("1/sqrt(2L)", "1/sqrt(2L)"),
    ],
)
def test_absolute_paths_are_cut_and_nothing_else(value, cleaned):
    assert public(value) == cleaned
    assert public({value: [value, 1, None]}) == {cleaned: [cleaned, 1, None]}
    assert path_in(cleaned) is None


def test_a_token_or_a_place_is_found_across_the_blocks_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 16)
    file = tmp_path / "weights"
    for offset in range(40):
        file.write_bytes(b"." * offset + b"secret-token" + b"." * 40)
        assert found_in(file, [], ["secret-token"]) == "an access token"
    file.write_bytes(b"." * 100)
    assert found_in(file, ["/place"], ["secret-token"]) is None
    file.write_bytes(b"." * 13 + b"/some/place" + b"." * 100)
    assert found_in(file, ["/some/place"], []) == "the local path /some/place"


def test_what_looks_like_a_token_is_found_without_being_known():
    assert found_in(b"x hf_" + b"a1B2" * 9, [], []) == "what looks like an access token"
    assert found_in(b"x hf_short", [], []) is None


def test_tokens_of_the_environment_are_known(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_from_environment")
    assert secrets("given-one", None) == ["given-one", "hf_from_environment"]


def test_a_home_of_one_name_matches_no_other_word(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/root"))
    assert "/root/" in local_roots() and "/root" not in local_roots()
