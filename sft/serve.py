"""`transformers serve` for our checkpoints, to be talked to by `transformers chat` or any OpenAI client.

    pip install "transformers[serving]"
    python -m sft.serve runs/NAME/sft/checkpoints/step_00000120 --port 8000

All words are those of `transformers serve` (`--help` shows them). By itself that command looks for a model's class
in Transformers alone and does not find one that is registered or brought along as remote code; here it is told.
"""

import sys

from periln.start import start

from .arguments.serve import check, parse

if __name__ == "__main__":
    sys.exit(start("sft.serve", parse, check))  # parses before the imports below, which take seconds

import argparse
import sys
from pathlib import Path

from transformers.utils.import_utils import is_serve_available

from modeling_periln import PeriLlamaForCausalLM
from runkit.errors import UsageError, UserError
from runkit.models import check_loadable, find_model


def resolve(words: list[str]) -> None:
    """Put the checkpoint that a run folder stands for into `words`.

    Raises:
        UsageError: without the server's packages.
        UserError: a damaged checkpoint, or a folder without weights, tokenizer or chat template.
    """
    if not is_serve_available():
        raise UsageError("serving needs more packages: pip install 'transformers[serving]'")
    folder = Path(words[0]) if words and not words[0].startswith("-") else None
    if folder is None or not folder.is_dir():
        return
    folder = find_model(folder).checkpoint()
    check_loadable(folder)
    words[0] = str(folder)  # the server knows no run folders
    if not (folder / "chat_template.jinja").exists():
        raise UserError(f"{folder} has no chat template (chat_template.jinja): serve a fine-tuned checkpoint")


def main(args: argparse.Namespace) -> None:
    check(args)
    resolve(args.words)
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import main as transformers_command

    model_manager.transformers.PeriLlamaForCausalLM = PeriLlamaForCausalLM  # where the server looks for it
    sys.argv = ["transformers", "serve", *args.words]
    transformers_command()
