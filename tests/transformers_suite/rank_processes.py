"""Starts the processes of Transformers' parallel tests, where its own `tests/distributed_testing_utils.py` is missing.

The names are those that Transformers' mixins import. CPU and gloo only.
"""

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 300.0


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """The CPU has no current device to set."""


def run_distributed(world_size: int) -> Callable[[Callable], Callable]:
    """`run_distributed(n)(function)(*args)` calls `function(rank, *args)` in `n` processes of one gloo group."""
    return lambda function: partial(_run_in_group, world_size, function)


def _run_in_group(world_size: int, function: Callable, *args: Any) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    _start_rank_processes(_join_group, (function, world_size, store.port, args), world_size)


def _join_group(rank: int, function: Callable, world_size: int, port: int, args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    store = dist.TCPStore("localhost", port, is_master=False)
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    function(rank, *args)
    dist.destroy_process_group()


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    """Call `function(rank, *args)` in `nprocs` fresh processes, and wait for all of them.

    Raises:
        RuntimeError: one of them failed (its traceback is the message) or none ended within `TIMEOUT_SECONDS`.
    """
    # A server that has imported the slow modules once, and forks: a spawned process would import them each time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modeling_periln", "common_tests", __name__])
    source = str(Path(sys.modules["tests"].__path__[0]).parent)
    call = pickle.dumps((function, args))  # unpickled once the new process knows whose `tests` is meant
    errors = context.SimpleQueue()
    processes = [context.Process(target=_rank_main, args=(rank, source, call, errors)) for rank in range(nprocs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_SECONDS)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    messages = []
    while not errors.empty():
        messages.append(errors.get())
    codes = [process.exitcode for process in processes]
    if late or any(codes):
        raise RuntimeError("\n".join(messages) or f"exit codes of the {nprocs} processes: {codes}")


def _rank_main(rank: int, source: str, call: bytes, errors: Any) -> None:
    import common_tests

    torch.set_num_threads(1)
    try:
        common_tests.install(Path(source))
        function, args = pickle.loads(call)
        function(rank, *args)
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)  # the other ranks may wait for this one: no clean-up that would wait for them
