"""What a recipe costs, before it is run: `python -m scripts.plan RECIPE --gpus 8 --memory 80`.

Everything is computed from the recipe (scripts/costs.py, scripts/plan/memory.py); nothing is built, nothing is trained,
and no data need be there. `--measure` trains two steps of a small recipe on this CPU and counts the live tensors of
the second.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from modeling_periln import PeriLlamaConfig
from modeling_periln.conversions import admissible_exports
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import read_json
from periln.runkit.process import start_stage
from periln.runkit.recipes import apply_overrides, from_mapping, read_yaml
from periln.scripts.arguments.plan import check
from periln.scripts.costs import count_parameters, flops_per_token
from periln.scripts.gpus import GPUS
from periln.scripts.origin import adopt_origin, find_origin
from periln.scripts.plan.memory import Engines, Moment, Situation, peak, situation
from periln.scripts.recipe import Recipe

GIB = 2**30
CONVENTION = "6N + 12 L H Q T (PaLM, appendix B); N: all matrices and the LM head, not the embedding table"
SPARE = 0.1  # of a GPU's memory: CUDA context, NCCL, what the allocator cannot reuse


def load(path: Path, overrides: list[str], processes: int) -> tuple[Recipe, PeriLlamaConfig, str]:
    """A recipe, its model's configuration, and where the size of the vocabulary is from.

    Raises:
        UsageError, UserError: what `Recipe.check` refuses, or a data folder that cannot be read.
    """
    recipe = from_mapping(Recipe, apply_overrides(read_yaml(path), overrides, Recipe))
    if adopt_origin(recipe) is not None:
        recipe.check(processes)
        return recipe, recipe.model_config(), "of init_from"
    recipe.check(processes)
    index = Path(recipe.data) / "index.json"
    if "vocab_size" in recipe.model:
        return recipe, recipe.model_config(), "the recipe's"
    if index.exists():
        return recipe, recipe.model_config(vocab_size=read_json(index)["vocab_size"]), "the data's"
    return recipe, recipe.model_config(), "of cl100k_base, padded; there are no data yet"


def teacher_of(recipe: Recipe, engine: Engines = "single") -> PeriLlamaConfig | None:
    """The configuration of the model that `distill_from` names; None without one.

    Raises:
        UsageError: `engine` shards the model, which the trainer refuses with a teacher; or there is no such model.
    """
    if recipe.distill_from is None:
        return None
    if engine not in ("single", "ddp"):
        raise UsageError(f"distill_from: {engine} shards the model, and a teacher is not: plan with --engine ddp")
    return find_origin(recipe.distill_from, "distill_from").config


def largest_micro_batch(
    recipe: Recipe, config: PeriLlamaConfig, here: Situation, limit: float, device: str
) -> tuple[int | None, float]:
    """(sequences, bytes) of the largest micro batch whose peak is within `limit` bytes, and that divides a process's
    share of the batch; (None, bytes of one sequence) where not even that fits."""
    local, one = here.local_batch, 0.0
    for micro in [n for n in range(local, 0, -1) if local % n == 0]:
        s = situation(recipe, here.processes, here.engine, micro, device, here.teacher)
        one = peak(config, dataclasses.replace(s, checkpointing=here.checkpointing)).total
        if one <= limit:
            return micro, one
    return None, one


def plan(
    recipe: Recipe,
    config: PeriLlamaConfig,
    gpus: int = 8,
    memory_gib: float = 80,
    mfu: float = 0.4,
    flops_per_gpu: float | None = 989e12,
    engine: Engines = "fsdp2",
    device: str = "cuda",
) -> dict[str, Any]:
    """The plan as data: what `--json` prints. Bytes are bytes, times are hours."""
    teacher = teacher_of(recipe, engine if gpus > 1 else "single")
    count, here = count_parameters(config), situation(recipe, gpus, engine, device=device, teacher=teacher)
    own = flops_per_token(config, recipe.sequence_length)
    taught = flops_per_token(teacher, recipe.sequence_length) / 3 if teacher else 0.0  # its forward pass alone
    per_token = own + taught
    tokens = recipe.steps * recipe.batch_size * recipe.sequence_length
    rate: float | None = mfu * flops_per_gpu * gpus / per_token if flops_per_gpu else None
    limit = (1 - SPARE) * memory_gib * GIB
    either: dict[str, Moment] = {}
    largest = {}
    for name, checkpointing in (("without_checkpointing", False), ("with_checkpointing", True)):
        s = dataclasses.replace(here, checkpointing=checkpointing)
        either[name] = peak(config, s)
        largest[name] = largest_micro_batch(recipe, config, s, limit, device)
    now = either["with_checkpointing" if recipe.activation_checkpointing else "without_checkpointing"]
    return {
        "name": recipe.name,
        "parameters": {"total": count.total, "non_embedding": count.non_embedding}
        | {"embedding": count.embedding, "head": count.head},
        "flops_per_token": own,
        "teacher_flops_per_token": taught,
        "flops_convention": CONVENTION,
        "tokens": tokens,
        "tokens_per_second": rate,
        "hours": tokens / rate / 3600 if rate else None,
        "gpu_hours": tokens / rate / 3600 * gpus if rate else None,
        "assumed": {"device": device, "processes": gpus, "engine": here.engine, "memory_gib": memory_gib}
        | {"spare": SPARE, "mfu": mfu, "flops_per_gpu": flops_per_gpu},
        "micro_batch_size": here.micro,
        "memory": {
            "peak_bytes": round(now.total),
            "peak_moment": now.name,
            "fits": now.total <= limit,
            "parts": {part: round(size) for part, size in now.parts.items() if size},
            "activation_checkpointing": recipe.activation_checkpointing,
        }
        | {name: round(moment.total) for name, moment in either.items()},
        "largest_micro_batch": {
            name: {"sequences": micro, "peak_bytes": round(size)} for name, (micro, size) in largest.items()
        },
        "exports": admissible_exports(config),
    }


# --- in words ------------------------------------------------------------------------------------------------


def short(number: float) -> str:
    """1234567 as 1.235M."""
    for size, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def _gib(size: float) -> str:
    return f"{size / GIB:8.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:8.2f} MiB"


def describe(p: dict[str, Any], recipe: Recipe, config: PeriLlamaConfig, vocabulary: str) -> str:
    """The plan for a terminal."""
    count, a, memory = p["parameters"], p["assumed"], p["memory"]
    width = f"{config.hidden_size} wide, FFN {config.intermediate_size}, {config.num_attention_heads} heads"
    head = short(count["head"]) if count["head"] else "tied"
    batch = f"{recipe.steps:,} steps x {recipe.batch_size} x {recipe.sequence_length:,}"
    time = "n/a: give --flops-per-gpu"
    if a["flops_per_gpu"]:
        at = f"{a['processes']} x {short(a['flops_per_gpu'])}FLOP/s at an MFU of {a['mfu']:.0%}"
        speed = f"{short(p['tokens_per_second'])} tokens/s ({at})"
        time = f"{p['hours']:,.1f} hours, {p['gpu_hours']:,.1f} GPU-hours, {speed}"
    lines = [
        f"{p['name']}: {config.num_hidden_layers} layers, {width} of {config.head_dim}",
        f"vocabulary    {config.vocab_size:,} ({vocabulary})",
        f"parameters    {short(count['total'])}, {short(count['non_embedding'])} without embeddings "
        f"(table {short(count['embedding'])}, head {head})",
        f"FLOPs/token   {short(p['flops_per_token'])}: {CONVENTION}"
        + (f"; and {short(p['teacher_flops_per_token'])} of the teacher" if recipe.distill_from else ""),
        f"tokens        {short(p['tokens'])} = {batch}",
        f"time          {time}",
    ]
    twice = "with" if memory["activation_checkpointing"] else "without"
    what = "process" if a["device"] == "cpu" else "GPU"
    lines += [
        "",
        f"memory a {what} at its peak ({memory['peak_moment']}); {a['engine']}, micro batch {p['micro_batch_size']}, "
        f"{recipe.precision.mode}, {twice} activation checkpointing:",
        *(f"  {_gib(size)}  {part}" for part, size in memory["parts"].items()),
        f"  {_gib(memory['peak_bytes'])}  together"
        + ("" if memory["fits"] else f": does not fit {a['memory_gib']:g} GiB less {SPARE:.0%}"),
        *(["  an upper bound: train_only is counted as if everything were trained"] if recipe.train_only else []),
        "",
        f"largest micro batch in {a['memory_gib']:g} GiB less {SPARE:.0%} spare:",
    ]
    for name, entry in p["largest_micro_batch"].items():
        found = (
            f"{entry['sequences']:4d} sequence{'s' * (entry['sequences'] > 1)}"
            if entry["sequences"]
            else "none fits, one"
        )
        lines.append(f"  {found:14s} {_gib(entry['peak_bytes'])}  {name.replace('_', ' activation ')}")
    lines += ["", "exports:"]
    lines += [f"  {target:12s} {'no: ' + reason if reason else 'yes'}" for target, reason in p["exports"].items()]
    return "\n".join(lines)


def measure(recipe: Recipe, config: PeriLlamaConfig) -> dict[str, Any]:
    """The step's live tensors counted on this CPU, with the plan for it.

    Raises:
        UserError: the plan says that it does not fit this machine's free memory.
    """
    from periln.scripts.plan.memory_meter import measure_step  # with Accelerate, which a plan alone does not need

    expected = peak(config, situation(recipe, device="cpu", teacher=teacher_of(recipe)))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if expected.total > 0.8 * free:
        raise UserError(f"--measure would need {_gib(expected.total).strip()}, and this machine has too little free")
    counted = measure_step(recipe, config)
    return {
        "planned_bytes": round(expected.total),
        "counted_bytes": counted.peak_bytes,
        "error": expected.total / counted.peak_bytes - 1,
        "planned_at": expected.name,
        "counted_at": counted.peak_at,
        "rss_bytes": counted.rss_bytes,
    }


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    device = args.device or from_mapping(Recipe, apply_overrides(read_yaml(args.recipe), args.set, Recipe)).device
    device = "cuda" if device == "auto" else device
    gpus = args.gpus or (1 if device == "cpu" else 8)
    recipe, config, vocabulary = load(args.recipe, args.set, gpus)
    known, memory = GPUS[args.gpu]
    flops = args.flops_per_gpu or (None if device == "cpu" else known)
    planned = plan(recipe, config, gpus, args.memory or memory, args.mfu, flops, args.engine, device)
    if args.measure:
        planned["measured"] = measure(recipe, config)
    if args.json:
        print(json.dumps(planned, indent=2))
        return
    print(describe(planned, recipe, config, vocabulary))
    if args.measure:
        m = planned["measured"]
        print(f"\ncounted in a step on this CPU ({m['counted_at']}):")
        print(f"  {_gib(m['counted_bytes'])}  live tensors at their peak")
        print(f"  {_gib(m['planned_bytes'])}  planned for this CPU ({m['planned_at']}): {m['error']:+.1%}")
        print(f"  {_gib(m['rss_bytes'])}  resident set of the process (with Python and its libraries)")
