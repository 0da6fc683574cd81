"""The held-out loss during training: the same sequences each time, over all ranks."""

import json

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from periln.runkit.errors import UserError
from periln.scripts.data import TokenData
from periln.scripts.encoders import Encoder
from periln.scripts.engine import Engine


def heldout_sequences(
    data: TokenData, tokenizer: PreTrainedTokenizerBase, sequence_length: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` (or fewer) sequences of the held-out documents, one after the other: inputs and targets (N, S).

    Raises:
        UserError: there is not one whole sequence.
    """
    # As the shards were encoded: with the same ids around each document, and a spelled special token only text.
    ends = data.ends_with or [tokenizer.eos_token_id]
    encode = Encoder(data.tokenizer_path / "tokenizer.json", data.begins_with, ends, np.dtype(np.int64))
    wanted, ids = count * sequence_length + 1, []
    with open(data.path / "heldout.jsonl", encoding="utf-8") as file:
        for line in file:
            if len(ids) >= wanted:
                break
            ids += encode([json.loads(line)["text"]])[0].tolist()
    n = min(count, (len(ids) - 1) // sequence_length)
    if n < 1:
        raise UserError(
            f"heldout_every: {data.path} holds out {len(ids)} tokens, fewer than one sequence of {sequence_length} + 1"
        )
    flat = torch.tensor(ids[: n * sequence_length + 1])
    return flat[:-1].view(n, sequence_length), flat[1:].view(n, sequence_length)


@torch.no_grad()
def heldout_loss(engine: Engine, inputs: torch.Tensor, targets: torch.Tensor, micro_batch: int) -> float:
    """Mean cross entropy in nats a token; every rank does the same number of forward passes (sharded weights)."""
    own, share = slice(engine.rank, None, engine.processes), -(-len(inputs) // engine.processes)
    inputs, mine = inputs[own], targets[own]
    if len(inputs) < share:  # a sequence that counts nothing
        inputs = torch.cat([inputs, torch.zeros_like(targets[:1])])
        mine = torch.cat([mine, torch.full_like(targets[:1], -100)])
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
