"""Verdicts of a study: python -m eval.study report STUDY"""

import argparse

from periln.eval.arguments.study import check
from periln.eval.study.export import compare, export
from periln.eval.study.measure import measure
from periln.eval.study.page import write_report
from periln.eval.study.tests import Results
from periln.eval.study.verdicts import judge
from periln.runkit.errors import UserError
from periln.runkit.folder import write_json
from periln.runkit.process import start_stage
from periln.runkit.recipes import read_yaml
from periln.runkit.studies import Study, best_rates


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    study = Study(args.study, args.records)
    study.check()
    if args.verb == "measure":
        measure(study, args.cell)
        return
    results = study.results()
    best = best_rates(study.plan, results)
    verdicts = judge(read_yaml(study.path / "claims.yaml"), Results(list(results.values()), best))
    if args.verb == "check":
        lines = compare(study.path, verdicts)
        if lines:
            raise UserError(f"{study.path / 'verdicts.json'} is not what the records give: {'; '.join(lines)}")
        print(f"{study.path}: {len(verdicts)} verdicts from {len(results)} cells, as they are stored")
        return
    if args.verb == "export":
        size = export(study, results, verdicts, args.records)
        print(f"{args.records}: {len(results)} of {len(study.cells)} cells, {size / 1e6:.2f} MB")
        write_report(study, results, verdicts, best, args.records, page=False)
        return
    write_json(study.path / "verdicts.json", [verdict.record() for verdict in verdicts])
    write_report(study, results, verdicts, best, study.path)
    for verdict in verdicts:
        print(f"{verdict.name:4}{verdict.verdict:18}{verdict.words}")
    print(f"{study.path / 'verdicts.md'}, {study.path / 'report.html'}")
