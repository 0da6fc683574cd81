"""Text to ids on all cores: worker processes, each with its own tokenizer, and results in the order of the texts.

A worker (`python -m scripts.data.encoders TOKENIZER_JSON BEGIN END DTYPE`, ids as JSON) reads pickled lists of texts
and writes arrays. It imports neither torch nor transformers, so it starts in a moment, and it ends when its input ends,
however its parent ended.
"""

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tokenizers import Tokenizer

import periln
from periln.runkit.encoding import TextEncoder
from periln.runkit.errors import UserError
from periln.runkit.process import python_m

T = TypeVar("T")
ROOT = Path(periln.__file__).resolve().parents[1]
AHEAD = 1 << 25  # characters of text that wait for workers or are with them, beside one document of any length


class Encoded(NamedTuple):
    """Documents as ids.

    Attributes:
        ids: of all documents, one behind the other, (N,).
        lengths: how many belong to each, (documents,).
        differ: whether a document was cut where its ids may not be those of the whole, (documents,).
    """

    ids: np.ndarray
    lengths: np.ndarray
    differ: np.ndarray


class Encoder:
    """Ids of documents: `begin`, the text's, `end`."""

    def __init__(self, tokenizer_json: Path, begin: Sequence[int], end: Sequence[int], dtype: np.dtype):
        self.encode = TextEncoder(Tokenizer.from_file(str(tokenizer_json)))
        self.begin, self.end, self.dtype = list(begin), list(end), dtype

    def __call__(self, texts: list[str]) -> Encoded:
        """
        Raises:
            UserError: the tokenizer fails on a text; says with which words it begins.
        """
        parts, differ = self._ids(texts)
        around = len(self.begin) + len(self.end)
        lengths = np.array([len(part) + around for part in parts], dtype=np.int64)
        ids = np.empty(lengths.sum(), dtype=self.dtype)
        end = 0
        for part, length in zip(parts, lengths, strict=True):
            start, end = end, end + length
            ids[start : start + len(self.begin)] = self.begin
            ids[start + len(self.begin) : end - len(self.end)] = part
            ids[end - len(self.end) : end] = self.end
        return Encoded(ids, lengths, np.array(differ, dtype=bool))

    def _ids(self, texts: list[str]) -> tuple[list[np.ndarray], list[bool]]:
        try:
            return self.encode(texts)
        except BaseException as error:  # a panic of the library is not an Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            if len(texts) > 1:
                for text in texts:
                    self._ids([text])
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"the tokenizer fails on the document that begins {texts[0][:60]!r}: {said}") from error


class Encoders:
    """`workers` processes; with one, the work is done here.

    Raises (on use):
        UserError: a worker died, or its tokenizer fails on a text.
    """

    def __init__(self, workers: int, tokenizer_json: Path, begin: Sequence[int], end: Sequence[int], dtype: np.dtype):
        self.workers = workers
        self._processes: list[subprocess.Popen] = []
        if workers == 1:
            self._encode = Encoder(tokenizer_json, begin, end, dtype)
            return
        ids = (json.dumps(list(begin)), json.dumps(list(end)))
        command = [*python_m("scripts.data.encoders"), str(tokenizer_json.resolve()), *ids, dtype.str]
        # One core each: the tokenizer's own threads would fight with the other workers.
        env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        for _ in range(workers):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=env)
            self._processes.append(process)
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(workers)

    def _ask(self, texts: list[str]) -> Encoded:
        process = self._idle.get()
        try:
            pickle.dump(texts, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
            if isinstance(answer, str):
                raise UserError(answer)
            return Encoded(*answer)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                "a tokenizing worker died (killed for its memory, perhaps): run the command again"
            ) from error
        finally:
            self._idle.put(process)

    def map(self, items: Iterable[tuple[list[str], T]]) -> Iterator[tuple[Encoded, T]]:
        """(encoded, item) for (texts, item), in order; a few batches are read ahead."""
        if self.workers == 1:
            for texts, item in items:
                yield self._encode(texts), item
            return
        ahead: deque[tuple[Any, int, T]] = deque()
        held = 0
        for texts, item in items:
            size = sum(map(len, texts))
            ahead.append((self._threads.submit(self._ask, texts), size, item))
            held += size
            while len(ahead) > 2 * self.workers or (len(ahead) > 1 and held > AHEAD):
                future, size, first = ahead.popleft()
                held -= size
                yield future.result(), first
        while ahead:
            future, _, first = ahead.popleft()
            yield future.result(), first

    def close(self) -> None:
        """End the workers; what they still work on is thrown away."""
        for process in self._processes:
            process.kill()
        if self._processes:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.stdout.close()
            try:
                process.stdin.close()
            except OSError:  # what was not sent yet
                pass
            process.wait()


def serve(tokenizer_json: str, begin: str, end: str, dtype: str) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    encode = Encoder(Path(tokenizer_json), json.loads(begin), json.loads(end), np.dtype(dtype))
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            texts = pickle.load(source)
            try:
                answer: Any = tuple(encode(texts))
            except UserError as error:
                answer = str(error)
            pickle.dump(answer, target, protocol=pickle.HIGHEST_PROTOCOL)
            target.flush()
            del texts, answer  # not while the next ones are read
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # the parent is gone, perhaps in mid-sentence
            os._exit(0)


if __name__ == "__main__":
    serve(*sys.argv[1:])
