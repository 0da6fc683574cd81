"""One row a benchmark task: suites, chance, the harness's folders and the cards' data sets all come from it."""

from pathlib import Path

import lm_eval.tasks
import pytest

from periln.eval.scoring.harness import FOLDERS, MINI_FOLDER
from periln.runkit.tasks import CHANCE, SUITES, TASKS


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_row_names_what_is_there(task):
    folder = Path(lm_eval.tasks.__file__).parent / task.folder
    assert any(f"task: {task.name}\n" in file.read_text() for file in folder.rglob("*.yaml"))
    assert FOLDERS[task.name] == task.folder
    assert f"task: {task.mini}\n" in (MINI_FOLDER / f"{task.mini}.yaml").read_text()
    assert (MINI_FOLDER / f"{task.mini}.jsonl").exists()


def test_suites_and_chance_follow_the_rows():
    assert SUITES["hub"] == tuple(task.name for task in TASKS) and len(SUITES["mini"]) == len(CHANCE) == len(TASKS)
