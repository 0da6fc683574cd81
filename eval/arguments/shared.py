"""Options that several commands have, and the checks of them."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, did_you_mean, more_options
from periln.runkit.models import is_local
from periln.runkit.tasks import SUITES

DTYPES = ("auto", "float32", "float16", "bfloat16")  # auto: as saved
TOKENS = 256  # a sample of text, by default
SCORINGS = ("plain", "shared")
TEXTS = ("wikitext", "random")  # the texts that --data knows by name


def task_names(text: str) -> list[str]:
    """`A,B,...` as a list; the name of a suite means its tasks."""
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


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The flags of `settings_of`, and of the models."""
    parser.add_argument("--limit", type=float, help="items a task, or a share of them below 1; all when left out")
    more = more_options(parser)
    add_model_options(parser, more)
    more.add_argument(
        *("--include-path", "--include_path"),
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="your own tasks, as .yaml files for lm-eval, whose code is run; may be given several times",
    )
    more.add_argument("--num-fewshot", type=int, default=0, help="examples before each item")
    more.add_argument("--batch-size", default="16", help="requests a batch, or auto: as many as the memory holds")
    more.add_argument(
        "--scoring",
        choices=SCORINGS,
        default="plain",
        help="plain: lm_eval's log-likelihoods to the bit; shared: the common beginning of a question's answers is "
        "computed once, log-likelihoods within 1e-4",
    )


def add_model_options(parser: argparse.ArgumentParser, more: argparse._ArgumentGroup) -> None:
    """How models are found and loaded, and where results go."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU where torch sees one")
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="folder for results, or a .json for one target's; else the run's eval/"
    )
    parser.add_argument("--again", action="store_true", help="compute again what is already there")
    more.add_argument("--revision", help="branch, tag or commit, for models of the Hub")
    more.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with a model")
    more.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as saved")


def check_limit(limit: float | None) -> None:
    """Refuse a `--limit` that is neither a number of items nor a share of them."""
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit % 1 == 0)):
        raise UsageError(f"limit must be at least 1 item a task, or a share of them below 1, not {limit:g}")


def check_settings(args: argparse.Namespace) -> None:
    """Refuse an impossible value of `add_settings`; names it."""
    check_limit(args.limit)
    if args.num_fewshot < 0:
        raise UsageError(f"num_fewshot must be at least 0, not {args.num_fewshot}")
    if isinstance(size := batch_size(str(args.batch_size)), int) and size < 1:
        raise UsageError(f"batch size must be at least 1, or auto, not {size}")


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Refuse a number below the least that is allowed; one that was left out (None) is fine."""
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {smallest}, not {value}")


def check_data(data: str) -> None:
    """Refuse a --data that is neither a name, nor `hf:NAME`, nor a file or folder here."""
    if data not in TEXTS and not data.startswith("hf:") and not Path(data).exists():
        near = did_you_mean(data, TEXTS)
        raise UsageError(f"--data {data!r} is not a file, and none of {', '.join(TEXTS)}, hf:NAME{near}")


def check_model(asked: str) -> None:
    """Refuse a model that is neither a path here nor an id of the Hub."""
    if is_local(asked) and not Path(asked).exists():
        raise UsageError(f"{asked} does not exist and is not an id of the Hub")


def check_tokenizer(asked: str | None) -> None:
    """Refuse a --tokenizer that is neither a path here nor an id of the Hub."""
    if asked is not None and is_local(asked) and not Path(asked).exists():
        raise UsageError(f"--tokenizer {asked} does not exist and is not an id of the Hub")


def check_new_folder(out: Path, ask: str) -> None:
    """Refuse a folder that holds something: a command that writes a new one overwrites nothing."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists: nothing is overwritten, give another {ask}")


def check_folder(out: Path) -> None:
    """Refuse a file where a folder is expected."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is not a folder")
