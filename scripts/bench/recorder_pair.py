"""What the flight recorder costs: the trainer's step with it and without, or two without, by the process's CPU time.

Wall-clock time of a busy machine cannot resolve a cost of 1 %. By CPU time 20 pairs gave it to 1 % there, so that some
300 resolve 0.3 %; the pair of two steps without a recorder shows beside it what is noise. Both trainers have one set of
weights and one optimizer, read the same tokens in the same order, and write their records as a run does. A call is one
step.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from periln.scripts.bench.trainer_pair import Ours
from periln.scripts.synthetic_data import RandomTokens, synthetic_folder

ITSELF = "itself without it"
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 960,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}


class Steps(Ours):
    """Calls make one step, with the recorder or without; no layer statistics after the first."""

    def __init__(self, case: Any, device: torch.device, folder: Path, tokens: RandomTokens, recorder: bool):
        model = case.sizes | {"norm_placement": "peri"}
        more: dict[str, Any] = {} if recorder else {"flight": {"steps": 0}}
        if case.dtype == "fp16":  # a loss scale that skips no step: one that is skipped costs less
            more["precision"] = {"mode": "fp16", "residual_dtype": "float16", "initial_loss_scale": 1024.0}
        super().__init__(case, device, folder, tokens, model=model, layer_stats_every=10**6, **more)
        if not recorder:
            self.trainer.layer_stats.detach()  # a compiled run has its hooks either way

    def share(self, other: "Steps") -> None:
        """Train `other`'s weights with its optimizer: where tensors lie in memory decides about their speed too."""
        for name, parameter in other.trainer.model.named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(self.trainer.model.get_submodule(owner), leaf, parameter)
        self.trainer.engine.optimizer = other.trainer.engine.optimizer

    def __call__(self) -> float:
        start = time.process_time()
        with open(self.trainer.run.metrics_path, "a") as metrics:
            self._step(metrics)
        return time.process_time() - start


def recorder_pair(case: Any, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The step with the recorder (without, against `ITSELF`) and the step without."""
    place = tempfile.TemporaryDirectory(prefix="bench-")
    folder = Path(place.name)
    tokens = RandomTokens(synthetic_folder(folder), case.sizes["vocab_size"])
    (folder / "other").mkdir()
    (folder / "other" / "data").symlink_to(folder / "data")
    first = Steps(case, device, folder, tokens, recorder=case.against != ITSELF)
    second = Steps(case, device, folder / "other", tokens, recorder=False)
    second.share(first)
    first.place = place  # type: ignore[attr-defined]
    return first, second
