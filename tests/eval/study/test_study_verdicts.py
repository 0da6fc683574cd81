"""From records to verdicts: what is supported and what is not, what is written, and that a changed record is found."""

import json

import pytest
from study_records import CLAIMS, make

from periln.eval.arguments.study import parse
from periln.eval.study import command
from periln.eval.study.page import effect
from periln.eval.study.tests import Results, half_rates, less
from periln.eval.study.verdicts import PartVerdict, _needed, judge
from periln.runkit.errors import UserError
from periln.runkit.recipes import read_yaml
from periln.runkit.studies import CELLS, best_rates


def verdicts_of(study) -> dict:
    results = study.results()
    found = judge(read_yaml(CLAIMS), Results(list(results.values()), best_rates(study.plan, results)))
    return {verdict.name: verdict for verdict in found}


@pytest.fixture
def study(tmp_path):
    return make(tmp_path / "study")


def test_every_claim_has_a_verdict_and_says_what_would_change_it(study):
    found = verdicts_of(study)
    assert list(found) == [f"C{n}" for n in range(1, 21)]
    assert found["C19"].verdict == "not testable here" and found["C19"].change
    assert found["C1"].verdict == "undecided" and "no run of it yet" in found["C1"].change
    assert found["C9"].verdict == "supported"
    assert all(verdict.change for verdict in found.values())


def test_a_rate_at_which_all_of_the_others_diverged_counts(study):
    lower = verdicts_of(study)["C10"].parts[0]
    assert lower.verdict == "supported" and lower.outcome.estimate.value < 0
    assert "rate 0.1: every run of pre diverged, none of the other's" in lower.outcome.details


def test_one_pair_of_which_one_run_diverged_decides_nothing(tmp_path):
    found = verdicts_of(make(tmp_path / "study", cells=9))["C10"].parts[0]
    assert found.outcome.details[-1].startswith("rate 0.1: every run of pre diverged")
    assert found.verdict == "undecided"


def test_the_best_rate_is_that_of_the_first_seed(study):
    assert best_rates(study.plan, study.results()) == {"post": 0.01, "pre": 0.01, "peri": 0.01}
    results = study.results()
    del results["e2_pre_rate-0.001_seed1"]
    assert best_rates(study.plan, results)["pre"] is None


def test_few_seeds_leave_it_undecided(tmp_path):
    found = verdicts_of(make(tmp_path / "study", cells=9))  # the first seed alone
    assert {found[name].verdict for name in ("C9", "C10")} == {"undecided"}
    assert "two pairs at least" in found["C9"].change


def test_pairs_that_diverged_are_not_called_missing(study):
    results = study.results()
    part = {"test": "less", "measure": "loss", "a": {"group": "E2", "variant": "peri", "rate": 0.01}}
    part |= {"b": part["a"] | {"variant": "pre"}}
    rows = [row for row in results.values() if row["group"] == "E2" and row["variant"] == "pre" and row["rate"] == 0.01]
    seeds, whole = len(rows), less(Results(list(results.values()), {}), part)
    assert (whole.estimate.n, whole.details) == (seeds, ())
    for row in rows[1:]:
        row |= {"status": "diverged", "heldout_loss": None}
    found = less(Results(list(results.values()), {}), part)
    words = f"{seeds - 1} of {seeds} runs of pre diverged: a pair with one has no difference"
    assert (found.estimate.n, found.details) == (1, (words,))
    rows[0] |= {"status": "diverged", "heldout_loss": None}
    found = less(Results(list(results.values()), {}), part)
    assert found.estimate.n == 0
    assert effect(PartVerdict("", "undecided", found, 1.0)).startswith(f"{seeds} of {seeds} runs of pre diverged")


def test_a_scan_that_was_not_run_is_not_said_to_have_diverged(study):
    rows = [row for row in study.results().values() if row["group"] == "E2" and row["variant"] == "peri"]
    found = half_rates(Results(rows, {}), {"a": {"variant": "peri"}, "b": {"variant": "pre"}})
    assert len(rows) > 3 and found.estimate.n == 0
    assert effect(PartVerdict("", "undecided", found, 1.0)) == "no runs yet" and _needed(found) == "no run of it yet"


def test_one_counterexample_contradicts_never(study, tmp_path):
    lines = (study.path / CELLS).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    next(row for row in rows if row["variant"] == "peri")["overflow"] = True
    (study.path / CELLS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert verdicts_of(study)["C11"].verdict == "contradicted"


def test_pairs_are_within_one_text(study):
    results = study.results()
    for row in results.values():
        row["data"] = row["variant"]  # each placement read another text
    found = judge(read_yaml(CLAIMS), Results(list(results.values()), best_rates(study.plan, results)))
    assert found[8].name == "C9" and found[8].parts[0].outcome.estimate.n == 0


def test_export_and_check(study, tmp_path, capsys):
    records = tmp_path / "records"
    command.main(parse(["export", str(study.path), "--records", str(records)]))
    assert {"plan.yaml", "claims.yaml", "frozen.json", "cells.jsonl", "verdicts.json", "verdicts.md"} <= {
        path.name for path in records.iterdir()
    }
    command.main(parse(["check", str(records)]))
    assert "20 verdicts from 45 cells, as they are stored" in capsys.readouterr().out
    text = (records / CELLS).read_text()
    changed = text.replace('"heldout_loss": 4.111', '"heldout_loss": 4.911')
    assert changed != text
    (records / CELLS).write_text(changed)
    with pytest.raises(UserError, match="C10: stored .*, recomputed"):
        command.main(parse(["check", str(records)]))


def test_the_records_keep_every_text_that_cells_read(study, tmp_path):
    records, index = tmp_path / "records", study.path / study.plan["data"]["path"] / "index.json"
    index.parent.mkdir(exist_ok=True)
    (mine,) = {json.loads(line)["data"] for line in (study.path / CELLS).read_text().splitlines()}
    (records / "data.json").parent.mkdir()
    (records / "data.json").write_text(json.dumps({"fingerprint": mine, "tokens": 7}))  # as it was for one text
    other = mine + "0"
    for expected in ([(mine, 7)], [(mine, 7), (other, 9)]):
        index.write_text(json.dumps({"tokens": 9, "fingerprint": other, "source": {"path": "/home/me"}}))
        command.main(parse(["export", str(study.path), "--records", str(records)]))
        texts = json.loads((records / "data.json").read_text())
        assert [(text["fingerprint"], text["tokens"]) for text in texts] == expected
        cells = (records / CELLS).read_text()  # one of them now comes from the second machine
        (records / CELLS).write_text(cells.replace(f'"data": "{mine}"', f'"data": "{other}"', 1))
    assert texts[1]["source"] == {}


def test_a_changed_plan_or_claim_is_refused(study):
    with open(study.path / "claims.yaml", "a") as file:
        file.write("# a threshold\n")
    with pytest.raises(UserError, match=r"claims\.yaml has changed since it was frozen"):
        command.main(parse(["report", str(study.path)]))


def test_the_report_is_one_page_with_its_figures(study):
    command.main(parse(["report", str(study.path)]))
    page = (study.path / "report.html").read_text()
    assert "data:image/png;base64" in page and 'class="supported"' in page and "45 of 45 cells" in page
    markdown = (study.path / "verdicts.md").read_text()
    assert "Peri-LN has the lowest mean held-out loss" in markdown and "0.001, 0.01, 0.1." in markdown
    assert "Diverged in E2: Post-LN 0 of 15, Pre-LN 5 of 15, Peri-LN 0 of 15." in markdown
    assert "| 0.1 |" in markdown and "5 of 5 diverged" in markdown
    before = page, markdown
    command.main(parse(["report", str(study.path)]))
    assert before == ((study.path / "report.html").read_text(), (study.path / "verdicts.md").read_text())
