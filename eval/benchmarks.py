"""Score checkpoints on tasks of lm-evaluation-harness: by default the five benchmarks of the Peri-LN paper, 0-shot.

    python -m eval.benchmarks runs/400m-peri                       # its newest checkpoint -> runs/400m-peri/eval/
    python -m eval.benchmarks ID --revision v1 --out results/      # any causal LM of the Hub

Every result names weights (by hash), settings and harness; one that is there already is not computed again. At the
same batch size the scores are those of `lm_eval --tasks TASK` to the last digit; a task's scores do not depend on which
others are asked for beside it.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from runkit.errors import UsageError, UserError, make_parser, run_command
from runkit.folder import called, weights_hash
from runkit.process import start_stage
from runkit.progress import progress_bar

from .checkpoints import DTYPES, Target, find_model
from .harness import Benchmarks, Settings
from .render import Table, to_terminal, values
from .suites import SUITES


def task_names(text: str) -> list[str]:
    """`A,B,...` as a list; the name of a suite stands for its tasks."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks names no task")
    return [task for name in names for task in SUITES.get(name, (name,))]


def batch_size(text: str) -> int | str:
    """A number, or `auto`."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--batch-size must be a number or auto, not {text!r}") from None


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the flags ask for, checked."""
    size, device = batch_size(args.batch_size), device_of(args.device)
    settings = Settings(args.num_fewshot, args.limit, size, args.dtype, device)
    settings.check()
    return settings


def device_of(name: str) -> str:
    """The device of that name, or for `auto` a GPU where torch sees one.

    Raises:
        UsageError: a device that is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise UsageError(f"--device {name} is no device: use cpu, cuda or cuda:1") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name} was asked for, but torch sees no CUDA device")
    return name


def result_file(target: Target, settings: Settings) -> Path:
    """Where the results go: a file for these weights and settings, so that no result replaces another's."""
    asked = {"weights": weights_hash(target.checkpoint)} | settings.recorded()
    short = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    limit = "" if settings.limit is None else f"-limit{settings.limit:g}"
    return target.results / f"benchmarks-{target.checkpoint.name}-{settings.num_fewshot}shot{limit}-{short}.json"


def table(records: list[tuple[str, dict[str, Any]]]) -> Table:
    """The scores of the targets: a block a target, a row a task and metric."""
    lines = []
    for name, record in records:
        for row in record["results"]:
            error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
            value = "not finite" if row["value"] is None else f"{row['value']:.4f}{error}"
            cells = {"value ± standard error": value, "items": str(row["n"])}
            lines.append({"target": name, "task": row["task"], "metric": row["metric"]} | cells)
    one = records[0][1]
    shots = f"{one['num_fewshot']}-shot" + ("" if one["limit"] is None else f", limit {one['limit']:g}")
    notes = (
        f"lm-eval {one['harness']['version']}, {shots}, batch size {one['batch_size']}, "
        f"{values([record for _, record in records], 'dtype')}, {one['device']}.",
    )
    return Table("Benchmarks", pd.DataFrame(lines), pd.DataFrame(lines), notes, keys=2)


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    if not args.targets and not args.check_data:
        raise UsageError("name at least one run folder, checkpoint or Hub id")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    settings, names = settings_of(args), task_names(args.tasks)
    one_file = args.out is not None and args.out.suffix == ".json"
    if one_file and len(args.targets) != 1:
        raise UsageError(f"--out {args.out} holds the results of one target, not of {len(args.targets)}")
    out = args.out.parent if one_file else args.out
    found = [(name, find_model(name, args.revision, args.trust_remote_code, out)) for name in args.targets]
    benchmarks = Benchmarks(names, settings, args.include_path)
    files = [args.out if one_file else target and result_file(target, settings) for _, target in found]
    scored = [(target, file) for (_, target), file in zip(found, files, strict=True) if target is not None]
    if one_file and scored and not args.again and not benchmarks.is_free(*scored[0]):
        raise UserError(f"{args.out} holds something else than results of these weights and settings; it is left alone")
    if args.check_data or any(benchmarks.lacking(*each, args.again) for each in scored):
        benchmarks.load()  # what is wrong with a task or its data is said before the first score
    if args.check_data:
        return
    records = []
    with progress_bar(args, len(found) * len(benchmarks.tasks), "benchmarks", "task") as bar:
        for (name, target), file in zip(found, files, strict=True):
            if target is None:
                tqdm.write(f"{called(name)}: diverged, not evaluated")
                bar.update(len(benchmarks.tasks))
                continue
            bar.set_postfix_str(target.name)
            record = benchmarks.score(target, file, args.again, lambda: bar.update(1))
            records.append((f"{target.name}, {record['evaluated']['path']} -> {file}", record))
    if records:
        print(to_terminal(table(records), 100))


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The flags of `settings_of`, and of the models."""
    parser.add_argument(
        *("--include-path", "--include_path"),
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="tasks of your own, as .yaml files for lm-eval, of which the code is run; may be given several times",
    )
    parser.add_argument("--num-fewshot", type=int, default=0, help="examples before each item")
    parser.add_argument("--limit", type=float, help="items a task, or a share of them below 1; all when left out")
    parser.add_argument("--batch-size", default="16", help="requests a batch, or auto: as many as the memory holds")
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How models are found and loaded."""
    parser.add_argument("--revision", help="branch, tag or commit, for models of the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that a model brings along")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as saved")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU where torch sees one")
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="folder for results, or a .json for one target's; else the run's eval/"
    )
    parser.add_argument("--again", action="store_true", help="compute what is there already once more")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("python -m eval.benchmarks", "Score checkpoints on tasks of lm-evaluation-harness.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="run folders, checkpoints or ids of the Hub")
    tasks = ",".join(SUITES["hub"])
    parser.add_argument("--tasks", default=tasks, metavar="A,B,...", help="any of lm-eval's, mini, or your own")
    parser.add_argument("--check-data", action="store_true", help="only load the tasks' data, and stop")
    add_settings(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    sys.exit(run_command(main, arguments))
