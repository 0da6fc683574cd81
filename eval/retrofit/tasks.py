"""The five tasks, asked of the source and of what became of it, with the same settings."""

import tempfile
from pathlib import Path
from typing import Any

from periln.eval.arguments.shared import SCORINGS, task_names
from periln.eval.scoring.harness import Benchmarks, Settings
from periln.eval.targets import Target, find_target
from periln.runkit.errors import UsageError


class Tasks:
    """Tasks of lm-eval for the models of a report; their data are loaded at once, before anything is measured.

    Scores are the harness's in FP32, with the common beginning of a question's answers computed once (log-likelihoods
    within 1e-4 of the plain way's).

    Raises:
        UsageError: an unknown task, a model without a tokenizer or one that diverged.
        UserError: a data set that is not available.
    """

    def __init__(self, tasks: str, limit: float | None, models: list[str], out: Path):
        self._targets = {model: _target(model, out) for model in models}
        self._benchmarks = Benchmarks(task_names(tasks), Settings(limit=limit, dtype="float32", scoring=SCORINGS[1]))
        self._benchmarks.load()

    def of(self, model: str) -> list[dict[str, Any]]:
        """A row a task and metric: task, metric, value, stderr, n."""
        with tempfile.TemporaryDirectory() as folder:
            return self._benchmarks.score(self._targets[model], Path(folder) / "scores.json")["results"]


def _target(model: str, out: Path) -> Target:
    target = find_target(model, out=out)
    if target is None:
        raise UsageError(f"{model} diverged: it is not asked")
    return target
