"""A study's run: cells that records have are left out, one that was stopped resumes exactly, results are read back."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from study_records import make
from tiny import ROOT, called, command, run, timeless

from periln.runkit.folder import read_json
from periln.runkit.studies import CELLS, Study
from periln.scripts.prepare_data import prepare

pytestmark = pytest.mark.slow
LAST = "e2_peri_rate-0.1_seed5"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A study of one cell that is not in its records, and its text."""
    folder = tmp_path_factory.mktemp("study")
    make(folder, cells=-1)
    prepare("installed-python", folder / "data", vocab_size=300, max_bytes=200_000, context=64)
    return folder


def asked(study: Path, *more: object) -> list[object]:
    return ["run", "--out", study, "--workers", 1, "--nice", 0, *more]


def study_of(prepared: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("plan.yaml", "claims.yaml", "frozen.json", "data"):
        (folder / name).symlink_to(prepared / name)
    return folder


def test_cells_of_the_records_are_done_and_a_stopped_one_resumes_exactly(prepared, tmp_path):
    whole, stopped = study_of(prepared, tmp_path / "whole"), study_of(prepared, tmp_path / "stopped")
    done = called("scripts.study", *asked(whole, "--records", prepared))
    assert done.returncode == 0, done.stderr
    assert "44 of 45 cells are done" in done.stdout and f"[45 of 45] {LAST}: completed" in done.stdout
    assert [path.name for path in (whole / "cells").iterdir()] == [LAST]
    session = json.loads((whole / "sessions.jsonl").read_text())
    assert len(session["commit"]) == 40 and session["uncommitted_changes"] in (True, False)

    metrics = stopped / "cells" / LAST / "metrics.jsonl"
    words = command("scripts.study", *asked(stopped, "--records", prepared))
    child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    while child.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 4):
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 143
    again = run("scripts.study", *asked(stopped, "--records", prepared))
    assert again.returncode == 0, again.stderr
    assert timeless(whole / "cells" / LAST) == timeless(stopped / "cells" / LAST)
    first, second = (read_json(folder / "cells" / LAST / "cell.json") for folder in (whole, stopped))
    for name in ("seconds", "commit", "uncommitted_changes"):  # a clock's, and the working tree's
        assert first.pop(name) is not None and second.pop(name) is not None
    assert first == second

    # The records and the new cell together are the study, and go on as records.
    out = tmp_path / "records"
    for source in (prepared, whole):
        done = run("scripts.study", "export", "--out", source, "--records", out)
        assert done.returncode == 0, done.stderr
    assert len((out / CELLS).read_text().splitlines()) == 45
    assert run("scripts.study", "check", "--out", out).returncode == 0
    assert set(Study(out).results()) == {cell["name"] for cell in Study(out).cells}


def test_records_of_another_plan_are_refused(prepared, tmp_path):
    study = study_of(prepared, tmp_path / "study")
    other = tmp_path / "other"
    other.mkdir()
    (other / "frozen.json").write_text('{"plan.yaml": "1", "claims.yaml": "2"}')
    done = called("scripts.study", "run", "--out", study, "--records", other)
    assert done.returncode == 1 and "holds records of another study: its plan.yaml differs" in done.stderr
