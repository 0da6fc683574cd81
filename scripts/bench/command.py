"""How fast is PeriLlama compared with Transformers' own models? `python -m scripts.bench --out bench/`

Every pair of models has the same weights (by `modeling_periln.convert`; the same tensors, since a product's time
depends on where in memory they lie) and does the same work. A and B are measured in turn, in one process, in an order
that alternates, so that a machine's slow minutes fall on both, and both are built anew every few pairs; what is
reported is the ratio of the medians with a bootstrap interval over the pairs. Two cases compare a model with itself:
their distance from 1 is the machine's noise, and no other ratio is more certain than that. `bench.json` is written
after each case. What is in it, of this machine and with as many pairs at least, is not measured again unless `--again`
or other `--tokens` are given.

The training step is forward, loss, backward and AdamW; labels are the ids, no padding.
"""

import argparse
import ctypes
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from modeling_periln.conversions import export_recipe
from modeling_periln.convert import to_native
from modeling_periln.norms import PeriLlamaRMSNorm
from modeling_periln.placements import PLACEMENTS
from periln.runkit.environment import describe_environment
from periln.runkit.errors import UsageError, UserError, did_you_mean
from periln.runkit.folder import read_json, write_json, write_text
from periln.runkit.process import python_m, start_stage
from periln.runkit.progress import progress_bar
from periln.scripts.arguments.bench import check
from periln.scripts.bench.recorder_pair import ITSELF, recorder_pair
from periln.scripts.bench.recorder_pair import SIZES as RECORDED
from periln.scripts.bench.results import interval_of_ratio, table
from periln.scripts.bench.results import verdict as verdict
from periln.scripts.bench.trainer_pair import BARE, HF, SIZES, trainer_pair

WARM_UP = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
WIDE = SMALL | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
TALL_VOCABULARY = WIDE | {"vocab_size": 100_352, "num_hidden_layers": 1}
MEMORY_TOKENS = 8192


@dataclass(frozen=True)
class Case:
    """What is compared with what, at least how many times its speed (at most, for memory), and how it is measured."""

    name: str
    what: str
    against: str
    target: float
    tokens: tuple[int, int]  # batch, sequence
    build: Callable[["Case", torch.device], tuple[Callable[[], Any], Callable[[], Any]]]
    dtype: str = "fp32"
    compiled: bool = False
    sizes: dict[str, int] | None = None
    placements: tuple[str, str | None] = ("pre", None)  # ours, and either ours again or None: Transformers' own
    native: str | None = None
    new_tokens: int = 0


def build_model(case: Case, placement: str, device: torch.device) -> PeriLlamaForCausalLM:
    """A PeriLlama of the case's size in its dtype, from seed 0."""
    torch.manual_seed(0)
    embedding_norm = False if case.native and PLACEMENTS[placement].embedding_norm else None  # as HyperCLOVA X
    config = PeriLlamaConfig(**(case.sizes or SMALL), norm_placement=placement, embedding_norm=embedding_norm)
    return PeriLlamaForCausalLM(config).to(device, DTYPES[case.dtype])


def models(case: Case, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Ours and the other, with the same tensors as weights wherever they are equal."""
    ours, other = case.placements
    first = build_model(case, ours, device)
    second = to_native(first, case.native) if case.native else build_model(case, other, device)
    weights, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    sources = {name: name for name in theirs}
    if case.native:
        sources = {name: of[0] for name, (of, _) in export_recipe(first.config, case.native).items()}
    for name, source in sources.items():
        if source in weights and torch.equal(weights[source], theirs[name]):
            owner, _, leaf = name.rpartition(".")
            setattr(second.get_submodule(owner), leaf, weights[source])
    return first, second


def training_pair(case: Case, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """One training step of each; the weights that they share have one optimizer state."""
    first, second = models(case, device)
    optimizer = torch.optim.AdamW(dict.fromkeys([*first.parameters(), *second.parameters()]), lr=1e-6)

    def step_of(model: PreTrainedModel) -> Callable[[], None]:
        model.train()
        forward = torch.compile(model) if case.compiled else model
        ids = torch.randint(0, model.config.vocab_size, case.tokens, device=device)

        def step() -> None:
            forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return step_of(first), step_of(second)


def decoding_pair(case: Case, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Greedy decoding of `new_tokens` tokens by each, with a dynamic cache."""

    def decode_of(model: PreTrainedModel) -> Callable[[], None]:
        model.eval()
        ids = torch.randint(0, model.config.vocab_size, case.tokens, device=device)
        n = case.new_tokens

        def decode() -> None:
            model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)

        return decode

    first, second = models(case, device)
    return decode_of(first), decode_of(second)


def norm_pair(case: Case, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward of a norm with its fused backward pass, and of the other that the case names."""
    x = torch.randn(*case.tokens, 512, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    ours, plain = PeriLlamaRMSNorm(512).to(device), PeriLlamaRMSNorm(512).to(device)
    plain.fused_backward = False
    others = {"plain": plain, "F.rms_norm": nn.RMSNorm(512, eps=1e-6), "F.layer_norm": nn.LayerNorm(512)}
    other = others[case.against].to(device)

    def run(norm: nn.Module) -> Callable[[], None]:
        return lambda: torch.autograd.grad(norm(x), (x, norm.weight), grad)

    return run(ours), run(other)


def _cases() -> Iterator[Case]:
    shared: dict[str, Any]
    for target, compiled in ((1.0, False), (0.97, True)):
        how = "compiled" if compiled else "eager"
        for dtype in DTYPES:
            for ours, native in (("pre", "llama"), ("peri", "hyperclovax")):
                name, what = f"train-{ours}-{dtype}-{how}", f"training step, {ours}, {dtype.upper()}, {how}"
                shared = {"dtype": dtype, "compiled": compiled, "placements": (ours, None), "native": native}
                yield Case(name, what, native, target, (2, 256), training_pair, **shared)
    what = "training step, peri, FP32, compiled, d 1024"
    pair: dict[str, Any] = {"compiled": True, "sizes": WIDE, "placements": ("peri", "pre")}
    yield Case("peri-over-pre", what, "our own pre", 0.97, (1, 2048), training_pair, **pair)
    for batch in (1, 16):
        yield Case(
            f"decode-{batch}",
            f"decoding, batch {batch}, FP32",
            "llama",
            0.97,
            (batch, 32),
            decoding_pair,
            native="llama",
            new_tokens=32,
        )
    shared = {"placements": ("pre", "pre")}
    yield Case("same-train", "training step, pre, FP32, eager", "itself", 0.0, (2, 256), training_pair, **shared)
    same: dict[str, Any] = {"new_tokens": 32} | shared
    yield Case("same-decode", "decoding, batch 1, FP32", "itself", 0.0, (1, 32), decoding_pair, **same)
    for other, target in (("plain", 1.0), ("F.rms_norm", 1.0), ("F.layer_norm", 0.0)):
        yield Case(f"norm-{other}", "RMSNorm, forward and backward", other, target, (8, 512), norm_pair)
    for size, sizes in SIZES.items():
        for dtype in ("fp32", "fp16"):
            for how in ("eager", "compiled"):
                shared = {"dtype": dtype, "compiled": how == "compiled", "sizes": sizes}
                name, tokens = f"trainer-{size}-{dtype}-{how}", (4 if size == "1m" else 2, 256)
                what = f"the trainer's step, {size.upper()}, {dtype.upper()}, {how}"
                yield Case(f"{name}-hf", what, HF, 1.0, tokens, trainer_pair, **shared)
                yield Case(f"{name}-bare", what, BARE, 0.0, tokens, trainer_pair, **shared)
    for dtype in ("fp32", "fp16"):
        for how in ("eager", "compiled"):
            shared = {"dtype": dtype, "compiled": how == "compiled", "sizes": RECORDED}
            what = f"the step with the recorder, d 256, {dtype.upper()}, {how}, CPU time"
            yield Case(f"recorder-{dtype}-{how}", what, "without it", 0.99, (8, 128), recorder_pair, **shared)
            what = what.replace("with the", "without the")
            yield Case(f"recorder-{dtype}-{how}-same", what, ITSELF, 0.0, (8, 128), recorder_pair, **shared)


MEMORY_CASE = "memory"
CASES = {case.name: case for case in _cases()}


def seconds_of(step: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call, with the device's queue empty before and after; those it gives itself, if any."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    own = step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if isinstance(own, float):
        return own
    return time.perf_counter() - start


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed: else a step takes 16,000 page faults or none, as the heap happens to lie.

    Other C libraries have no such switches, and are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h; -1 as a threshold: never trim
    for parameter, value in ((trim_threshold, -1), (top_pad, 2**28), (mmap_max, 0)):
        mallopt(parameter, value)


def measure(case: Case, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Time the two sides of a case in turn, with models that are built anew every `pairs_a_build` pairs."""
    times = np.zeros((2, args.pairs))
    with progress_bar(args, args.pairs, case.name, "pair") as bar:
        for start in range(0, args.pairs, args.pairs_a_build):
            torch._dynamo.reset()
            gc.collect()
            sides = case.build(case, device)
            for i in range(start - WARM_UP, min(start + args.pairs_a_build, args.pairs)):
                for side in (0, 1) if i % 2 == 0 else (1, 0):
                    seconds = seconds_of(sides[side], device)
                    if i >= start:
                        times[side, i] = seconds
                bar.update(int(i >= start))
            facts = getattr(sides[0], "facts", None)
            more = facts(np.median(times, axis=1).tolist()) if facts and i + 1 == args.pairs else {}
            del sides
    ratio, low, high = interval_of_ratio(*times)
    return {
        "what": case.what,
        "against": case.against,
        "at_least": case.target or None,
        "ratio": ratio,
        "interval": [low, high],
        "pairs": args.pairs,
        "pairs_a_build": args.pairs_a_build,
        "median_seconds": np.median(times, axis=1).tolist(),
        "batch": case.tokens[0],
        "sequence": case.tokens[1],
        "new_tokens": case.new_tokens,
        "sizes": None if case.build is norm_pair else case.sizes or SMALL,
    } | more


def peak_memory(side: str, device: torch.device) -> int:
    """Bytes at the peak of one forward and backward pass of one layer under a tall vocabulary; for a fresh process.

    On a CPU the process's peak resident set less what it was after the imports; on a GPU the allocator's peak.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.manual_seed(0)
    config = PeriLlamaConfig(**TALL_VOCABULARY, norm_placement="pre")
    if side == "ours":
        model, extra = PeriLlamaForCausalLM(config).to(device), {"skip_logits": True, "loss_scale": 1.0}
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        model, extra = LlamaForCausalLM(LlamaConfig(**TALL_VOCABULARY)).to(device), {}
    ids = torch.randint(0, config.vocab_size, (1, MEMORY_TOKENS), device=device)
    model(input_ids=ids, labels=ids, use_cache=False, **extra).loss.backward()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def measure_memory(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of ours and of Llama, two fresh processes each: it varies by no more than a few per cent."""
    peaks: dict[str, list[int]] = {"ours": [], "llama": []}
    with progress_bar(args, 4, MEMORY_CASE, "process") as bar:
        for i in range(4):
            side = "ours" if i % 2 == 0 else "llama"
            command = [*python_m("scripts.bench"), "--peak-memory-of", side, "--device", device.type]
            if args.threads:
                command += ["--threads", str(args.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(
                    f"{MEMORY_CASE}: the process of {side} ended with {done.returncode}: {done.stderr[-300:]}"
                )
            peaks[side].append(int(done.stdout.strip().splitlines()[-1]))
            bar.update()
    ours, theirs = peaks["ours"], peaks["llama"]
    return {
        "what": "peak memory, forward and backward, FP32, the trainer's loss",
        "against": "llama",
        "at_most": 0.3,
        "ratio": statistics.median(ours) / statistics.median(theirs),
        "interval": [min(ours) / max(theirs), max(ours) / min(theirs)],
        "median_bytes": [statistics.median(ours), statistics.median(theirs)],
        "pairs": len(ours),
        "batch": 1,
        "sequence": MEMORY_TOKENS,
        "sizes": TALL_VOCABULARY,
    }


def is_enough(result: dict[str, Any], case: Case | None, args: argparse.Namespace) -> bool:
    """Whether a result that is there will do for what is asked for now; None is the case of the memory.

    Results without `pairs_a_build` are of a time when all pairs were of one build.
    """
    if case is None:
        return True
    same_tokens = not args.tokens or (result["batch"], result["sequence"]) == case.tokens
    return "pairs_a_build" in result and result["pairs"] >= args.pairs and same_tokens


def main(args: argparse.Namespace) -> None:
    if args.list:
        print(json.dumps({n: f"{c.what} against {c.against}" for n, c in CASES.items()}, indent=2))
        return
    start_stage(args)
    check(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.peak_memory_of:
        print(peak_memory(args.peak_memory_of, device))
        return
    keep_freed_memory()
    known = [*CASES, MEMORY_CASE]
    wanted = args.cases or known
    for name in wanted:
        if name not in known:
            raise UsageError(f"--cases {name!r} is not a case{did_you_mean(name, known)}: use some of {known}")
    environment = describe_environment(device)
    file = args.out / "bench.json"
    record: dict[str, Any] = {"environment": environment, "cases": {}}
    if file.exists():
        old = read_json(file)
        same = {k: v for k, v in old["environment"].items() if "commit" not in k and k != "uncommitted_changes"}
        if all(environment.get(k) == v for k, v in same.items()):
            record["cases"] = old["cases"]
        elif not args.again:
            raise UsageError(f"{file} was measured on another machine or version: give another --out, or --again")
    for name in wanted:
        case = CASES.get(name)
        if case and args.tokens and case.build in (training_pair, trainer_pair, recorder_pair):
            case = replace(case, tokens=tuple(args.tokens))
        old = record["cases"].get(name)
        if old and not args.again and is_enough(old, case, args):
            print(f"{name}: measured before, kept (--again measures it once more)", file=sys.stderr)
            continue
        record["cases"][name] = measure(case, device, args) if case else measure_memory(device, args)
        gc.collect()
        record["cases"] = {n: record["cases"][n] for n in known if n in record["cases"]}
        write_json(file, record)
        write_text(args.out / "bench.md", table(record) + "\n")
    print(table(record))
    print(f"\n{file}")
