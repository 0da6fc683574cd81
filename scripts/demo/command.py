"""The Peri-LN study in miniature: text, pretraining, evaluation, fine-tuning, evaluation again, report.

    python -m scripts.demo            (what `make demo` runs)

Each stage is a separate process; what one hands to the next is run folders on disk. Interrupted at any
moment, it resumes where it was when started again.
"""

import argparse
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from periln.runkit.errors import StoppedBySignal, UserError
from periln.runkit.folder import RunFolder, write_text
from periln.runkit.process import StopRequest, need_device, python_m, stop_with_parent
from periln.runkit.recipes import dump_yaml, from_mapping, read_yaml, to_mapping
from periln.runkit.resume import resumption
from periln.scripts.arguments.demo import HUB_LIMIT, check
from periln.scripts.data.same_data import check_same_source
from periln.scripts.demo.recipe import DemoRecipe
from periln.scripts.recipe import Recipe

DEFAULT_RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"


@dataclass
class Stage:
    """Child processes that run side by side, and about how long they take (only for the estimate)."""

    title: str
    commands: list[list[str]]
    seconds: float
    runs: tuple[Path, ...] = ()  # the run folders that it trains; with all of them at their end there is nothing to do

    @property
    def finished(self) -> bool:
        return bool(self.runs) and all(RunFolder(run).status in ("completed", "diverged") for run in self.runs)


def _started(out: Path) -> bool:
    """Whether a demo in this folder got as far as its data; before that, another recipe takes nothing away."""
    return (out / "data" / "index.json").exists()


def resolve_recipe(args: argparse.Namespace) -> DemoRecipe:
    """The recipe of this demo: that of the folder if it has one, else the file's, with what the flags say.

    Raises:
        UserError: the folder belongs to another recipe than was asked for.
        UsageError: see `DemoRecipe.check`.
    """
    check(args)
    kept = args.out / "recipe.yaml"
    others = kept.exists() and read_yaml(kept).get("stage") != "demo"
    # A demo that failed before it had its data (bad text, say) need not repeat the mistake.
    fresh = others or not kept.exists() or (not _started(args.out) and RunFolder(args.out).status == "failed")
    mapping = read_yaml((args.recipe or DEFAULT_RECIPE) if fresh or args.recipe else kept)
    recipe = from_mapping(DemoRecipe, mapping)
    if args.device is not None:
        recipe.device = args.device
    if args.text is not None:
        recipe.text.source = args.text
    if args.placements is not None:
        recipe.placements = [name.strip() for name in args.placements.split(",")]
    if args.hub:
        newly = recipe.evaluation.suite != "hub"
        recipe.evaluation.suite = recipe.sft.data = "hub"
        if newly:
            recipe.evaluation.limit = HUB_LIMIT
    if args.limit is not None:
        recipe.evaluation.limit = args.limit or None
    recipe.check()
    if _started(args.out):
        found = resumption(read_yaml(kept), recipe)
        if found.different:
            raise UserError(
                f"{args.out} belongs to another recipe ({'; '.join(found.different)}): give another folder (--out, or "
                f"OUT= with make), or remove {args.out}"
            )
        recipe = found.recipe
        if any(change.name == "text.source" for change in found.changes):
            check_same_source(args.out / "data", recipe.text.source)
    return recipe


def check_disk(out: Path, recipe: DemoRecipe) -> None:
    """Raise UserError where the disk clearly cannot hold the demo (weights and moments in FP32, twice a run)."""
    config = recipe.cells(out)[0].model_config(vocab_size=recipe.tokenizer.vocab_size)
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    parameters = config.num_hidden_layers * layer + 2 * config.vocab_size * config.hidden_size
    needed = (
        20_000_000 + 3 * recipe.text.max_bytes + len(recipe.cells(out)) * parameters * 4 * (3 + 1) + parameters * 16
    )
    place = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed and not (out / "report.html").exists():
        raise UserError(
            f"no space on the disk: {place} has {free / 1e6:.0f} MB free, the demo needs about {needed / 1e6:.0f} MB"
        )


def plan_stages(recipe: DemoRecipe, out: Path) -> list[Stage]:
    """The commands of the demo, in order. Their seconds are what they took on two cores, for the estimate."""
    cells = recipe.cells(out / "data")
    hub = recipe.evaluation.suite == "hub"
    # The bundled sets need no network, and are kept from looking for one.
    offline = [] if hub else ["env", "HF_HUB_OFFLINE=1", "HF_DATASETS_OFFLINE=1"]

    def python(command: str, *words: object) -> list[str]:
        return [*offline, *python_m(command), *map(str, words)]

    # On a CPU, runs go side by side with one thread each: more steps a second than one run with all threads, and
    # a second busy process on the machine slows them by its share instead of stalling every parallel region.
    # A run's numbers do not depend on how many others there are.
    workers = max(1, min(2, os.cpu_count() or 1, len(cells))) if recipe.device == "cpu" else 1
    threads = ["--threads", 1] if recipe.device == "cpu" else []
    shards = [cells[i::workers] for i in range(workers)]

    def side_by_side(module: str, *words: object, of: Callable[[Recipe], list[str]]) -> list[list[str]]:
        named = [[word for cell in shard for word in of(cell)] for shard in shards]
        return [python(module, *names, *words, *threads, "--bar", i) for i, names in enumerate(named)]

    text, pretraining, suite = recipe.text, recipe.pretraining, recipe.evaluation
    prepare = ["--source", text.source, "--max-bytes", text.max_bytes, "--heldout-share", text.heldout_share]
    prepare += ["--vocab-size", recipe.tokenizer.vocab_size, "--out", out / "data"]
    prepare += ["--context", recipe.model.get("max_position_embeddings", recipe.sft.max_length)]
    evaluate = ["--suite", suite.suite, "--batch-size", suite.batch_size, "--device", recipe.device]
    evaluate += ["--limit", suite.limit] if suite.limit else []
    evaluate += ["--heldout", out / "data" / "heldout.jsonl", "--context", pretraining.sequence_length]
    tune = ["--config", out / "recipes" / "sft.yaml"]

    bench = ["--last", "--quick", "--data", out / "data" / "heldout.jsonl", "--tokens", pretraining.sequence_length]
    bench += ["--device", recipe.device]

    def final(cell: Recipe) -> list[str]:
        return [str(out / cell.name)]

    step = pretraining.batch_size * pretraining.sequence_length / 5000
    one = 600.0 if hub else 4.0
    # Gated, missing or unreachable: better known before an hour of training than after it.
    check = [
        Stage("benchmarks from the Hub", [python("eval.evaluate", "--suite", "hub", "--check-data")], 60),
        Stage("conversations from the Hub", [python("sft.train", *tune, "--check-data")], 20),
    ]
    return [
        *(check if hub else []),
        Stage("text and tokenizer", [python("scripts.prepare_data", *prepare)], 20),
        Stage(
            "pretraining in FP16",
            side_by_side(
                "scripts.pretrain", "--runs", out, of=lambda c: ["--config", str(out / "recipes" / f"{c.name}.yaml")]
            ),
            10 + len(cells) * pretraining.steps * step,
            runs=tuple(out / cell.name for cell in cells),
        ),
        Stage(
            "evaluation",
            side_by_side("eval.evaluate", *evaluate, of=lambda c: [str(out / c.name)]),
            12 + one * len(cells),
        ),
        Stage(
            "fine-tuning in FP16",
            side_by_side("sft.train", *tune, of=lambda c: ["--model", str(out / c.name)]),
            12 + (2000 if hub else 7) * len(cells),
            runs=tuple(out / c.name / "sft" for c in cells if RunFolder(out / c.name).status != "diverged"),
        ),
        Stage(
            "evaluation after fine-tuning",
            side_by_side("eval.evaluate", *evaluate, of=lambda c: [str(out / c.name / "sft")]),
            12 + one * len(cells),
        ),
        Stage(
            "stability bench of the final checkpoints",
            side_by_side("eval.stability", *bench, of=final),
            10 + 5 * len(cells),
        ),
        Stage("report", [python("eval.report", out)], 15),
    ]


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def run_stage(stage: Stage, stop: StopRequest, debug: bool) -> None:
    """Run a stage's processes to their end; a signal that reaches the demo is handed on to each, once, as SIGTERM:
    pretraining and fine-tuning save, evaluation ends at once and begins its current checkpoint again.

    Raises:
        StoppedBySignal: the demo was asked to stop, and the stage has stopped.
        UserError: a process failed; it has said why itself, and the others were stopped.
    """
    common = ["--stop-with-parent", str(os.getpid()), *(["--debug"] if debug else [])]
    children = [subprocess.Popen([*command, *common], start_new_session=True) for command in stage.commands]
    told, failed = False, 0
    while True:
        codes = [child.poll() for child in children]
        failed = failed or next((code for code in codes if code), 0)
        if (stop.exit_code or failed) and not told:
            for child, code in zip(children, codes, strict=True):
                if code is None:
                    child.terminate()
            told = True
        if None not in codes:
            break
        time.sleep(0.1)
    if stop.exit_code:
        raise StoppedBySignal(stop.exit_code, "stopped; start the demo again to resume from here")
    if failed:
        error = UserError(f"the stage '{stage.title}' failed (exit code {failed}); see above")
        error.exit_code = failed if failed in (1, 2) else 1
        raise error


def main(args: argparse.Namespace) -> None:
    recipe = resolve_recipe(args)
    need_device(recipe.device, "device: cuda")
    check_disk(args.out, recipe)
    run = RunFolder(args.out)
    stop = StopRequest().install()
    stop_with_parent(args.stop_with_parent)
    # A demo or a stage whose parent was killed needs some seconds to save and to let go.
    with run.locked(wait_seconds=60):
        if (args.out / "recipe.yaml").exists() and not _started(args.out):
            write_text(args.out / "recipe.yaml", dump_yaml(to_mapping(recipe)))  # nothing was made by the old one
        run.claim(recipe)
        for cell in recipe.cells(args.out / "data"):
            write_text(args.out / "recipes" / f"{cell.name}.yaml", dump_yaml(to_mapping(cell)))
        write_text(args.out / "recipes" / "sft.yaml", dump_yaml(recipe.sft_recipe()))
        _run_stages(plan_stages(recipe, args.out), stop, args, run)


def setup_seconds(started: float | None) -> float:
    """Seconds from the start to here: of `make demo` (Unix time), where that is known, else of this process."""
    if started is not None:
        return max(0.0, time.time() - started)
    try:  # since the machine's start, in ticks: the 22nd field, the second may hold spaces
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):
        return 0.0


def _run_stages(stages: list[Stage], stop: StopRequest, args: argparse.Namespace, run: RunFolder) -> None:
    setup = setup_seconds(args.started)
    what = "environment, packages, imports" if args.started is not None else "imports"
    print(f"set-up ({what}) took {_minutes(setup)}; it counts in the times below", flush=True)
    start, planned_done = time.monotonic(), 0.0
    stages = [stage for stage in stages if not stage.finished]
    for number, stage in enumerate(stages, start=1):
        elapsed = time.monotonic() - start
        pace = min(3.0, max(0.2, elapsed / planned_done)) if planned_done else 1.0
        left = pace * sum(s.seconds for s in stages[number - 1 :])
        so_far = f"{_minutes(setup + elapsed)} so far, about {_minutes(left)} left"
        print(f"\n[{number}/{len(stages)}] {stage.title} · {so_far}", flush=True)
        run.set_status("running", stage=stage.title)
        try:
            run_stage(stage, stop, args.debug)
        except StoppedBySignal:
            run.set_status("interrupted", stage=stage.title)
            raise
        except UserError:
            run.set_status("failed", stage=stage.title)
            raise
        planned_done += stage.seconds
    took = setup + time.monotonic() - start
    print(f"{run.path / 'report.html'}: done in {_minutes(took)}, of which set-up {_minutes(setup)}", flush=True)
    run.set_status("completed", seconds_since_last_start=round(took, 1), setup_seconds=round(setup, 1))
