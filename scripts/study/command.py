"""The study: a verdict on every claim of the paper from runs of one's own, at any budget.

    python -m scripts.study plan --budget 8h --out STUDY
    python -m scripts.study run --out STUDY
    python -m scripts.study report --out STUDY

`report`, `check` and `export` are `eval.study`'s, in a process of its own: what the stages share is the folder.
They, `status`, and what is refused before a run import no torch.
"""

import argparse
import subprocess

from periln.runkit.process import python_m, stop_with_parent
from periln.runkit.studies import Study
from periln.scripts.arguments.study import check


def main(args: argparse.Namespace) -> int:
    check(args)
    stop_with_parent(args.stop_with_parent)
    if args.verb == "plan":
        from periln.scripts.study.work import make_plan

        return make_plan(args)
    study = Study(args.out, args.records if args.verb in ("run", "status") else None)
    study.check()
    if args.verb == "run":
        from periln.scripts.study.work import run

        return run(args, study)
    if args.verb == "status":
        return status(study)
    words = [args.verb, args.out, *(["--records", args.records] if args.records else [])]
    return subprocess.run([*python_m("eval.study"), *map(str, words)], check=False).returncode


def status(study: Study) -> int:
    results = study.results()
    for group in sorted({cell["group"] for cell in study.cells}):
        cells = [cell for cell in study.cells if cell["group"] == group]
        ended = [results[cell["name"]] for cell in cells if cell["name"] in results]
        lost = sum(result["status"] == "diverged" for result in ended)
        print(f"{group}: {len(ended)} of {len(cells)} cells done, {lost} of them diverged")
    left = sum(cell["seconds"] for cell in study.cells if cell["name"] not in results)
    print(f"{len(results)} of {len(study.cells)} cells; {left / 3600:.1f} h of one core or GPU are left by the plan")
    return 0
