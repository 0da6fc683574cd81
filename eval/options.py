"""The options that the commands share which load a model: tasks, batch size, precision and device."""

import argparse
from pathlib import Path

import torch

from eval.scoring.harness import Settings
from runkit.errors import UsageError
from runkit.tasks import SUITES

from .targets import DTYPES


def task_names(text: str) -> list[str]:
    """`A,B,...` as a list; the name of a suite stands for its tasks."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks names no task")
    return [task for name in names for task in SUITES.get(name, (name,))]


def batch_size(text: str) -> int | str:
    """A number, or `auto`."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--batch-size must be a number or auto, not {text!r}") from None


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the flags ask for, checked."""
    size, device = batch_size(args.batch_size), device_of(args.device)
    settings = Settings(args.num_fewshot, args.limit, size, args.dtype, device)
    settings.check()
    return settings


def device_of(name: str) -> str:
    """The device of that name, or for `auto` a GPU where torch sees one.

    Raises:
        UsageError: a device that is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise UsageError(f"--device {name} is no device: use cpu, cuda or cuda:1") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name} was asked for, but torch sees no CUDA device")
    return name


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The flags of `settings_of`, and of the models."""
    parser.add_argument(
        *("--include-path", "--include_path"),
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="tasks of your own, as .yaml files for lm-eval, of which the code is run; may be given several times",
    )
    parser.add_argument("--num-fewshot", type=int, default=0, help="examples before each item")
    parser.add_argument("--limit", type=float, help="items a task, or a share of them below 1; all when left out")
    parser.add_argument("--batch-size", default="16", help="requests a batch, or auto: as many as the memory holds")
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How models are found and loaded."""
    parser.add_argument("--revision", help="branch, tag or commit, for models of the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that a model brings along")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as saved")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU where torch sees one")
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="folder for results, or a .json for one target's; else the run's eval/"
    )
    parser.add_argument("--again", action="store_true", help="compute what is there already once more")
