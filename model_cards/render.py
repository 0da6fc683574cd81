"""Write the model card of a run or a checkpoint: `python -m model_cards.render RUN_OR_CHECKPOINT...`.

README.md goes into the checkpoint's folder, or to `--out`. A card of the same text is left as it is; another file
that stands there is only replaced if a card was rendered there before, or with `--force`.
"""

import argparse
import sys
from pathlib import Path

from runkit.errors import UsageError, UserError, make_parser, run_command
from runkit.folder import write_text
from runkit.process import start_stage

from .cards import CardOptions, render_card
from .subject import find_subject

CARD = "README.md"
MARK = 'what was not recorded reads "not measured"'  # stands in every card of ours


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """What no record can say of a model, for the commands that render a card."""
    parser.add_argument("--license", default="apache-2.0", help="license of the weights, by its name on the Hub")
    parser.add_argument("--language", nargs="+", default=["en"], metavar="CODE", help="languages of the data")
    parser.add_argument("--datasets", nargs="+", default=[], metavar="ORG/NAME", help="data sets on the Hub")


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    if args.out is not None and len(args.targets) != 1:
        raise UsageError(f"--out is for one target, not for {len(args.targets)}")
    subjects = [find_subject(path, needs_weights=args.out is None) for path in args.targets]
    written = []
    for subject in subjects:
        figures = [p.name for p in subject.figures()]
        options = CardOptions(args.repo, args.license, tuple(args.language), tuple(args.datasets), tuple(figures))
        file = args.out or subject.checkpoint / CARD
        if file.is_dir():
            raise UsageError(f"--out {file} is a folder; give the path of the file")
        if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace") and not args.force:
            raise UserError(f"{file} is no card of this command's; --force replaces it")
        written.append((file, render_card(subject, options)))
    for file, card in written:
        write_text(file, card)
        print(file)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("python -m model_cards.render", "Write the model cards of runs or checkpoints.")
    parser.add_argument("targets", type=Path, nargs="+", metavar="RUN_OR_CHECKPOINT", help="run or model folders")
    parser.add_argument("--repo", metavar="ORG/NAME", help="where the model will be on the Hub")
    parser.add_argument("--out", type=Path, help="file to write; README.md in the checkpoint when left out")
    parser.add_argument("--force", action="store_true", help="replace a README.md that is not from this command")
    add_card_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    sys.exit(run_command(main, arguments))
