"""Tasks of lm-evaluation-harness through its Python API, and their results as records for eval/*.json.

The harness's own tasks run unmodified, on the real data; beside them our own small items in five of their schemas
(`mini_*`), which are never called by the benchmarks' names.
"""

import io
import logging
import random
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runkit.errors import UsageError, UserError, did_you_mean
from runkit.folder import read_json, write_json
from runkit.hub import hub_reason

from .checkpoints import Target
from .suites import SUITES

MINI_FOLDER = Path(__file__).parent / "tasks"
SEED = 1234  # the harness's own default, for the examples before an item too


@dataclass(frozen=True)
class Settings:
    """What decides a score beside weights and task; `batch_size` is a number or `auto`."""

    num_fewshot: int = 0
    limit: float | None = None
    batch_size: int | str = 16
    dtype: str = "auto"
    device: str = "cpu"

    def check(self) -> None:
        """Raise UsageError for a value that cannot be; names it."""
        if self.limit is not None and (self.limit <= 0 or (self.limit >= 1 and self.limit != int(self.limit))):
            shown = f"{self.limit:g}"
            raise UsageError(f"limit must be at least 1 item a task, or a share of them below 1, not {shown}")
        if self.num_fewshot < 0:
            raise UsageError(f"num_fewshot must be at least 0, not {self.num_fewshot}")
        if self.batch_size != "auto" and self.batch_size < 1:
            raise UsageError(f"batch size must be at least 1, or auto, not {self.batch_size}")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(f"--device {self.device} was asked for, but torch sees no CUDA device")

    def recorded(self) -> dict[str, Any]:
        """The keys of a record that hold them; `dtype` is recorded as it turned out."""
        return {
            "num_fewshot": self.num_fewshot,
            "limit": int(self.limit) if self.limit is not None and self.limit >= 1 else self.limit,
            "batch_size": self.batch_size,
            "dtype_asked": self.dtype,
            "device": self.device,
            "harness": {"name": "lm-eval", "version": metadata.version("lm-eval")},
        }


class Benchmarks:
    """Tasks of the harness (or groups of them), loaded once and used for every checkpoint.

    Raises:
        UsageError: an unknown task; with the nearest name.
        UserError: a data set that cannot be had; one sentence that says why.
    """

    def __init__(self, tasks: Sequence[str], settings: Settings):
        from lm_eval.tasks import TaskManager

        settings.check()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.tasks, self.settings = tuple(dict.fromkeys(tasks)), settings
        own = all(task in SUITES["mini"] for task in self.tasks)  # the harness's thousands take seconds to list
        self._manager = TaskManager(include_path=str(MINI_FOLDER), include_defaults=not own)
        for name in self.tasks:
            if name not in self._manager.all_tasks:
                known = [*SUITES, *self._manager.all_tasks]
                raise UsageError(f"task {name!r} is unknown to lm-eval{did_you_mean(name, known)}")
        self._loaded = {name: self._load(name) for name in self.tasks}

    def _load(self, name: str) -> dict[str, Any]:
        try:
            loaded = self._manager.load(name)
        except Exception as error:  # datasets and the Hub raise a dozen kinds; the user needs one sentence
            raise UserError(f"the data set of {name} cannot be loaded: {hub_reason(error)}") from error
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") != 0:  # the harness's rule: 0 in a task's own file is not overruled
                task.set_config(key="num_fewshot", value=self.settings.num_fewshot)
            task.set_fewshot_seed(seed=SEED)
        return loaded

    def loaded(self, name: str) -> list[Any]:
        """The harness's tasks of that name: one, or those of a group."""
        return list(self._loaded[name]["tasks"].values())

    def run(self, name: str, lm: Any, target: Target, log_samples: bool = False) -> dict[str, Any]:
        """The harness's answer for one task: what its command line gives when asked for this task alone."""
        from lm_eval.evaluator import evaluate

        random.seed(0)  # as the command line does
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        # The mini tasks take seconds, and the harness's own progress bars would bury ours; on the real ones, which
        # take hours on a large model, they are what one wants to see.
        with redirect_stderr(io.StringIO()) if name in SUITES["mini"] else nullcontext():
            try:
                return evaluate(lm=lm, task_dict=self._loaded[name], limit=self.settings.limit, log_samples=log_samples)
            except AssertionError as error:  # the harness's only word for an item that does not fit
                raise UserError(
                    f"{target.name}: lm-eval refuses an item of {name}; an answer is probably longer than the model's "
                    f"{lm.max_length} positions in its tokenizer's tokens"
                ) from error

    def load_model(self, target: Target) -> Any:
        """The target as the harness wants it."""
        from .likelihood import ContinuationLM

        settings = self.settings
        model, tokenizer = target.load(settings.device, settings.dtype)
        return ContinuationLM(
            pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, device=settings.device
        )

    def score(self, target: Target, file: Path, again: bool = False, done: Any = None) -> dict[str, Any]:
        """Score the target on every task that `file` has no result of for these weights and settings, and write it.

        The file is written after each task, so that a stop costs one task at most. Results for other weights or
        settings that stand in the file are replaced. `done` is called after each task.
        """
        head = {"evaluated": target.evaluated()} | self.settings.recorded()
        record = None if again else _matching(file, head)
        results = [] if record is None else record["results"]
        more = {} if record is None else record.get("batch_sizes", {})
        scored = [] if record is None else record["tasks"]
        lm = None
        for name in self.tasks:
            if name not in scored:
                lm = lm or self.load_model(target)
                answer = self.run(name, lm, target)
                scored, results = [*scored, name], results + _results(answer)
                if self.settings.batch_size == "auto":
                    more = more | {name: sorted({int(size) for size in lm.batch_sizes.values()})}
                record = head | {
                    "suite": next((suite for suite, tasks in SUITES.items() if set(tasks) == set(scored)), None),
                    "tasks": scored,
                    "dtype": str(lm.model.dtype).removeprefix("torch."),
                    **({"batch_sizes": more} if more else {}),
                    "results": results,
                }
                write_json(file, record)
            if done is not None:
                done()
        return record


def _matching(file: Path, head: dict[str, Any]) -> dict[str, Any] | None:
    """The record in the file, if it is of these weights and settings."""
    if not file.exists():
        return None
    record, asked = read_json(file), head["dtype_asked"]
    if (record.get("evaluated") or {}).get("weights_sha256") != head["evaluated"]["weights_sha256"]:
        return None
    same = all(record.get(key) == value for key, value in head.items() if key not in ("evaluated", "dtype_asked"))
    return record if same and asked in (record.get("dtype_asked"), record.get("dtype")) else None


def _results(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Every metric of an answer of the harness: a row each, with its standard error where it has one."""
    rows = []
    for task, scores in answer["results"].items():
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
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
                    "n": items,
                }
            )
    return rows
