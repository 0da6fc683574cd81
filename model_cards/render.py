"""Write the model card of a run or a checkpoint: `python -m model_cards.render RUN_OR_CHECKPOINT...`.

README.md goes into the checkpoint's folder, or to `--out`. A card with the same text is not touched; another file there
is replaced only if a card was rendered there before, or with `--force`.
"""

import sys

from periln.model_cards.arguments.render import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("model_cards.render", parse, check))  # parses before the imports below, which take seconds

import argparse

from periln.model_cards.cards import CardOptions, render_card
from periln.model_cards.subject import find_subject
from periln.runkit.errors import UserError
from periln.runkit.folder import write_text
from periln.runkit.process import start_stage

CARD = "README.md"
MARK = 'what was not recorded reads "not measured"'  # is in every card of ours


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    subjects = [find_subject(path, needs_weights=args.out is None) for path in args.targets]
    written = []
    for subject in subjects:
        figures = [p.name for p in subject.figures()]
        options = CardOptions(args.repo, args.license, tuple(args.language), tuple(args.datasets), tuple(figures))
        file = args.out or subject.checkpoint / CARD
        if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace") and not args.force:
            raise UserError(f"{file} is not a card of this command's; --force replaces it")
        written.append((file, render_card(subject, options)))
    for file, card in written:
        write_text(file, card)
        print(file)
