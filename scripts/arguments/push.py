"""Options of `python -m scripts.push`."""

import argparse
from pathlib import Path

from periln.model_cards.arguments.render import add_card_arguments
from periln.runkit.errors import UsageError, make_parser, more_options


def parse(argv: list[str] | None = None, prog: str = "python -m scripts.push") -> argparse.Namespace:
    parser = make_parser(
        prog, "Send a run's checkpoint, with its card and records, to the Hub.", "runs/NAME --repo ORG/NAME --dry-run"
    )
    parser.add_argument("target", type=Path, metavar="RUN_OR_CHECKPOINT", help="run folder or model folder")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository; created if it is not there")
    parser.add_argument("--private", action="store_true", help="create it private; an existing public one is refused")
    parser.add_argument("--revision", metavar="NAME", help="branch to push to; main when left out")
    parser.add_argument("--step", type=int, metavar="N", help="the run's checkpoint of this step, to the branch step_N")
    parser.add_argument(
        "--all-checkpoints", action="store_true", help="also every checkpoint of the run, each to its branch step_N"
    )
    parser.add_argument("--dry-run", action="store_true", help="list every file with its size; needs no network")
    parser.add_argument("--force", action="store_true", help="send a diverged run all the same")
    add_card_arguments(more_options(parser))
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(args.repo)
    except HFValidationError as error:
        raise UsageError(f"--repo {args.repo!r} cannot name a repository: {' '.join(str(error).split())}") from error
    if args.repo.count("/") != 1:
        raise UsageError(f"--repo {args.repo!r} must be ORG/NAME")
    if args.revision is not None and (
        not args.revision or set(args.revision) & set(" ~^:?*[\\/") or ".." in args.revision
    ):
        raise UsageError(f"--revision {args.revision!r} is not a name for a branch")
    if args.revision is not None and args.all_checkpoints:
        raise UsageError("--revision with --all-checkpoints: the revisions are named by their steps")
    if args.step is not None and args.all_checkpoints:
        raise UsageError("--step with --all-checkpoints: those are all steps")
    if not args.target.exists():
        raise UsageError(f"{args.target} does not exist")
