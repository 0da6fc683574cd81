"""The batches of a run, read ahead: the next step's is read and copied while the device computes this one's.

Which tokens a step reads stays a function of (seed, step); only when they are read changes.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.nn.functional import pad

from periln.scripts.data.token_data import FixedOrder
from periln.scripts.recipe import Recipe
from periln.scripts.training.engine import Engine


def document_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, S), True where a token may look: not ahead, and not at another document. Positions (B, S) begin each
    document at 0. Transformers makes the same of `position_ids`, but waits for the device to ask whether it must.
    """
    documents = (position_ids == 0).cumsum(-1)
    length = position_ids.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril_()
    return ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]


def document_boundaries(position_ids: torch.Tensor) -> torch.Tensor:
    """(documents + 1,) int32: where each begins in the rows of `position_ids` (B, S), one after the other; the end."""
    starts = (position_ids.flatten() == 0).nonzero()[:, 0]
    return pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)


class Batches:
    """This rank's share of each step's batch, in micro batches."""

    def __init__(self, recipe: Recipe, order: FixedOrder, engine: Engine, micro: int, attention: str):
        self.recipe, self.order, self.engine, self.micro, self.attention = recipe, order, engine, micro, attention
        self._rows = slice(engine.rank, None, engine.processes)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future] | None = None

    def of(self, step: int) -> list[dict[str, Any]]:
        """The micro batches of `step`, as arguments of the model; begins to read those of the step after it.

        Every token of the global batch weighs the same; ranks are averaged, so each counts `processes` times.
        """
        expected, reading = self._next or (None, None)
        host = reading.result() if expected == step else self._reader.submit(self._read, step).result()
        self._next = (step + 1, self._reader.submit(self._read, step + 1))
        recipe, device = self.recipe, self.engine.device
        shared = {
            "num_items_in_batch": recipe.batch_size * recipe.sequence_length / self.engine.processes,
            "z_loss": recipe.optimizer.z_loss,
            "skip_logits": True,
            "use_cache": False,
        }
        return [
            {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()} | shared
            for tensors in host
        ]

    def _read(self, step: int) -> list[dict[str, torch.Tensor]]:
        """The micro batches of `step` on the host, in pinned memory where the device is not the CPU."""
        inputs, targets = self.order.batch(step, self._rows)
        tensors = {"input_ids": inputs, "shift_labels": targets}
        if self.recipe.document_masking:
            tensors["position_ids"] = self.order.position_ids(step, self._rows)
        tensors = {name: torch.from_numpy(array).contiguous() for name, array in tensors.items()}
        starts = range(0, len(inputs), self.micro)
        found = [{name: tensor[i : i + self.micro] for name, tensor in tensors.items()} for i in starts]
        if self.recipe.document_masking and "flash" in self.attention:
            for batch in found:
                batch["cu_seq_lens_q"] = document_boundaries(batch["position_ids"])
        if self.engine.device.type == "cuda":
            found = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in found]
        return found

    def arguments(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A micro batch with what keeps its documents apart, in the form that the attention wants.

        Made when it is needed: a mask has S entries a token.
        """
        if "cu_seq_lens_q" in batch:
            ends, longest = batch["cu_seq_lens_q"], self.recipe.sequence_length
            if self.recipe.compile:
                torch._dynamo.mark_dynamic(ends, 0)  # as many as there are documents: no graph of its own for each
            return batch | {"cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        if "position_ids" in batch and self.attention == "sdpa":
            return batch | {"attention_mask": document_mask(batch["position_ids"])}
        return batch

    def close(self) -> None:
        """Read no further."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._next = None
