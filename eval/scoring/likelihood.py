"""The harness's HFLM, with the softmax taken only where an answer is scored."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.models.utils_hf import pad_and_concat
from tqdm import tqdm

from periln.runkit.encoding import added_around, text_ids

Request = tuple[tuple[str, str], list[int], list[int]]  # (strings, context's ids, continuation's ids)
MOST = 64  # the harness's own most for `auto`
SHARE = 0.25  # of the free memory, for two copies of a batch's logits


class ContinuationLM(HFLM):
    """HFLM whose log-likelihoods are HFLM's bit for bit, in less time and memory.

    HFLM takes the log-softmax of every position of a batch, context and padding too, and reads a few of them. Its
    rows are independent, so here it is taken only of those few. Batches are HFLM's own (its Collator: sorted by
    length, requests that differ in their last token together), and so is everything but `loglikelihood` and three
    things. Requests of the same tokens that are cut into context and answer at different places are scored apart:
    HFLM reads the logits of one at the places of the other. A whole text follows what begins a document once: HFLM
    puts it there twice, and scores the second. A text that spells control tokens gets none of them: HFLM reads them
    as tokens, and puts nothing before a text that spells what begins a document.
    """

    @cached_property
    def _reader(self) -> tuple[Callable[[str], list[int]], tuple[list[int], list[int]]]:
        return text_ids(self.tokenizer), added_around(self.tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        ids_of, (begin, end) = self._reader
        added = self.add_bos_token if add_special_tokens is None else add_special_tokens
        ids = ids_of(string) if added is False else [*begin, *ids_of(string), *end]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if truncation:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        asked, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = asked

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.backend != "causal":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        if apart := self._cut_elsewhere(requests):
            both: list[Any] = [None] * len(requests)
            for numbers in ([i for i in range(len(requests)) if i not in apart], sorted(apart)):
                part = [requests[i] for i in numbers]
                scored = ContinuationLM._loglikelihood_tokens(self, part, disable_tqdm, override_bs)
                for i, one in zip(numbers, scored, strict=True):
                    both[i] = one
            return both

        def longest_first(request: Request) -> tuple[int, tuple[int, ...]]:
            ids = request[1] + request[2]
            return -len(ids), tuple(ids)

        collator = Collator(
            requests,
            sort_fn=longest_first,
            group_by="contexts" if self.logits_cache else None,
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        answers: list[tuple[float, bool]] = []
        bar = tqdm(total=len(requests), desc="requests", leave=False, disable=disable_tqdm or self.rank != 0)
        for batch in self._batches(collator, requests, override_bs):
            found = self._score(collator, batch)
            for strings, answer in found:
                answers.append(answer)
                if strings is not None:
                    self.cache_hook.add_partial("loglikelihood", strings, answer)
            bar.update(len(found))
        bar.close()
        return collator.get_original(answers)

    @staticmethod
    def _cut_elsewhere(requests: list[Request]) -> set[int]:
        """Requests whose tokens, but the last, an earlier one has too, with an answer of another length."""
        lengths: dict[tuple[int, ...], int] = {}
        return {
            i
            for i, (_, context, answer) in enumerate(requests)
            if lengths.setdefault((*context, *answer[:-1]), len(answer)) != len(answer)
        }

    def _batches(self, collator: Collator, requests: list[Request], override_bs: int | None) -> Any:
        """Batches of a fixed size, or with `auto` of the size that the longest of these requests allows."""
        size = self.batch_size
        if size == "auto" and override_bs is None and requests:
            size = self._detect_batch_size([max(requests, key=lambda request: len(request[1]) + len(request[2]))])
        return collator.get_batched(n=size if size != "auto" else override_bs or 1)

    def _detect_batch_size(self, requests: list[Request] | None = None, pos: int = 0) -> int:
        """The batch size for `auto`: for the request at `pos`, or for a text that fills the positions.

        A GPU reports when its memory is full, and the harness tries until it does. A CPU does not: the system ends the
        process; so there the size follows from the free memory.
        """
        if self.device.type != "cpu":
            size = super()._detect_batch_size(requests, pos)
        else:
            longest = len(requests[pos][1]) + len(requests[pos][2]) if requests else self.max_length
            vocabulary = self.model.config.get_text_config().vocab_size
            size = fitting_batch_size(min(longest, self.max_length), vocabulary, self.device)
        self.batch_sizes = {0: size}  # for the record
        return size

    def _score(self, collator: Collator, batch: list[Request]) -> list[tuple[Any, tuple[float, bool]]]:
        """(strings, (log-likelihood, whether it is the greedy continuation)) of the requests of one batch."""
        rows = []
        for _, context, continuation in batch:
            assert 0 < len(continuation) <= self.max_length and context
            rows.append((context + continuation)[-(self.max_length + 1) :][:-1])
        longest = max(map(len, rows))
        tensors = [torch.tensor(row, dtype=torch.long, device=self.device) for row in rows]
        logits = self._model_call(pad_and_concat(longest, tensors, padding_side="right"))  # batch, position, vocabulary
        virtual = logits.shape[1] - longest  # positions of a tuned prompt, in front
        strings, sums, greedy = [], [], []
        for i, (request, context, continuation) in enumerate(batch):
            end = len(rows[i]) + virtual
            of = logits[i, end - len(continuation) : end].unsqueeze(0)
            logs = F.log_softmax(of, dim=-1, dtype=self.softmax_dtype)
            best = logs.argmax(dim=-1)
            cached = collator.get_cache(req_str=request, cxt_toks=context, cont_toks=continuation, logits=logs)
            for name, ids, values in cached:
                answer = torch.tensor(ids, dtype=torch.long, device=self.device).unsqueeze(0)
                strings.append(name)
                sums.append(torch.gather(values, 2, answer.unsqueeze(-1)).squeeze(-1).sum())
                greedy.append((best[:, -answer.shape[1] :] == answer).all())
        summed = torch.stack(sums)
        if summed.isnan().any():  # NaN loses every comparison: it would be scored as the first answer
            raise FloatingPointError(f"log-likelihoods are not numbers in {self.model.dtype}")
        scored = zip(summed.tolist(), torch.stack(greedy).tolist(), strict=True)
        return list(zip(strings, scored, strict=True))


def fitting_batch_size(longest: int, vocabulary: int, device: torch.device) -> int:
    """How many rows of `longest` tokens have logits (FP32) that fit a quarter of the free memory twice; 1 to 64."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    return max(1, min(MOST, int(SHARE * free // (2 * 4 * longest * vocabulary))))
