"""Log-likelihoods with the shared beginning of a question's answers computed once.

The requests of a question share their context, and HFLM runs it once for each answer. Here a question is its context
and all its answers behind it: every token has the position that it has in its own request, and a mask lets it see only
the context and its own answer. Several questions are one row of the batch: first what is only read of all of them, then
what is scored, so that little of a batch is padding and no logits are made for contexts. In exact arithmetic that is
the same function; in FP32 sums are taken in another order, so log-likelihoods agree to `TOLERANCE`, which is checked on
the longest question and on one in the middle of every task. Whatever cannot be scored this way is scored the plain way,
and `why_not` says why.
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
WIDEST = 1024  # tokens of a question: attention costs their square
WIDTH = 512  # tokens of a row of the batch, unless a question has more
LEAST = 4  # tokens that a request must save to join a question
ATTENTION = ("sdpa", "eager")  # the kernels that take a mask for each token


@dataclass
class Question:
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


def rows_of(requests: Sequence[tuple[list[int], int]]) -> list[Question]:
    """Neighbouring requests (ids, scored tokens) that share their beginning, as rows; every request is in one of them.

    A document's requests come one after another; a request joins the previous row where that saves tokens.
    """
    rows: list[Question] = []
    for number, (ids, scored) in enumerate(requests):
        if not (rows and rows[-1].join(number, ids, scored)):
            rows.append(Question(len(ids) - scored + 1, [number], [ids], [scored]))
    return rows


def bins_of(questions: Sequence[Question], width: int = WIDTH) -> list[list[Question]]:
    """The questions of a batch, a list for each of its rows: about `width` tokens each, and about as many to score."""
    widest = max(width, *(question.width for question in questions))
    count = math.ceil(sum(question.width for question in questions) / widest)
    bins: list[list[Question]] = [[] for _ in range(count)]
    for question in sorted(questions, key=lambda question: question.own, reverse=True):
        min(bins, key=lambda bin: sum(1 + other.own for other in bin)).append(question)
    return [bin for bin in bins if bin]


@dataclass(frozen=True)
class Packed:
    """Rows of questions as tensors: ids and positions (B, T), mask (B, 1, T, T) added to the attention scores.

    The contexts come first, each without its last token, and end in the same column everywhere, padded in front; the
    `kept` columns behind them have logits that are read. `places` has, for each question of each row in turn, the
    columns among these of its context's last token and of its answers' tokens.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    kept: int
    places: list[list[list[int]]]


def pack(bins: Sequence[Sequence[Question]], dtype: torch.dtype, device: torch.device) -> Packed:
    """The rows of a batch as one input; see `Packed`."""
    before = max(sum(question.shared - 1 for question in bin) for bin in bins)
    kept = max(sum(1 + question.own for question in bin) for bin in bins)
    shape = len(bins), before + kept
    ids, positions, segment = (torch.zeros(shape, dtype=torch.long) for _ in range(3))  # segment 0: a context's
    owner = torch.full(shape, -1, dtype=torch.long)  # the question's number in the row, -1: padding
    places: list[list[list[int]]] = []
    for i, bin in enumerate(bins):
        start, column = before - sum(question.shared - 1 for question in bin), before
        places.append([])
        for number, question in enumerate(bin):
            context = [*range(start, start + question.shared - 1), column]
            start, first = start + question.shared - 1, column
            ids[i, context] = torch.tensor(question.ids[0][: question.shared])
            positions[i, context] = torch.arange(question.shared)
            owner[i, context] = number
            column += 1
            for answer, tokens in enumerate(question.ids, 1):
                end = column + len(tokens) - question.shared
                ids[i, column:end] = torch.tensor(tokens[question.shared :], dtype=torch.long)
                positions[i, column:end] = torch.arange(question.shared, len(tokens))
                segment[i, column:end] = answer
                owner[i, column:end] = number
                column = end
            places[-1].append([c - before for c in range(first, column)])
    ids, positions, segment, owner = (x.to(device) for x in (ids, positions, segment, owner))

    def pairs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:, :, None], x[:, None, :]

    (query, key), (query_owner, key_owner), (later, earlier) = pairs(segment), pairs(owner), pairs(positions)
    seen = (query_owner == key_owner) & (key_owner >= 0) & ((key == query) | (key == 0)) & (earlier <= later)
    # A token of padding sees itself; otherwise it would be NaN.
    seen = seen | torch.eye(shape[1], dtype=torch.bool, device=device)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
    return Packed(ids, positions, mask[:, None], kept, places)


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
        rows.sort(key=lambda row: (row.width, row.own), reverse=True)
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

    def _row_batches(self, rows: Sequence[Question], override_bs: int | None) -> Iterator[list[Question]]:
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
    def _score_rows(self, rows: list[Question], requests: Sequence[Request]) -> list[list[tuple[float, bool]]]:
        """For each request of each row, the log-likelihood of its answer and whether it is the greedy one."""
        bins = bins_of(rows)
        packed = pack(bins, torch.float32, self.device)
        logits = self.model(
            input_ids=packed.ids,
            attention_mask=packed.mask,
            position_ids=packed.positions,
            logits_to_keep=packed.kept,
            use_cache=False,
        ).logits
        places, tokens, lengths, order = [], [], [], []
        for i, bin in enumerate(bins):
            for question, (last, *own) in zip(bin, packed.places[i], strict=True):
                for member, ids, scored in zip(question.members, question.ids, question.scored, strict=True):
                    mine, own = own[: len(ids) - question.shared], own[len(ids) - question.shared :]
                    # The logits of the context's last token come before those of the answer's own.
                    places += [(i, column) for column in [last, *mine][len(mine) + 1 - scored :]]
                    tokens += requests[member][2]
                    lengths.append(scored)
                    order.append(member)
        at = torch.tensor(places, device=self.device)
        chosen = torch.tensor(tokens, device=self.device)
        logs = F.log_softmax(logits[at[:, 0], at[:, 1]], dim=-1, dtype=self.softmax_dtype)
        values = logs.gather(1, chosen[:, None])[:, 0].split(lengths)
        hits = (logs.argmax(dim=-1) == chosen).split(lengths)
        sums = torch.stack([part.sum() for part in values])
        if sums.isnan().any():  # NaN loses every comparison: it would be scored as the first answer
            raise FloatingPointError(f"log-likelihoods are not numbers in {self.model.dtype}")
        answers = dict(zip(order, zip(sums.tolist(), [bool(part.all()) for part in hits], strict=True), strict=True))
        return [[answers[member] for member in row.members] for row in rows]

    def _differs(self, rows: list[Question], requests: Sequence[Request]) -> str | None:
        """Score these rows both ways; reports where they differ by more than TOLERANCE."""
        rows = rows if rows[0] is not rows[-1] else rows[:1]
        ours = [value for row in self._score_rows(rows, requests) for value, _ in row]
        asked: list[Any] = [(None, *requests[member][1:]) for row in rows for member in row.members]
        plain = [value for value, _ in super()._loglikelihood_tokens(asked, disable_tqdm=True, override_bs=len(asked))]
        worst = max(abs(a - b) if math.isfinite(a - b) else math.inf for a, b in zip(ours, plain, strict=True))
        return None if worst <= TOLERANCE else f"log-likelihoods differ from the plain way by {worst:.2g}"
