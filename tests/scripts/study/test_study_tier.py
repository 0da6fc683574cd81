"""The smallest study, whole: `make test-slow`. Twenty minutes of two cores."""

import pytest
from tiny import run

from periln.runkit.folder import read_json
from periln.runkit.studies import Study


@pytest.mark.slow
@pytest.mark.kills
def test_a_study_of_twenty_minutes_gives_every_claim_a_verdict(tmp_path):
    study, records = tmp_path / "study", tmp_path / "records"
    for words in (["plan", "--budget", "20m"], ["run"], ["report"], ["export", "--records", records]):
        done = run("scripts.study", words[0], "--out", study, *words[1:])
        assert done.returncode == 0, done.stderr
    assert run("scripts.study", "check", "--out", records).returncode == 0
    results = Study(records).results()
    assert results.keys() == {cell["name"] for cell in Study(records).cells}
    assert all(cell["status"] == "diverged" or cell["heldout_loss"] > 0 for cell in results.values())
    assert all(cell["inside"]["angular"] for cell in results.values() if "inside" in cell)
    scored = [cell for cell in results.values() if cell["group"] == "E5" and cell["status"] == "completed"]
    assert scored and all(cell["gold_bits_per_byte"]["mean"] > 0 for cell in scored)
    assert len(read_json(records / "verdicts.json")) == 20
