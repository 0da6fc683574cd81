"""The peak of a process's memory, which can be begun anew: the first step's is not the steady step's."""

import resource
import sys
from pathlib import Path

import torch


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
    """Have `peak_rss` begin anew from what is resident now; False where the system has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


class PeakMemory:
    """A device's peak: what the allocator has given out on a GPU, the process's resident set on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_peak_rss()

    def bytes(self) -> int:
        """Since `reset`."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_rss()
