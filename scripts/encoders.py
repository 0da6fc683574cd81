"""Text to ids on all cores: worker processes, each with a tokenizer of its own, and results in the order of the texts.

A worker (`python -m scripts.encoders TOKENIZER_JSON EOS_ID DTYPE`) reads pickled lists of texts and writes arrays; it
imports no torch and no transformers, starts in a moment, and ends when its input ends, however its parent ended.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

import periln
from runkit.errors import UserError
from runkit.process import python_m

T = TypeVar("T")
ROOT = Path(periln.__file__).resolve().parents[1]


class Encoder:
    """Ids of documents, each followed by the end-of-text id."""

    def __init__(self, tokenizer_json: Path, eos: int, dtype: np.dtype):
        self.tokenizer = Tokenizer.from_file(str(tokenizer_json))
        # A tokenizer's file may ask to cut or pad texts; and a text that spells `<|end_of_text|>` is only text.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.eos, self.dtype = eos, dtype

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids one behind the other (N,), and how many belong to each text (len(texts),)."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        lengths = np.array([len(encoding) + 1 for encoding in encodings], dtype=np.int64)
        ids = np.empty(lengths.sum(), dtype=self.dtype)
        end = 0
        for encoding, length in zip(encodings, lengths, strict=True):
            ids[end : end + length - 1] = encoding.ids
            end += length
            ids[end - 1] = self.eos
        return ids, lengths


class Encoders:
    """`workers` processes; with one, the work is done here.

    Raises (on use):
        UserError: a worker died.
    """

    def __init__(self, workers: int, tokenizer_json: Path, eos: int, dtype: np.dtype):
        self.workers = workers
        self._processes: list[subprocess.Popen] = []
        if workers == 1:
            self._encode = Encoder(tokenizer_json, eos, dtype)
            return
        command = [*python_m("scripts.encoders"), str(tokenizer_json.resolve()), str(eos), dtype.str]
        # One core each: the tokenizer's own threads would fight with the other workers.
        env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        for _ in range(workers):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=env)
            self._processes.append(process)
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(workers)

    def _ask(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        process = self._idle.get()
        try:
            pickle.dump(texts, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                "a tokenizing worker died (killed for its memory, perhaps): run the command again"
            ) from error
        finally:
            self._idle.put(process)

    def map(self, items: Iterable[tuple[list[str], T]]) -> Iterator[tuple[np.ndarray, np.ndarray, T]]:
        """(ids, lengths, item) for (texts, item), in order; a few batches are read ahead."""
        if self.workers == 1:
            for texts, item in items:
                yield *self._encode(texts), item
            return
        ahead: deque[tuple[Any, T]] = deque()
        for texts, item in items:
            ahead.append((self._threads.submit(self._ask, texts), item))
            if len(ahead) > 2 * self.workers:
                future, first = ahead.popleft()
                yield *future.result(), first
        while ahead:
            future, first = ahead.popleft()
            yield *future.result(), first

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


def serve(tokenizer_json: str, eos: str, dtype: str) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    encode = Encoder(Path(tokenizer_json), int(eos), np.dtype(dtype))
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            texts = pickle.load(source)
            pickle.dump(encode(texts), target, protocol=pickle.HIGHEST_PROTOCOL)
            target.flush()
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # the parent is gone, perhaps in mid-sentence
            os._exit(0)


if __name__ == "__main__":
    serve(*sys.argv[1:])
