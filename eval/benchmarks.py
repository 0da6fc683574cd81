"""Score checkpoints on tasks of lm-evaluation-harness: by default the five benchmarks of the Peri-LN paper, 0-shot.

    python -m eval.benchmarks runs/400m-peri                       # its newest checkpoint -> runs/400m-peri/eval/
    python -m eval.benchmarks ID --revision v1 --out results/      # any causal LM of the Hub

Every result names weights (by hash), settings and harness; an existing one is not computed again. At the
same batch size the scores are those of `lm_eval --tasks TASK` to the last digit; a task's scores do not depend on which
others are scored with it.
"""

import sys

from periln.eval.arguments.benchmarks import check, is_one_file, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.benchmarks", parse, check))  # parses before the imports below, which take seconds

import argparse
import sys
from typing import Any

import pandas as pd
from tqdm import tqdm

from periln.eval.arguments.shared import task_names
from periln.eval.options import settings_of
from periln.eval.scoring.harness import Benchmarks, result_file
from periln.eval.targets import find_target
from periln.eval.text_table import Table, to_terminal, values
from periln.runkit.errors import UserError
from periln.runkit.folder import called
from periln.runkit.process import quiet_transformers, start_stage
from periln.runkit.progress import progress_bar


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
    check(args)
    quiet_transformers()
    settings, names = settings_of(args), task_names(args.tasks)
    one_file = is_one_file(args)
    out = args.out.parent if one_file else args.out
    found = [(name, find_target(name, args.revision, args.trust_remote_code, out)) for name in args.targets]
    benchmarks = Benchmarks(names, settings, args.include_path)
    files: list[Any] = [args.out if one_file else target and result_file(target, settings) for _, target in found]
    scored = [(target, file) for (_, target), file in zip(found, files, strict=True) if target is not None]
    if one_file and scored and not args.again and not benchmarks.is_free(*scored[0]):
        raise UserError(f"{args.out} holds something else than results of these weights and settings; it is left alone")
    if args.check_data or any(benchmarks.lacking(*each, args.again) for each in scored):
        benchmarks.load()  # problems with a task or its data are reported before the first score
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
