"""Give a trained checkpoint another norm placement: `python -m scripts.retrofit SRC DST --to PLACEMENT`.

1. Plan: which norms appear and go; what folds exactly, what does not, what is refused (`plan.py`).
2. Fold what is exact, and prove it as a conversion is proved: equal logits in FP32 (`fold.py`).
3. Calibrate the rest on text by several rules; the loss after each is recorded, the best is written (`calibrate.py`).
4. With --heal, write the recipes of two runs for `periln pretrain` that train the new gains, and then everything.

How the result does beside its source, `python -m eval.retrofit` reports: what measures models is in `eval`, which
`scripts` does not import.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers.utils import logging as transformers_logging

from modeling_periln import PeriLlamaForCausalLM
from modeling_periln.convert_options import NO_TEXT
from modeling_periln.proof import TOLERANCE, ConversionFailed, compare
from modeling_periln.version import __version__
from periln.runkit.environment import describe_environment
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import check_room, write_folder, write_json
from periln.runkit.models import load_causal_lm
from periln.runkit.process import start_stage
from periln.runkit.recipes import read_yaml
from periln.scripts.arguments.retrofit import check
from periln.scripts.data.token_data import TokenData
from periln.scripts.origin import Origin, check_tokenizer, find_origin, hash_of, load_weights
from periln.scripts.retrofit.calibrate import Calibrated, calibrate
from periln.scripts.retrofit.fold import build, fold
from periln.scripts.retrofit.heal import FOLDER, Healing, recipes, write_recipes
from periln.scripts.retrofit.loss import measure, measure_reference
from periln.scripts.retrofit.plan import HEAD, RetrofitPlan, make_plan
from periln.scripts.retrofit.samples import Samples, find_samples, find_tokenizer
from periln.scripts.retrofit.write import RECORD, stored_dtype, write_model


def read_placement(asked: str) -> str | dict[str, Any]:
    """A placement's name, or a mapping: in YAML on the command line, or in a .yaml file.

    Raises:
        UsageError: no YAML, or no mapping.
    """
    if asked.endswith((".yaml", ".yml")):
        return read_yaml(Path(asked))
    if not asked.lstrip().startswith("{"):
        return asked
    try:
        found = yaml.safe_load(asked)
    except yaml.YAMLError as error:
        raise UsageError(f"--to {asked!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UsageError(f"--to {asked!r} holds no mapping")
    return found


def table(rows: list[list[str]]) -> str:
    """Rows of text as a table, the first one on top."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def prove(origin: Origin, source: PeriLlamaForCausalLM, folded: PeriLlamaForCausalLM, ids: Any, beside: Path) -> dict:
    """The source's logits are the folded model's: both loaded from disk on random tokens, and in memory on text.

    Raises:
        UserError: they differ by more than 1e-5 of the largest.
    """
    beside.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{beside.name}.", dir=beside.absolute().parent) as folder:
            write_model(folded, origin.checkpoint, Path(folder), torch.float32)
            record = compare(origin.checkpoint, Path(folder), origin.native, folded.config, NO_TEXT)
    except ConversionFailed as error:
        raise UserError(f"the exact part of the retrofit is not exact ({error}): nothing was written") from error
    found = {key: record[key] for key in ("largest_difference", "largest_logit", "tolerance")}
    if ids is not None:
        found["text"] = difference(source, folded, ids[:2])
    return found


@torch.no_grad()
def difference(one: Any, other: Any, ids: torch.Tensor) -> dict[str, float]:
    """The largest difference of logits on ids, and the largest logit.

    Raises:
        UserError: it is above the tolerance of a conversion.
    """
    a, b = (model(input_ids=ids, use_cache=False).logits for model in (one, other))
    largest, apart = a.abs().max().item(), (a - b).abs().max().item()
    if not apart <= TOLERANCE * largest:
        raise UserError(f"logits differ by {apart:.3g} of {largest:.3g} on text: nothing was written")
    return {"largest_difference": apart, "largest_logit": largest}


def _calibrated(
    source: PeriLlamaForCausalLM, folded: PeriLlamaForCausalLM, plan: RetrofitPlan, samples: Samples, args: Any
) -> tuple[Calibrated, dict[str, Any]]:
    """The rule of lowest loss on the calibration text, and the record of all."""
    before = {name: measure_reference(source, ids) for name, ids in _texts(samples)}
    record: dict[str, Any] = {"source": {name: {"loss": one.loss} for name, one in before.items()}, "rules": {}}
    best: Calibrated | None = None
    tell("rule", "loss, calibration", "loss, other text", "KL to the source")
    tell("source", *(f"{before[name].loss:.4f}" for name, _ in _texts(samples)), "0")
    for rule in args.rules:
        found = calibrate(folded, plan, samples.calibration, rule, args.soften)
        after = {name: measure(found.model, ids, before[name]) for name, ids in _texts(samples)}
        record["rules"][rule] = after | {"places": found.places}
        numbers = after["calibration"]["loss"], after["check"]["loss"], after["check"]["kl"]
        tell(rule, *(f"{number:.4f}" for number in numbers))
        losses = {name: one["calibration"]["loss"] for name, one in record["rules"].items()}
        if best is None or losses[rule] < losses[best.rule]:
            best = found
    assert best is not None
    return best, record | {"chosen": best.rule}


def tell(*cells: str) -> None:
    """A row of the table of rules, as soon as it is known."""
    print(f"{cells[0]:14}" + "".join(f"{cell:>19}" for cell in cells[1:]), flush=True)


def _texts(samples: Samples) -> list[tuple[str, torch.Tensor]]:
    return [("calibration", samples.calibration), ("check", samples.check)]


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    started = time.monotonic()
    to = read_placement(args.to)
    origin = find_origin(args.src, "SRC", args.revision)
    origin.config.residual_dtype = None  # a stream's dtype belongs to a run
    plan = make_plan(origin.config, to, args.src, args.keep)
    print(table([list(HEAD), *plan.rows()]))
    print("\n".join(plan.said()))
    if not plan.is_exact and args.data is None and not args.dry_run:
        inexact = ", ".join(change.slot for change in plan.changes if not change.exact)
        raise UsageError(f"--to {args.to} changes the function ({inexact}): give calibration text with --data")
    if args.dry_run:
        return
    healing = None
    if args.heal is not None:
        check_tokenizer(origin, TokenData(args.heal).tokenizer_path, "--heal")
        healing = recipes(
            Healing(args.heal, args.heal_tokens, args.heal_name or args.dst.name),
            *(args.src, args.dst, plan.new_slots, origin.config.max_position_embeddings),
        )
    samples = None
    if args.data is not None:
        tokens = min(args.tokens, origin.config.max_position_embeddings)
        asked = (args.samples, args.check_samples, tokens, args.seed, origin.config.vocab_size)
        samples = find_samples(find_tokenizer(origin.checkpoint, args.src), args.data, *asked)
    check_room(args.dst, 2 * sum(file.stat().st_size for file in origin.checkpoint.glob("*.safetensors")), "the model")
    source = load_weights(origin, "SRC")
    source.config.residual_dtype = None
    folded = fold(source, plan)
    proof = prove(origin, source, folded, None if samples is None else samples.check, args.dst)
    print(f"exact part: largest difference {proof['largest_difference']:.3g} of {proof['largest_logit']:.6g}")
    calibration: dict[str, Any] | None = None
    if plan.is_exact:
        model = build(plan.target, folded.state_dict())
    else:
        assert samples is not None
        best, calibration = _calibrated(source, folded, plan, samples, args)
        model = best.model
    model.generation_config = source.generation_config
    record = {
        "source": origin.record(hash_of(origin.checkpoint)),
        "to": to,
        "plan": [dict(zip(HEAD, row, strict=True)) for row in plan.rows()],
        "new_gains": plan.new_slots,
        "unties": plan.unties,
        "exact": proof,
        "samples": None if samples is None else samples.described,
        "soften": args.soften,
        "kept_layers": [layer + 1 for layer in args.keep],
        "calibration": calibration,
        "seconds": round(time.monotonic() - started, 1),
        "environment": describe_environment(torch.device("cpu")),
        "versions": {m.__name__: m.__version__ for m in (transformers, torch)} | {"modeling_periln": __version__},
    }
    with write_folder(args.dst) as folder:
        write_model(model, origin.checkpoint, folder, stored_dtype(origin.native))
        write_json(folder / RECORD, record)
        if healing is not None:
            write_recipes(folder, healing)
        probe = samples.check[:1] if samples is not None else torch.arange(min(8, model.config.vocab_size))[None]
        difference(model, load_causal_lm(folder, dtype=torch.float32), probe)
    print(f"{args.dst}: {origin.native.model_type} -> {args.to}", end="")
    print("" if calibration is None else f", calibrated by {calibration['chosen']}")
    for name in healing or ():
        print(f"heal it: periln pretrain --config {args.dst / FOLDER / name}")
