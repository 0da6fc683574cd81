"""Stages as processes: when they stop, and how many threads they use."""

import argparse
import ctypes
import gc
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import periln
from periln.runkit.errors import INTERRUPTED, TERMINATED, UsageError


class StopRequest:
    """Set by SIGINT or SIGTERM; checked between two steps. A second SIGINT, two seconds later, interrupts at once.

    Sooner, and SIGTERM at any time, it repeats the same request: a terminal signals a whole group of processes, and
    a launcher that dies from the signal has another sent to its child.

    `exit_code` is None until then, 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._since = 0.0

    def install(self) -> "StopRequest":
        """Handle SIGINT and SIGTERM from here on (main thread only)."""
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code is not None:
            if number == signal.SIGINT and time.monotonic() - self._since > 2:
                raise KeyboardInterrupt
            return
        self._since = time.monotonic()
        self.exit_code = INTERRUPTED if number == signal.SIGINT else TERMINATED


def python_m(command: str) -> list[str]:
    """The first words of a child process that runs a command, such as `eval.benchmarks`, of this copy of the code.

    An installed copy does not look in the working folder, which may be a checkout.
    """
    return [sys.executable, *([] if periln.IS_CHECKOUT else ["-P"]), "-m", f"periln.{command}"]


def start_stage(args: argparse.Namespace) -> None:
    """What every stage does first: apply `--threads` and `--stop-with-parent`."""
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    stop_with_parent(args.stop_with_parent)


def need_device(name: str, asked: str) -> None:
    """Refuse a GPU where torch sees none; `asked` is the option or field that names it.

    Raises:
        UsageError: `name` is `cuda` or `cuda:N`, and there is no CUDA device.
    """
    import torch

    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"{asked} was asked for, but torch sees no CUDA device")


def quiet_transformers() -> None:
    """Keep Transformers' progress bars and warnings out of a command's output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def stop_with_parent(parent: int | None, poll_seconds: float = 0.5) -> None:
    """Send this process SIGTERM once it is no longer `parent`'s child (the parent was killed, say); None: never."""
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def peak_rss() -> int:
    """The largest resident set of this process, in bytes: since `reset_peak_rss` where that works, else ever."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_rss() -> bool:
    """Have `peak_rss` begin anew from what is resident now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def return_freed_memory(collect: bool = True) -> None:
    """Have the allocator, where it is glibc's, return what is freed: it keeps hundreds of MiB otherwise.

    `collect`: look for garbage in cycles first, which takes a tenth of a second or more.
    """
    if collect:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))
