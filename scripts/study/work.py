"""What takes torch: making a plan, and running its cells."""

import argparse
import os
import socket
from datetime import UTC, datetime

import torch
import yaml

from periln.runkit.environment import describe_environment
from periln.runkit.errors import UsageError
from periln.runkit.folder import RunFolder
from periln.runkit.process import StopRequest
from periln.runkit.studies import Study, check_untouched, freeze
from periln.scripts.arguments.study import groups_of, parse_budget, parse_shard
from periln.scripts.study import plan as plans
from periln.scripts.study.design import SMALLEST, choose, size_for
from periln.scripts.study.run import Runner, Way, log_session, prepare
from periln.scripts.study.sizes import size_of
from periln.scripts.study.speed import measure


def workers_of(args: argparse.Namespace) -> int:
    """Cells side by side: those asked for, else one a core or GPU."""
    if args.device == "cuda":
        return args.workers or max(1, torch.cuda.device_count())
    return args.workers or len(os.sched_getaffinity(0))


def make_plan(args: argparse.Namespace) -> int:
    check_untouched(args.out)
    budget = parse_budget(args.budget)
    size = size_of(args.size) if args.size else None
    workers = budget.machines or workers_of(args)
    measured = args.tokens_per_second is None
    if measured:
        at = size_of(args.at or args.size or SMALLEST)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda was asked for, but torch sees no CUDA device: give --tokens-per-second")
        print(f"measuring the speed at size {at.name} (about a minute)", flush=True)
        speed = measure(at, args.device)
    else:
        at, speed = size_for(args.at or args.size, args.device), args.tokens_per_second
    design = choose(workers * budget.seconds, speed, at, args.device, groups_of(args), size)
    plan = plans.build(design, budget, args, workers, speed, at, measured)
    plans.check_recipes(plan)
    claims = plans.CLAIMS.read_text(encoding="utf-8")
    freeze(args.out, plan, claims)
    how = "measured" if measured else "stated"
    unit = "core" if args.device == "cpu" else "GPU"
    print(
        f"{budget.text} on {workers} {unit}{'s' if workers > 1 else ''}, {speed:,.0f} tokens/s a {unit} at size "
        f"{at.name} ({how}): size {design.size.name}, {len(design.cells)} cells, {design.seeds} seeds in E2\n"
    )
    print("\n".join(plans.table(plan)))
    print("\npower (two-sided 5 %, before Holm's correction):\n" + "\n".join(plans.powers(plan)))
    lost = plans.undecidable(plan, yaml.safe_load(claims))
    print("\nclaims that this plan cannot decide:\n" + ("\n".join(lost) if lost else "none"))
    data = plan["data"]
    print(
        f"\ntext: {data['source']}, {data['max_tokens']:,} tokens; the longest cell reads "
        f"{max(c['tokens'] for c in plan['cells']):,}, so that none is read twice"
    )
    print(f"{args.out / 'plan.yaml'} and claims.yaml are frozen; next: periln study run --out {args.out}")
    return 0


def run(args: argparse.Namespace, study: Study) -> int:
    if study.plan["device"] == "cuda" and not torch.cuda.is_available():
        raise UsageError("the plan is for cuda, but torch sees no CUDA device")
    stop = StopRequest().install()
    args.device = study.plan["device"]
    shard = parse_shard(args.shard) if args.shard else (1, 1)
    way = Way(workers_of(args), args.nice, int(args.memory * 2**30), shard, tuple(groups_of(args)))
    environment = describe_environment(torch.device("cpu"))
    commit, dirty = environment.get("commit"), environment.get("uncommitted_changes")
    print(f"code: commit {commit or 'unknown'}{', with uncommitted changes' if dirty else ''}", flush=True)
    # One process a shard: two would train the same cells.
    lock = study.path / "shards" / f"{shard[0]}-of-{shard[1]}"
    with RunFolder(lock).locked():
        if stop.exit_code is None:
            prepare(study, way.workers, stop)
        entry = {"commit": commit, "uncommitted_changes": dirty, "host": socket.gethostname()}
        entry |= {"began": datetime.now(UTC).isoformat(timespec="seconds"), "workers": way.workers, "shard": args.shard}
        log_session(study.path, entry)
        Runner(study, way, stop).run()
    return 0
