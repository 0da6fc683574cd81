"""Loss on held-out text: nats a token with a standard error, and bits a byte."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from periln.runkit.encoding import added_around, before_text, text_ids
from periln.runkit.errors import UsageError
from periln.runkit.texts import usable

NO_DOCUMENT = -1  # the owner of a target that is not scored
PIECE = 16  # positions whose softmax is there at once, where its gradient is taken


def read_texts(path: Path) -> list[str]:
    """The `text` of every line of a .jsonl file; those unfit for a tokenizer are named and left out.

    Raises:
        UserError: unreadable, not JSON, or without text.
    """
    try:
        lines = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1)
        rows = [(f"{path}, line {number}", json.loads(line)["text"]) for number, line in lines if line.strip()]
        texts = list(usable(rows, tqdm.write))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"cannot read held-out texts from {path}: {error}") from error
    if not any(texts):
        raise UsageError(f"{path} holds no text")
    return texts


@dataclass
class Windows:
    """Texts cut into what a model reads at once.

    `ids` has up to context + 1 tokens a window, the first only read; `owners` has the number of the document
    that each of the others belongs to. A window's first token is the last of the previous window: every token of a
    document is scored once.
    """

    ids: list[list[int]] = field(default_factory=list)
    owners: list[list[int]] = field(default_factory=list)

    def cut(self, ids: list[int], owners: list[int], context: int) -> None:
        """Add the windows of a sequence; `owners` are those of ids[1:]."""
        for start in range(0, len(ids) - 1, context):
            self.ids.append(ids[start : start + context + 1])
            self.owners.append(owners[start : start + context])


def make_windows(texts: list[str], tokenizer: PreTrainedTokenizerBase, context: int, packed: bool) -> Windows:
    """Windows of single documents; `packed`: of all of them in a row, over their ends, as pretraining reads them.

    Each document follows what begins one in pretraining, or else the end of the previous one; packed, it follows both.
    These are read but not scored: packed or not, the same tokens are scored.
    """
    prefix, encode = before_text(tokenizer), text_ids(tokenizer)
    begins = added_around(tokenizer)[0]
    ends = [tokenizer.eos_token_id] if packed and begins and tokenizer.eos_token_id is not None else []
    windows = Windows()
    row: list[int] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
        ids = encode(text)
        if row and ends:
            row += ends
            owners += [NO_DOCUMENT] * len(ends)
        row += prefix + ids
        owners += [NO_DOCUMENT] * len(prefix) + [number] * len(ids)
        if not packed:
            windows.cut(row, owners[1:], context)
            row, owners = [], []
    windows.cut(row, owners[1:], context)
    return windows


@dataclass
class Sums:
    """Loss (nats) and number of tokens of every document, over the first `batches` batches."""

    nats: torch.Tensor
    tokens: torch.Tensor
    batches: int = 0

    @classmethod
    def zeros(cls, documents: int) -> "Sums":
        return cls(torch.zeros(documents, dtype=torch.float64), torch.zeros(documents, dtype=torch.float64))


@torch.no_grad()
def sum_losses(
    model: PreTrainedModel,
    windows: Windows,
    sums: Sums,
    batch_size: int,
    after: Callable[[int, int], None] = lambda done, batches: None,
) -> Sums:
    """Add what is missing in `sums`: windows in batches, the longest first; `after` is called after each batch."""
    order = sorted(range(len(windows.ids)), key=lambda i: -len(windows.ids[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for number, chosen in enumerate(batches[sums.batches :], start=sums.batches + 1):
        longest = len(windows.ids[chosen[0]])
        padded = [windows.ids[i] + [0] * (longest - len(windows.ids[i])) for i in chosen]
        owners = [windows.owners[i] + [NO_DOCUMENT] * (longest - 1 - len(windows.owners[i])) for i in chosen]
        ids = torch.tensor(padded, device=model.device)
        # Right padding needs no mask: attention is causal, and padded positions are not counted.
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        for row, targets, owner in zip(logits, ids[:, 1:], torch.tensor(owners), strict=True):  # FP32: a row at a time
            losses = F.cross_entropy(row.float(), targets, reduction="none").double().cpu()
            scored = owner != NO_DOCUMENT
            sums.nats.index_add_(0, owner[scored], losses[scored])
            sums.tokens += torch.bincount(owner[scored], minlength=len(sums.tokens))
        sums.batches = number
        after(number, len(batches))
    return sums


def summarized(sums: Sums, texts: list[str], task: str = "heldout") -> dict[str, Any]:
    """Results (loss in nats a token, bits_per_byte), tokens, bytes and documents.

    The standard error is that of a ratio of sums over documents: residuals of each document's loss from the mean, by
    its token count.
    """
    tokens, nats, size = sums.tokens.sum().item(), sums.nats.sum().item(), sum(len(t.encode()) for t in texts)
    loss, n = nats / tokens, len(texts)

    def stderr(ratio: float, denominators: torch.Tensor, total: float) -> float | None:
        residuals = (sums.nats - ratio * denominators).square().sum().item()
        return math.sqrt(n / (n - 1) * residuals) / total if n > 1 else None

    lengths = torch.tensor([len(t.encode()) for t in texts], dtype=torch.float64)
    bits = nats / math.log(2) / size
    bits_error = stderr(nats / size, lengths, size)
    results = [
        {"task": task, "metric": "loss", "value": loss, "stderr": stderr(loss, sums.tokens, tokens), "n": n},
        {"task": task, "metric": "bits_per_byte", "value": bits, "stderr": bits_error and bits_error / math.log(2)}
        | {"n": n},
    ]
    return {"results": results, "tokens": int(tokens), "bytes": size, "documents": n}


def heldout_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], context: int, batch_size: int
) -> dict[str, Any]:
    """Mean next-token loss over all tokens of `texts`, document by document, in windows of `context` tokens."""
    windows = make_windows(texts, tokenizer, context, packed=False)
    sums = sum_losses(model, windows, Sums.zeros(len(texts)), batch_size)
    return summarized(sums, texts) | {"context": context}


def token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sum of the next-token cross entropy (nats) over a batch; logits (B, S, V), in FP32 a row at a time."""
    rows = (F.cross_entropy(row[:-1].float(), to[1:], reduction="sum") for row, to in zip(logits, ids, strict=True))
    return torch.stack(list(rows)).sum()


def loss_gradient(logits: torch.Tensor, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Autograd's gradient of `token_loss(logits, ids) / tokens`, in place of the logits (B, S, V), a piece at a time.

    Args:
        logits: without a graph.

    Raises:
        ValueError: logits of other tokens than the ids.
    """
    if logits.shape[:2] != ids.shape:
        raise ValueError(f"logits of {tuple(logits.shape[:2])} tokens for {tuple(ids.shape)} ids")
    for row, of in zip(logits, ids, strict=True):
        row[-1] = 0
        for piece, to in zip(row[:-1].split(PIECE), of[1:].split(PIECE), strict=True):
            with torch.enable_grad():
                leaf = piece.clone().requires_grad_()
                loss = F.cross_entropy(leaf.float(), to, reduction="sum") / tokens
            piece.copy_(torch.autograd.grad(loss, leaf)[0])
    return logits
