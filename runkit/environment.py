"""What a run ran on: versions, commit, device, threads, and the dtypes actually seen."""

import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "lm-eval", "peft", "trl", "safetensors")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not (root / ".git").exists():  # an installed copy, perhaps inside another repository
        return {"commit": None, "uncommitted_changes": None}
    changed = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": None if changed is None else bool(changed)}


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit, processor and device, for environment.json."""
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES if _version(p)},
        **_commit(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _processor() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or None


class DtypeWitness:
    """Records, with forward hooks, the dtypes that pass through residual adds and linear layers.

    Used on the first training step only. What it saw is evidence, not configuration: `report()` gives, for
    every residual add, the dtype of stream, branch and sum; and a count of the dtypes of all linear outputs.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.residual_adds: dict[str, dict[str, str]] = {}
        self.linear_outputs: dict[str, str] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "DtypeWitness":
        for name, module in self.model.named_modules():
            if type(module).__name__.endswith("Residual"):
                self._handles.append(module.register_forward_hook(self._see_add(name)))
            elif isinstance(module, torch.nn.Linear):
                self._handles.append(module.register_forward_hook(self._see_linear(name)))
        return self

    def __exit__(self, *exc: Any) -> None:
        for handle in self._handles:
            handle.remove()

    @staticmethod
    def _name(x: torch.Tensor) -> str:
        return str(x.dtype).removeprefix("torch.")

    def _see_add(self, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            seen = zip(("stream", "branch", "output"), (*args, output), strict=True)
            self.residual_adds[name] = {k: self._name(x) for k, x in seen}

        return hook

    def _see_linear(self, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            self.linear_outputs[name] = self._name(output)

        return hook

    def report(self) -> dict[str, Any]:
        """What was seen, with the dtypes of parameters and gradients as they are now."""
        parameters = {self._name(p) for p in self.model.parameters()}
        gradients = {self._name(p.grad) for p in self.model.parameters() if p.grad is not None}
        counts: dict[str, int] = {}
        for dtype in self.linear_outputs.values():
            counts[dtype] = counts.get(dtype, 0) + 1
        return {
            "residual_adds": self.residual_adds,
            "linear_outputs": counts,
            "parameters": sorted(parameters),
            "gradients": sorted(gradients),
        }
