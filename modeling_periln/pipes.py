"""Commands whose output is no longer read, as in `periln --help | head -1`. Imports nothing of ours."""

import os
import select
import sys
from collections.abc import Callable

UNREAD = 141  # 128 + SIGPIPE: what a shell reports for any program that a closed pipe ends


def unread() -> bool:
    """Whether standard output or error is a pipe without a reader; from then on it leads nowhere."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        try:
            number = stream.fileno()
        except (AttributeError, OSError, ValueError):  # none, closed, or a substitute that is not a file
            continue
        poll = select.poll()
        poll.register(number, 0)
        if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
            found = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)  # else Python writes at its end what is still in the buffer
            os.close(nowhere)
    return found


def until_unread(work: Callable[[], int | None]) -> int:
    """A command's exit code; silently `UNREAD` if the reader of its output left before it was done."""
    try:
        try:
            return work() or 0
        finally:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None and not stream.closed:
                    stream.flush()
    except BrokenPipeError:
        if not unread():  # another pipe
            raise
        return UNREAD
