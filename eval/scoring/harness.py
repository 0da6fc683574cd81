"""Tasks of lm-evaluation-harness through its Python API, and their results as records for eval/*.json.

The harness's own tasks run unmodified, on the real data; so do our own small items in five of their schemas
(`mini_*`), which never carry the benchmarks' names.
"""

import hashlib
import io
import json
import logging
import math
import random
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from periln.eval.arguments.shared import SCORINGS, check_limit
from periln.eval.scoring import gold
from periln.eval.scoring.own_tasks import OwnTasks
from periln.eval.targets import Target
from periln.runkit.encoding import before_text
from periln.runkit.errors import UsageError, UserError, did_you_mean
from periln.runkit.folder import read_json, weights_hash, write_json
from periln.runkit.hub import hub_reason, quiet_hub
from periln.runkit.process import need_device
from periln.runkit.tasks import SUITES, TASKS

MINI_FOLDER = Path(__file__).parents[1] / "tasks"
# Where the harness keeps the tasks that this project names: listing all of its 15,000 takes ten seconds.
FOLDERS = {
    **{task.name: task.folder for task in TASKS},
    **{"openbookqa": "openbookqa", "commonsense_qa": "commonsense_qa", "rte": "glue", "mnli": "glue"},
}
PLAIN, SHARED = SCORINGS
SEED = 1234  # the harness's own default, also for the examples before an item


@dataclass(frozen=True)
class Settings:
    """What decides a score besides weights and task.

    `batch_size` is a number or `auto`. `scoring`: `plain`, log-likelihoods that are lm_eval's bit for bit, or `shared`,
    which computes the common beginning of a question's answers once (see `shared.py`).
    """

    num_fewshot: int = 0
    limit: float | None = None
    batch_size: int | str = 16
    dtype: str = "auto"
    device: str = "cpu"
    scoring: str = PLAIN

    def check(self) -> None:
        """Raise UsageError for a value that cannot be; names it."""
        check_limit(self.limit)
        if self.num_fewshot < 0:
            raise UsageError(f"num_fewshot must be at least 0, not {self.num_fewshot}")
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise UsageError(f"batch size must be at least 1, or auto, not {self.batch_size}")
        need_device(self.device, f"--device {self.device}")

    def recorded(self) -> dict[str, Any]:
        """The keys of a record that hold them; `dtype` is recorded as resolved."""
        return {
            "num_fewshot": self.num_fewshot,
            "limit": int(self.limit) if self.limit is not None and self.limit >= 1 else self.limit,
            "batch_size": self.batch_size,
            "dtype_asked": self.dtype,
            "device": self.device,
            "scoring": self.scoring,
            "harness": {"name": "lm-eval", "version": metadata.version("lm-eval")},
        }


class Benchmarks:
    """Tasks of the harness (or groups of them), loaded once and used for every checkpoint.

    `include` are folders with the user's own tasks.

    Raises:
        UsageError: see `Settings.check` and `OwnTasks`.
    """

    def __init__(self, tasks: Sequence[str], settings: Settings, include: Sequence[Path] = ()):
        settings.check()
        self.tasks, self.settings = tuple(dict.fromkeys(tasks)), settings
        self.own = OwnTasks(include, [*FOLDERS, *SUITES["mini"]])
        self.definitions = {name: self.own.definition(name) for name in self.tasks if name in self.own}
        self._loaded: dict[str, dict[str, Any]] = {}

    def load(self) -> None:
        """Find the tasks and load their data; otherwise this happens when a score is first asked for.

        Raises:
            UsageError: an unknown task; with the nearest name.
            UserError: a data set that is not available; one sentence that says why.
        """
        if not self._loaded:
            logging.getLogger("lm_eval").setLevel(logging.ERROR)
            quiet_hub()
            manager = _manager_of(self.tasks, self.own)
            self._loaded = {name: self._load(manager, name) for name in self.tasks}

    def _load(self, manager: Any, name: str) -> dict[str, Any]:
        try:
            loaded = manager.load(name)
        except Exception as error:  # datasets and the Hub raise a dozen kinds; the user needs one sentence
            raise UserError(f"the data set of {name} cannot be loaded: {hub_reason(error)}") from error
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") != 0:  # the harness's rule: a 0 in a task's own file is not overruled
                task.set_config(key="num_fewshot", value=self.settings.num_fewshot)
            task.set_fewshot_seed(seed=SEED)
        return loaded

    def loaded(self, name: str) -> list[Any]:
        """The harness's tasks of that name: one, or those of a group."""
        self.load()
        return list(self._loaded[name]["tasks"].values())

    def run(self, name: str, lm: Any, target: Target, log_samples: bool = False) -> dict[str, Any]:
        """The harness's answer for one task: what its command line gives for this task alone."""
        from lm_eval.evaluator import evaluate

        self.load()
        random.seed(0)  # as the command line does
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        # The mini tasks take seconds, and the harness's own progress bars would bury ours; on the real ones, which
        # take hours on a large model, they are useful.
        with redirect_stderr(io.StringIO()) if name in SUITES["mini"] else nullcontext():
            try:
                answer = evaluate(lm=lm, task_dict=self._loaded[name], limit=self.settings.limit, log_samples=True)
                answer["gold"] = self._gold(name, answer["samples"])
                if not log_samples:
                    del answer["samples"]
                return answer
            except AssertionError as error:  # all that the harness raises for an item that does not fit
                raise UserError(
                    f"{target.name}: lm-eval refuses an item of {name}; an answer is probably longer than the model's "
                    f"{lm.max_length} positions in its tokenizer's tokens"
                ) from error
            except FloatingPointError as error:
                raise UserError(f"{target.name}, {name}: {error}; its scores would mean nothing") from error

    def _gold(self, name: str, samples: dict[str, Any]) -> list[dict[str, Any]]:
        """Bits a byte of the right answers, a row for each of the harness's tasks that have them."""
        tasks = self._loaded[name]["tasks"]
        found = (gold.row(task, gold.bits_per_byte(tasks[task], of)) for task, of in samples.items() if task in tasks)
        return [row for row in found if row is not None]

    def load_model(self, target: Target) -> Any:
        """The target in the form that the harness expects."""
        from periln.eval.scoring.likelihood import ContinuationLM
        from periln.eval.scoring.shared import SharedPrefixLM

        settings = self.settings
        model, tokenizer = target.load(settings.device, settings.dtype)
        before = before_text(tokenizer)
        kind = SharedPrefixLM if settings.scoring == SHARED else ContinuationLM
        return kind(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=settings.batch_size,
            device=settings.device,
            prefix_token_id=before[-1] if before else None,
        )

    def _head(self, target: Target) -> dict[str, Any]:
        return {"evaluated": target.evaluated()} | self.settings.recorded()

    def lacking(self, target: Target, file: Path, again: bool = False) -> list[str]:
        """The tasks without a result in `file` for these weights and settings; `again`: all of them."""
        record = None if again else _matching(file, self._head(target))
        return [name for name in self.tasks if record is None or not self.is_scored(record, name)]

    def is_scored(self, record: dict[str, Any], name: str) -> bool:
        """Whether a record has the task's result; for one of the user's own tasks, by its present definition."""
        old = (record.get("own_tasks") or {}).get(name) or {}
        return name in record["tasks"] and old.get("sha256") == (self.definitions.get(name) or {}).get("sha256")

    def is_free(self, target: Target, file: Path) -> bool:
        """Whether `file` is missing, or holds results for these weights and settings."""
        return not file.exists() or _matching(file, self._head(target)) is not None

    def score(self, target: Target, file: Path, again: bool = False, done: Any = None) -> dict[str, Any]:
        """Score the target on every task that is `lacking`, and write it.

        The file is written after each task, so that a stop costs one task at most. Results of other tasks stay in it;
        those for other weights or settings are replaced. `done` is called after each task.
        """
        head, missing, lm = self._head(target), self.lacking(target, file, again), None
        record = _matching(file, head)
        for name in self.tasks:
            if name in missing:
                lm = lm or self.load_model(target)
                record = head | self._joined(record or {}, name, self.run(name, lm, target), lm)
                write_json(file, record)
            if done is not None:
                done()
        return record

    def _joined(self, old: dict[str, Any], name: str, answer: dict[str, Any], lm: Any) -> dict[str, Any]:
        """What a record holds besides its head, with the answer of one more task."""
        new, own = _results(answer), dict(old.get("own_tasks", {}))
        known = {row["task"] for row in new}
        replaced = known | set(own.pop(name, {}).get("tasks", []))  # a definition may have had others in it
        kept = [row for row in old.get("results", []) if row["task"] not in replaced]
        if name in self.definitions:
            own[name] = {**self.definitions[name], "tasks": sorted(known)}
        scored = [*(task for task in old.get("tasks", []) if task != name), name]
        sizes, why = old.get("batch_sizes", {}), getattr(lm, "why_not", None)
        plainly: dict[str, str] = {k: v for k, v in old.get("scored_plainly", {}).items() if k != name}
        if why:
            plainly[name] = why
        if self.settings.batch_size == "auto":
            sizes = sizes | {name: sorted({int(size) for size in lm.batch_sizes.values()})}
        return {
            "suite": next((suite for suite, tasks in SUITES.items() if set(tasks) == set(scored)), None),
            "tasks": scored,
            "dtype": str(lm.model.dtype).removeprefix("torch."),
            **({"batch_sizes": sizes} if sizes else {}),
            **({"own_tasks": own} if own else {}),
            **({"scored_plainly": plainly} if plainly else {}),
            "results": kept + new,
        }


def _manager_of(tasks: Sequence[str], own: OwnTasks) -> Any:
    """The harness's list of its tasks and the user's; of only a few folders if those hold everything asked for.

    Raises:
        UsageError: an unknown task; with the nearest name.
    """
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = dict.fromkeys(FOLDERS[task] for task in tasks if task in FOLDERS)
    few = [*(str(root / folder) for folder in folders), str(MINI_FOLDER), *map(str, own.folders)]
    manager = lm_eval.tasks.TaskManager(include_path=few, include_defaults=False)
    if all(name in manager.all_tasks for name in tasks) and not own.has_group(tasks):
        return manager
    manager = lm_eval.tasks.TaskManager(include_path=[str(MINI_FOLDER), *map(str, own.folders)])
    for name in tasks:
        if name not in manager.all_tasks:
            near = did_you_mean(name, [*SUITES, *manager.all_tasks])
            raise UsageError(f"task {name!r} is unknown to lm-eval{near}{own.hint()}")
    return manager


def _matching(file: Path, head: dict[str, Any]) -> dict[str, Any] | None:
    """The record in the file, if it is of these weights and settings."""
    if not file.exists():
        return None
    record, asked = read_json(file), head["dtype_asked"]
    if (
        not isinstance(record, dict)
        or (record.get("evaluated") or {}).get("weights_sha256") != head["evaluated"]["weights_sha256"]
    ):
        return None
    record = {"scoring": PLAIN} | record  # records of earlier versions lack it
    same = all(record.get(key) == value for key, value in head.items() if key not in ("evaluated", "dtype_asked"))
    return record if same and asked in (record.get("dtype_asked"), record.get("dtype")) else None


def _finite(value: float) -> float | None:
    """None for a perplexity that is infinite, for example: JSON has no infinity."""
    return float(value) if math.isfinite(value) else None


def _results(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Every metric of an answer of the harness: a row each, with its standard error where it has one."""
    rows = []
    for task, scores in answer["results"].items():
        shots = answer["n-shot"].get(task)  # a task's own file is not overruled
        items = (answer["n-samples"].get(task) or {}).get("effective") or scores.get("sample_len")
        for key, value in scores.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or isinstance(value, (str, bool)):
                continue
            stderr = scores.get(f"{metric}_stderr,{chosen}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if chosen == "none" else key,
                    "value": _finite(value),
                    "stderr": _finite(stderr) if isinstance(stderr, (int, float)) else None,
                    "n": items,
                    **({"num_fewshot": shots} if isinstance(shots, int) else {}),
                }
            )
    shots = {row["task"]: row["num_fewshot"] for row in rows if "num_fewshot" in row}
    for row in answer.get("gold", ()):
        rows.append(row | ({"num_fewshot": shots[row["task"]]} if row["task"] in shots else {}))
    return rows


def result_file(target: Target, settings: Settings) -> Path:
    """Where the results go: a file for these weights and settings, so that no result replaces another's."""
    asked = {"weights": weights_hash(target.checkpoint)} | settings.recorded()
    if settings.scoring == PLAIN:
        del asked["scoring"]  # the files keep the names from before there was another
    short = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    limit = "" if settings.limit is None else f"-limit{settings.limit:g}"
    return target.results / f"benchmarks-{target.checkpoint.name}-{settings.num_fewshot}shot{limit}-{short}.json"
