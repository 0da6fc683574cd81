"""The five benchmarks through lm-eval's Python API.

`hub` runs the harness's own, unmodified tasks on the real data; `mini` runs our own small items in the same
five schemas, which are never called by the benchmarks' names.
"""

import io
import logging
import re
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from importlib import metadata
from pathlib import Path
from typing import Any

from runkit.errors import UsageError, UserError, did_you_mean

from .checkpoints import Target
from .suites import METRICS, SUITES

MINI_FOLDER = Path(__file__).parent / "tasks"
FEWSHOT_SEED = 1234  # the harness's own default


class Benchmarks:
    """The tasks of one suite, or any tasks of the harness, loaded once and used for every checkpoint.

    Raises:
        UsageError: an unknown suite or task.
        UserError: a data set that cannot be had; one sentence that says why.
    """

    def __init__(self, suite: str, limit: int | None = None, num_fewshot: int = 0, tasks: Sequence[str] | None = None):
        if suite not in SUITES:
            raise UsageError(f"suite {suite!r} is unknown{did_you_mean(suite, list(SUITES))}: use {', '.join(SUITES)}")
        if limit is not None and limit < 1:
            raise UsageError(f"limit must be at least 1 item a task, not {limit}")
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.suite, self.limit, self.num_fewshot = suite, limit, num_fewshot
        self.tasks = tuple(tasks or SUITES[suite])
        own = all(task in SUITES["mini"] for task in self.tasks)  # the harness's thousands take seconds to list
        self._manager = TaskManager(include_path=str(MINI_FOLDER), include_defaults=not own)
        for name in self.tasks:
            if name not in self._manager.all_tasks:
                raise UsageError(f"task {name!r} is unknown to lm-eval{did_you_mean(name, self._manager.all_tasks)}")
        self._loaded: dict[str, Any] = {}
        for name in self.tasks:
            one = self._load(name)
            for key, value in one.items():
                self._loaded.setdefault(key, {}).update(value)
        for task in self._loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=num_fewshot)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)

    def _load(self, name: str) -> dict[str, Any]:
        try:
            return self._manager.load(name)
        except Exception as error:  # datasets and the Hub raise a dozen kinds; the user needs one sentence
            raise UserError(_why_missing(name, error)) from error

    def evaluate(self, target: Target, device: str, batch_size: int) -> dict[str, Any]:
        """Every metric that the tasks define, on one checkpoint, as a record for eval/*.json."""
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        model, tokenizer = target.load(device)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=device)
        # The mini tasks take seconds, and the harness's own progress bars would bury ours; on the real ones, which
        # take hours on a large model, they are what one wants to see.
        with redirect_stderr(io.StringIO()) if self.tasks == SUITES["mini"] else nullcontext():
            try:
                answer = evaluate(lm=lm, task_dict=self._loaded, limit=self.limit, log_samples=False)
            except AssertionError as error:  # the harness's only word for an item that does not fit
                positions = getattr(model.config, "max_position_embeddings", None)
                raise UserError(
                    f"{target.name}: lm-eval refuses an item; an answer is probably longer than the model's "
                    f"{positions} positions in its tokenizer's tokens"
                ) from error
        results = []
        for task in self.tasks:
            scores, items = answer["results"][task], answer["n-samples"][task]["effective"]
            for metric in METRICS:
                if f"{metric},none" in scores:
                    value, stderr = scores[f"{metric},none"], scores[f"{metric}_stderr,none"]
                    stderr = stderr if isinstance(stderr, float) else None
                    results.append({"task": task, "metric": metric, "value": value, "stderr": stderr, "n": items})
        return {
            "evaluated": target.evaluated(),
            "harness": {"name": "lm-eval", "version": metadata.version("lm-eval")},
            "suite": self.suite if self.tasks == SUITES[self.suite] else None,
            "tasks": list(self.tasks),
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "batch_size": batch_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "results": results,
        }


def _why_missing(task: str, error: Exception) -> str:
    """One sentence on why a task's data could not be had."""
    chain, seen = [], error
    while seen is not None and len(chain) < 8:
        chain.append(f"{type(seen).__name__}: {seen}")
        seen = seen.__cause__ or seen.__context__
    text = " ".join(chain)
    if "GatedRepo" in text or re.search(r"\bgated\b", text, re.IGNORECASE):
        return f"the data set of {task} is gated: accept its terms on its Hub page and log in (hf auth login)"
    if "OfflineMode" in text or "offline mode" in text.lower():
        return f"the data set of {task} is not on this machine and the Hub is switched off (HF_HUB_OFFLINE)"
    if "DatasetNotFound" in text or "RepositoryNotFound" in text:
        return f"the Hub has no data set for {task}, or it needs a login ({' '.join(str(error).split())[:200]})"
    return f"the data set of {task} cannot be loaded from the Hub ({' '.join(str(error).split())[:200]})"
