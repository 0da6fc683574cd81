"""Section `speed`: tokens/s, MFU and peak memory of the trainer's step, beside the plan, and what each part costs."""

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from modeling_periln.loss import chunked_losses, softmax_part
from periln.runkit.rates import attainable_flops, seconds_of
from periln.scripts.costs import flops_per_token
from periln.scripts.gpu_check.notes import Notes
from periln.scripts.gpu_check.place import Place, step
from periln.scripts.plan.memory import peak, situation
from periln.scripts.recipe import Flight, Precision, Recipe
from periln.scripts.training.trainer import Trainer, peak_flops

PAIRS = 10
CHUNKS = (512, 1024, 2048, 4096)


def seconds_of_step(place: Place, trainer: Trainer) -> float:
    place.synchronize()
    start = time.perf_counter()
    step(trainer)
    place.synchronize()
    return time.perf_counter() - start


class Rates:
    """Turns seconds of a step into what the notes keep."""

    def __init__(self, place: Place):
        self.place = place
        self.attainable = attainable_flops(place.device, torch.float16)
        self.sheet = peak_flops(place.device)

    def __call__(self, recipe: Recipe, trainer: Trainer, times: list[float]) -> dict[str, Any]:
        rate = recipe.batch_size * recipe.sequence_length / statistics.median(times)
        flops = rate * flops_per_token(trainer.model.config, recipe.sequence_length)
        planned = peak(trainer.model.config, situation(recipe, device=self.place.device.type)).total
        return {
            "tokens_per_second": rate,
            "mfu_of_the_data_sheet": flops / self.sheet if self.sheet else None,
            "share_of_attainable_products": flops / self.attainable,
            "peak_memory_bytes": trainer.memory.bytes(),
            "planned_bytes": round(planned),
            "steps": len(times),
        }


def measure(place: Place, notes: Notes, rates: Rates, name: str, recipe: Recipe, steps: int = 3) -> float:
    """Median seconds of a recipe's step; what the rest of the notes has of it is under `name`."""
    trainer = place.trainer(recipe)
    for witness in (True, False):
        step(trainer, witness=witness)
    times = [seconds_of_step(place, trainer) for _ in range(steps)]
    notes.measure(name, rates(recipe, trainer, times))
    trainer.batches.close()
    return statistics.median(times)


def measure_pairs(place: Place, notes: Notes, rates: Rates) -> float:
    """`pre` and `peri` in turn; returns the seconds of a step of `peri`."""
    recipes = {name: place.large(name) for name in ("pre", "peri")}
    trainers = {}
    for name, recipe in recipes.items():
        trainers[name] = place.trainer(recipe)
        for witness in (True, False):
            step(trainers[name], witness=witness)
    times: dict[str, list[float]] = {name: [] for name in recipes}
    for i in range(PAIRS):
        for name in ("pre", "peri") if i % 2 == 0 else ("peri", "pre"):
            times[name].append(seconds_of_step(place, trainers[name]))
        if notes.left < 10:
            break
    for name, recipe in recipes.items():
        found = rates(recipe, trainers[name], times[name])
        found["peak_memory_bytes"] = None  # two models were there
        notes.measure(name, found)
        trainers[name].batches.close()
    middle = {name: statistics.median(found) for name, found in times.items()}
    notes.measure("peri_over_pre_seconds", middle["peri"] / middle["pre"])
    return middle["peri"]


def measure_loss(place: Place, notes: Notes, recipe: Recipe) -> None:
    """Seconds of the loss and its gradient alone, by tokens a chunk."""
    width, vocabulary = recipe.model["hidden_size"], recipe.model["vocab_size"]
    tokens = (recipe.micro_batch_size or 1) * recipe.sequence_length
    head = nn.Linear(width, vocabulary, bias=False, device=place.device)
    hidden = torch.randn(tokens, width, device=place.device, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,), device=place.device)
    softmax = torch.compile(softmax_part, dynamic=False) if recipe.compile else softmax_part
    found = {}
    for chunk in CHUNKS:

        def work(chunk: int = chunk) -> None:
            with torch.autocast(place.device.type, dtype=torch.float16):
                loss, _ = chunked_losses(hidden, head, targets, tokens, chunk, loss_scale=1.0, softmax=softmax)
            loss.backward()
            head.weight.grad = hidden.grad = None

        if notes.has_time(f"loss in chunks of {chunk}", 8):
            found[chunk] = seconds_of(place.device, work, repeats=3)
            notes.measure("loss_seconds_by_chunk", found)


def check_speed(place: Place, notes: Notes) -> None:
    rates = Rates(place)
    middle = measure_pairs(place, notes, rates)
    notes.check("steps are timed", middle > 0, middle, "above 0 seconds")
    base = place.large("peri")
    no_stream = replace(base.precision, mode="bf16", residual_dtype="bfloat16")
    variants = {  # name: recipe, and the seconds that it wants
        "without_recorder": (replace(base, flight=Flight(steps=0)), 12),
        "eager": (replace(base, compile=False), 8),
        "bf16": (replace(base, precision=no_stream), 20),
        "micro_batch_of_4": (replace(base, micro_batch_size=4), 20),
        "fp32": (replace(base, precision=Precision(mode="fp32", residual_dtype=None)), 20),
    }
    for name, (recipe, seconds) in variants.items():
        if name == "fp32" and not place.toy:
            continue  # FP32 at this size says nothing about the FP16 trainer
        if notes.has_time(name, 1 if place.toy else seconds):
            alone = measure(place, notes, rates, name, recipe)
            if name == "without_recorder":
                notes.measure("recorder_share_of_a_step", 1 - alone / middle)
    if notes.has_time("loss", 1 if place.toy else 10):
        measure_loss(place, notes, base)
    if notes.has_time("memory", 1 if place.toy else 10):
        measure(place, notes, rates, "alone", base)
        found = notes.found["measured"]["alone"]
        ratio = found["peak_memory_bytes"] / found["planned_bytes"]
        notes.measure("peak_memory_over_plan", ratio)
        if not place.toy:  # on a CPU the peak is the process's, interpreter and libraries included
            notes.check("peak memory beside the plan", 0.7 < ratio < 1.3, ratio, "0.7 to 1.3")
