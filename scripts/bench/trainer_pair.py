"""The trainer's own step, end to end, beside HF `Trainer` and beside a bare loop, both with the stock Llama.

The same weights (the same tensors), tokens read the same way, precision, clipping and fused AdamW. Ours has every
instrument on: recorder, statistics, records on the disk. HF `Trainer` is as its defaults make it, without saving. On a
CPU its `fp16=True` computes in FP32 without a word, so it is given this project's FP16 arithmetic; the dtypes of all
linear layers' outputs are compared. A call of a side is one step that does not count, in which HF `Trainer` sets itself
up and a side's code and memory become warm again, and a few that do; it gives the seconds of one.
"""

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import IO, Any

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from modeling_periln import PeriLlamaConfig
from modeling_periln.conversions import export_recipe
from modeling_periln.convert import to_native
from periln.runkit.environment import DtypeWitness
from periln.runkit.folder import RunFolder
from periln.runkit.fp16 import half_products, make_fp16_real
from periln.runkit.rates import attainable_flops
from periln.runkit.recipes import from_mapping
from periln.scripts.costs import flops_per_token
from periln.scripts.recipe import Recipe
from periln.scripts.synthetic_data import RandomTokens, synthetic_folder
from periln.scripts.training.trainer import Trainer

STEPS = 3  # of a call
HF, BARE = "HF Trainer", "a bare loop"
# The models of scripts/recipes/base/1m.yaml and 10m.yaml.
SIZES = {
    "1m": {"hidden_size": 128, "intermediate_size": 480, "num_hidden_layers": 4, "num_attention_heads": 2},
    "10m": {"hidden_size": 256, "intermediate_size": 960, "num_hidden_layers": 10, "num_attention_heads": 4},
}
SIZES = {name: {"vocab_size": 8192, "max_position_embeddings": 1024} | size for name, size in SIZES.items()}


class Windows(torch.utils.data.Dataset):
    """Rows of `length` tokens, as many as anybody asks for."""

    def __init__(self, tokens: RandomTokens, length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        start = i * self.length % (len(self.tokens) - self.length)
        ids = torch.from_numpy(self.tokens.read(start, start + self.length))
        return {"input_ids": ids, "labels": ids}


def seconds_a_step(step: Callable[[], torch.Tensor | None]) -> float:
    """Of `STEPS`, after one that does not count; a step may return what is to be waited for."""
    step()
    start = time.perf_counter()
    for _ in range(STEPS):
        last = step()
    if last is not None:
        last.item()
    return (time.perf_counter() - start) / STEPS


class Ours:
    """Calls make steps of the project's trainer; `more` are fields of its recipe."""

    def __init__(self, case: Any, device: torch.device, folder: Path, tokens: RandomTokens, **more: Any):
        batch, length = case.tokens
        fp16 = case.dtype == "fp16"
        recipe: dict[str, Any] = {
            "name": "ours", "data": str(folder / "data"), "steps": 10**6, "batch_size": batch,
            "sequence_length": length, "model": case.sizes | {"norm_placement": "pre"}, "device": device.type,
            "compile": case.compiled, "trackers": [], "optimizer": {"schedule": "constant", "warmup": 0.0},
            "precision": {"mode": case.dtype, "residual_dtype": "float16" if fp16 else None},
        }  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.trainer = Trainer(from_mapping(Recipe, recipe | more), RunFolder(folder / "ours"), tokens)
        self.trainer.run.path.mkdir(parents=True, exist_ok=True)

    def __call__(self) -> float:
        with open(self.trainer.run.metrics_path, "a") as metrics:
            return seconds_a_step(lambda: self._step(metrics))

    def _step(self, metrics: IO[str]) -> None:
        record = self.trainer._train_step(witness=self.trainer.step == 0)
        metrics.write(json.dumps(record, allow_nan=False) + "\n")
        metrics.flush()
        self.trainer.step += 1


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


class EmulatedTrainer(transformers.Trainer):
    """HF's, whose FP16 on a CPU is FP16 too."""

    half_products: AbstractContextManager[Any] = nullcontext()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.half_products = make_fp16_real(self.accelerator)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.half_products:
            found: torch.Tensor = super().training_step(*args, **kwargs)
        return found


class Theirs:
    """Calls make steps of HF `Trainer`, each time from its beginning."""

    def __init__(self, case: Any, device: torch.device, folder: Path, tokens: RandomTokens, model: PreTrainedModel):
        self.clock = Clock()
        args = TrainingArguments(
            output_dir=str(folder / "theirs"), max_steps=STEPS + 1, per_device_train_batch_size=case.tokens[0],
            use_cpu=device.type == "cpu", fp16=case.dtype == "fp16", report_to=[], save_strategy="no",
            disable_tqdm=True, optim="adamw_torch_fused", lr_scheduler_type="constant", learning_rate=2e-3,
            max_grad_norm=1.0, weight_decay=0.033,
        )  # fmt: skip
        data = Windows(tokens, case.tokens[1])
        self.trainer = EmulatedTrainer(model=model, args=args, train_dataset=data, callbacks=[self.clock])
        self.trainer.remove_callback(transformers.PrinterCallback)

    def __call__(self) -> float:
        self.clock.ends.clear()
        self.trainer.train()
        return (self.clock.ends[-1] - self.clock.ends[0]) / STEPS


class Bare:
    """Calls make steps of a loop that a user writes in ten lines."""

    def __init__(self, case: Any, device: torch.device, folder: Path, tokens: RandomTokens, model: PreTrainedModel):
        self.case, self.device, self.model, self.number = case, device, model, 0
        self.data = Windows(tokens, case.tokens[1])
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.033, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=case.dtype == "fp16")

    def _arithmetic(self) -> ExitStack:
        stack = ExitStack()
        if self.case.dtype == "fp16":
            stack.enter_context(half_products() if self.device.type == "cpu" else nullcontext())
            stack.enter_context(torch.autocast(self.device.type, dtype=torch.float16))
        return stack

    def __call__(self) -> float:
        return seconds_a_step(self._step)

    def _step(self) -> torch.Tensor:
        rows = range(self.number, self.number + self.case.tokens[0])
        self.number += len(rows)
        ids = torch.stack([self.data[i]["input_ids"] for i in rows]).to(self.device)
        with self._arithmetic():
            loss: torch.Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss


def stock_llama(ours: Any) -> PreTrainedModel:
    """A `LlamaForCausalLM` on the same tensors: a product's time depends on where in memory its factors lie."""
    other: PreTrainedModel = to_native(ours, "llama")
    weights = dict(ours.named_parameters())
    for name, (sources, _) in export_recipe(ours.config, "llama").items():
        owner, _, leaf = name.rpartition(".")
        assert torch.equal(other.get_parameter(name), weights[sources[0]])
        setattr(other.get_submodule(owner), leaf, weights[sources[0]])
    return other.to(ours.device).train()


def dtypes_of(model: nn.Module, side: Callable[[], Any]) -> list[str]:
    """The dtypes of all linear layers' outputs in a call of a side."""
    with DtypeWitness(model) as seen:
        side()
    return sorted(seen.report()["linear_outputs"])


def trainer_pair(case: Any, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Our trainer and what the case compares it with (`HF` or `BARE`); the first has `facts`, of median seconds."""
    place = tempfile.TemporaryDirectory(prefix="bench-")
    folder = Path(place.name)
    tokens = RandomTokens(synthetic_folder(folder), case.sizes["vocab_size"])
    ours = Ours(case, device, folder, tokens)
    model = stock_llama(ours.trainer.model)
    theirs = (Theirs if case.against == HF else Bare)(case, device, folder, tokens, model)
    dtypes = None
    if case.compiled:
        from periln.runkit.compiled import compile_options

        model.compile(dynamic=False, options=compile_options(case.dtype, device.type))
    else:
        dtypes = [dtypes_of(m, side) for m, side in ((ours.trainer.model, ours), (model, theirs))]

    def facts(seconds: list[float]) -> dict[str, Any]:
        config: PeriLlamaConfig = ours.trainer.model.config
        count, attainable = case.tokens[0] * case.tokens[1], attainable_flops(device, torch.float16)
        rates = [count / one for one in seconds]
        return {
            "tokens_per_second": rates,
            "attainable_flops": attainable,
            "share_of_attainable": [r * flops_per_token(config, case.tokens[1]) / attainable for r in rates],
            "linear_output_dtypes": dtypes,
        }

    ours.facts, ours.place = facts, place  # type: ignore[attr-defined]
    return ours, theirs
