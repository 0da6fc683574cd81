"""The held-out loss during training: the same sequences each time, over all ranks."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from modeling_periln.loss import IGNORE_INDEX
from periln.runkit.errors import UserError
from periln.runkit.folder import sha256_of
from periln.scripts.data.encoders import Encoder
from periln.scripts.data.token_data import TokenData
from periln.scripts.training.engine import Engine


def heldout_sequences(
    data: TokenData,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    count: int,
    file: Path | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` (or fewer) sequences of the held-out documents, one after the other: inputs and targets (N, S).

    The documents are the data's own, or those of another `file` of the same kind, encoded as the data are.

    Raises:
        UserError: there is not one whole sequence.
    """
    # As the shards were encoded: with the same ids around each document, and a spelled special token only text.
    ends = data.ends_with or [tokenizer.eos_token_id]
    encode = Encoder(data.tokenizer_path / "tokenizer.json", data.begins_with, ends, np.dtype(np.int64))
    wanted = count * sequence_length + 1
    ids: list[int] = []
    source = file or data.path / "heldout.jsonl"
    with open(source, encoding="utf-8") as lines:
        for line in lines:
            if len(ids) >= wanted:
                break
            ids += encode([json.loads(line)["text"]])[0].tolist()
    n = min(count, (len(ids) - 1) // sequence_length)
    if n < 1:
        raise UserError(
            f"heldout_every: {file or data.path} holds out {len(ids)} tokens, fewer than one sequence of "
            f"{sequence_length} + 1"
        )
    flat = torch.tensor(ids[: n * sequence_length + 1])
    return flat[:-1].view(n, sequence_length), flat[1:].view(n, sequence_length)


def check_heldout_sets(sets: dict[str, str], before: dict[str, str]) -> dict[str, str]:
    """The hash of each set's file, by the set's name. `before`: those that the run began with.

    Raises:
        UserError: a file that cannot be read, that holds other than documents, or that has changed.
    """
    hashes = {}
    for name, path in sets.items():
        where = f"heldout_sets.{name}"
        try:
            with open(path, encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if not isinstance(json.loads(line).get("text"), str):
                        raise ValueError(f"line {number} has no text")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f'{where}: {path} holds no documents, one {{"text": ...}} a line ({error})') from error
        hashes[name] = sha256_of(Path(path))
        if before.get(name, hashes[name]) != hashes[name]:
            raise UserError(f"{where}: {path} has changed since the run began: its losses would be of two texts")
    return hashes


@torch.no_grad()
def heldout_loss(engine: Engine, inputs: torch.Tensor, targets: torch.Tensor, micro_batch: int) -> float:
    """Mean cross entropy in nats a token; every rank does the same number of forward passes (sharded weights)."""
    own, share = slice(engine.rank, None, engine.processes), -(-len(inputs) // engine.processes)
    micro_batch = min(micro_batch, share)
    share += -share % micro_batch  # whole micro batches: compiled layers have one graph of them
    inputs, mine = inputs[own], targets[own]
    lacking = (share - len(inputs), targets.shape[1])  # sequences that count nothing
    inputs = torch.cat([inputs, inputs.new_zeros(lacking)])
    mine = torch.cat([mine, mine.new_full(lacking, IGNORE_INDEX)])
    total = torch.zeros((), device=engine.device)
    engine.prepared.eval()
    try:
        for i in range(0, share, micro_batch):
            with engine.arithmetic():
                total += engine.prepared(
                    input_ids=inputs[i : i + micro_batch].to(engine.device),
                    shift_labels=mine[i : i + micro_batch].to(engine.device),
                    num_items_in_batch=1,
                    skip_logits=True,
                    use_cache=False,
                ).loss
    finally:
        engine.prepared.train()
    return engine.mean(total).item() * engine.processes / targets.numel()
