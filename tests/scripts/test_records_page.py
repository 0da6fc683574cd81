"""docs/reference/run-folder.md says what every key of a run's records is."""

import re

import pandas as pd
import pytest
from tiny import ROOT, train

from periln.runkit.folder import STATUSES, RunFolder, read_json
from periln.runkit.steps import STEP_FIELDS

PAGE = (ROOT / "docs" / "reference" / "run-folder.md").read_text()
SAID = set(re.findall(r"`([^`\n]+)`", PAGE))
CODE = {".py"}  # the family's code, which a checkpoint carries


def unsaid(run: RunFolder) -> set[str]:
    """What a run folder holds and the page does not name."""
    rows = pd.concat(pd.read_parquet(file) for file in (run.path / "layers").glob("*.parquet"))
    found = {*read_json(run.path / "environment.json"), *run.summary, *rows.columns, *rows["stat"], *rows["sublayer"]}
    found |= {key for record in run.metrics() for key in record} - set(STEP_FIELDS)  # those are generated
    tensors = {f"`{name}`" for name in rows["tensor"] if f"`{name}`" not in PAGE}
    files = {p.name for p in run.checkpoints()[-1].rglob("*") if p.is_file() and p.suffix not in CODE}
    return {name for name in found if name not in SAID} | tensors | {name for name in files if name not in SAID}


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_every_key_of_a_runs_records_is_on_the_page(data, tmp_path):
    run = train(tmp_path, data, heldout_every=3)
    assert not unsaid(run)


def test_every_status_is_on_the_page():
    assert set(STATUSES) <= SAID
