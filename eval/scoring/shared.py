"""Log-likelihoods with the shared beginning of a question's answers computed once.

The requests of a question share their context, and HFLM runs it once for each answer. Here the answers of a question
are one row, `context, answer 1, answer 2, ...`: every token has the position that it has in its own request, and a mask
lets it see only the context and its own answer. In exact arithmetic that is the same function; in FP32 sums are taken
in another order, so log-likelihoods agree to `TOLERANCE`, which is checked on the longest row and on one in the middle
of every task. Whatever cannot be scored this way is scored the plain way, and `why_not` says why.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from periln.eval.scoring.likelihood import ContinuationLM, Request

TOLERANCE = 1e-4  # nats, of a request's log-likelihood in FP32
WIDEST = 1024  # tokens of a row: attention costs their square
LEAST = 4  # tokens that a request must save to join a row
ATTENTION = ("sdpa", "eager")  # the kernels that take a mask for each token


@dataclass
class Row:
    """Requests that share their first `shared` ids. `ids` are what the model reads for each, its last token cut off."""

    shared: int
    members: list[int] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)  # of each request, how many of its tokens are scored

    @property
    def own(self) -> int:
        """Tokens after the shared ones."""
        return sum(len(ids) - self.shared for ids in self.ids)

    @property
    def width(self) -> int:
        return self.shared + self.own

    def join(self, number: int, ids: list[int], scored: int) -> bool:
        """Take the request in, if that saves tokens."""
        shared = self.shared_with(ids, scored)
        own = sum(len(other) - shared for other in (*self.ids, ids))
        if self.width + len(ids) - (shared + own) < LEAST or shared + own > WIDEST:
            return False
        self.shared = shared
        self.members.append(number)
        self.ids.append(ids)
        self.scored.append(scored)
        return True

    def shared_with(self, ids: list[int], scored: int) -> int:
        """How many leading ids are shared if the request joins; the last of them gives the first logits to read."""
        most, first = min(self.shared, len(ids) - scored + 1), self.ids[0]
        return next((i for i in range(most) if first[i] != ids[i]), most)


def rows_of(requests: Sequence[tuple[list[int], int]]) -> list[Row]:
    """Neighbouring requests (ids, scored tokens) that share their beginning, as rows; every request is in one of them.

    A document's requests come one after another; a request joins the previous row where that saves tokens.
    """
    rows: list[Row] = []
    for number, (ids, scored) in enumerate(requests):
        if not (rows and rows[-1].join(number, ids, scored)):
            rows.append(Row(len(ids) - scored + 1, [number], [ids], [scored]))
    return rows


@dataclass(frozen=True)
class Packed:
    """Rows as tensors: ids and positions (B, T), mask (B, 1, T, T) added to the attention scores.

    The shared tokens end in the same column everywhere, padded in front; `kept` columns from their last one on have
    logits that are read.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    kept: int


def pack(rows: Sequence[Row], dtype: torch.dtype, device: torch.device) -> Packed:
    """The rows of a batch as one input; see `Packed`."""
    before, behind = max(row.shared for row in rows), max(row.own for row in rows)
    width = before + behind
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    segment = torch.full((len(rows), width), -1, dtype=torch.long)  # 0: shared, 1, 2, ...: the answer's, -1: padding
    for i, row in enumerate(rows):
        start = before - row.shared
        ids[i, start:before] = torch.tensor(row.ids[0][: row.shared])
        positions[i, start:before] = torch.arange(row.shared)
        segment[i, start:before] = 0
        column = before
        for number, tokens in enumerate(row.ids, 1):
            end = column + len(tokens) - row.shared
            ids[i, column:end] = torch.tensor(tokens[row.shared :], dtype=torch.long)
            positions[i, column:end] = torch.arange(row.shared, len(tokens))
            segment[i, column:end] = number
            column = end
    ids, positions, segment = ids.to(device), positions.to(device), segment.to(device)
    query, key = segment[:, :, None], segment[:, None, :]
    seen = torch.ones(width, width, dtype=torch.bool, device=device).tril() & (key >= 0) & ((key == query) | (key == 0))
    seen = seen | torch.eye(
        width, dtype=torch.bool, device=device
    )  # a row of padding sees itself; otherwise it would be NaN
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
    return Packed(ids, positions, mask[:, None], behind + 1)


class SharedPrefixLM(ContinuationLM):
    """ContinuationLM that computes the shared beginning of neighbouring requests once: equal to within TOLERANCE."""

    why_not: str | None = None  # why requests were scored the plain way, if any were

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self.why_not = self._unable()
        if self.why_not is not None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        whole = [i for i, (_, context, answer) in enumerate(requests) if len(context) + len(answer) <= self.max_length]
        rows = rows_of([self._read(requests[i]) for i in whole])
        rows.sort(key=lambda row: (row.shared, row.own), reverse=True)
        if rows and (reason := self._differs([rows[0], rows[len(rows) // 2]], [requests[i] for i in whole])):
            self.why_not = reason
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        answers: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(requests), desc="requests", leave=False, disable=disable_tqdm or self.rank != 0)
        for batch in self._row_batches(rows, override_bs):
            for row, scored in zip(batch, self._score_rows(batch, [requests[i] for i in whole]), strict=True):
                for member, answer in zip(row.members, scored, strict=True):
                    answers[whole[member]] = answer
                    if requests[whole[member]][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[whole[member]][0], answer)
            bar.update(sum(len(row.members) for row in batch))
        bar.close()
        cut = [i for i in range(len(requests)) if i not in answers]  # longer than the model's positions: cut by HFLM
        if cut:
            plain = super()._loglikelihood_tokens([requests[i] for i in cut], disable_tqdm, override_bs)
            answers |= dict(zip(cut, plain, strict=True))
        return [answers[i] for i in range(len(requests))]

    @staticmethod
    def _read(request: Request) -> tuple[list[int], int]:
        _, context, answer = request
        return [*context, *answer][:-1], len(answer)

    def _unable(self) -> str | None:
        """Why this model's requests cannot share their beginning; None where they can."""
        config = self.model.config.get_text_config()
        parameters = inspect.signature(self.model.forward).parameters
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if self.backend != "causal":
            return "the model is not a decoder alone"
        if next(self.model.parameters()).dtype != torch.float32 or self.mixed_precision_dtype is not None:
            return "only FP32 agrees with the plain way to 1e-4"
        if (
            getattr(self.model, "active_peft_config", None) is not None
            and self.model.active_peft_config.is_prompt_learning
        ):
            return "a tuned prompt is in front of every request"
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            return "some of its layers attend to a window"
        if kinds != {"full_attention"}:
            return f"its layers are not all full attention: {', '.join(sorted(kinds))}"
        if config._attn_implementation not in ATTENTION:
            return f"its attention is {config._attn_implementation}, which takes no mask for each token"
        if not {"position_ids", "attention_mask", "logits_to_keep"} <= set(parameters):
            return f"{type(self.model).__name__}.forward does not take position_ids and logits_to_keep"
        return None

    def _row_batches(self, rows: Sequence[Row], override_bs: int | None) -> Iterator[list[Row]]:
        """Batches of rows; with `auto` of as many as the memory allows for the longest."""
        size = self.batch_size
        if size == "auto":
            size = override_bs
            if size is None and rows:
                longest = max(rows, key=lambda row: row.width)
                size = self._detect_batch_size([((("", "")), [0] * longest.width, [0])])
        step = max(1, int(size or 1))
        return (list(rows[i : i + step]) for i in range(0, len(rows), step))

    @torch.no_grad()
    def _score_rows(self, rows: list[Row], requests: Sequence[Request]) -> list[list[tuple[float, bool]]]:
        """For each request of each row, the log-likelihood of its answer and whether it is the greedy one."""
        packed = pack(rows, torch.float32, self.device)
        logits = self.model(
            input_ids=packed.ids,
            attention_mask=packed.mask,
            position_ids=packed.positions,
            logits_to_keep=packed.kept,
            use_cache=False,
        ).logits
        places, tokens, lengths = [], [], []
        for i, row in enumerate(rows):
            column = 1  # behind the last shared token
            for member, ids, scored in zip(row.members, row.ids, row.scored, strict=True):
                own = len(ids) - row.shared
                # The logits of the last shared token come before those of the answer's own.
                columns = [0, *range(column, column + own)][own + 1 - scored :]
                places += [(i, c) for c in columns]
                tokens += requests[member][2]
                lengths.append(scored)
                column += own
        at = torch.tensor(places, device=self.device)
        chosen = torch.tensor(tokens, device=self.device)
        logs = F.log_softmax(logits[at[:, 0], at[:, 1]], dim=-1, dtype=self.softmax_dtype)
        values = logs.gather(1, chosen[:, None])[:, 0].split(lengths)
        hits = (logs.argmax(dim=-1) == chosen).split(lengths)
        sums = torch.stack([part.sum() for part in values])
        if sums.isnan().any():  # NaN loses every comparison: it would be scored as the first answer
            raise FloatingPointError(f"log-likelihoods are not numbers in {self.model.dtype}")
        answers = iter(zip(sums.tolist(), [bool(part.all()) for part in hits], strict=True))
        return [[next(answers) for _ in row.members] for row in rows]

    def _differs(self, rows: list[Row], requests: Sequence[Request]) -> str | None:
        """Score these rows both ways; reports where they differ by more than TOLERANCE."""
        rows = rows if rows[0] is not rows[-1] else rows[:1]
        ours = [value for row in self._score_rows(rows, requests) for value, _ in row]
        asked: list[Any] = [(None, *requests[member][1:]) for row in rows for member in row.members]
        plain = [value for value, _ in super()._loglikelihood_tokens(asked, disable_tqdm=True, override_bs=len(asked))]
        worst = max(abs(a - b) if math.isfinite(a - b) else math.inf for a, b in zip(ours, plain, strict=True))
        return None if worst <= TOLERANCE else f"log-likelihoods differ from the plain way by {worst:.2g}"
