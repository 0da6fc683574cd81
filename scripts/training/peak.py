"""The peak of a process's memory, which can be begun anew: the first step's is not the steady step's."""

import torch

from periln.runkit.process import peak_rss, reset_peak_rss


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
