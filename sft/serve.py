"""`transformers serve` for our checkpoints, to be talked to by `transformers chat` or any OpenAI client.

    pip install "transformers[serving]"
    python -m sft.serve runs/NAME/sft/checkpoints/step_00000120 --port 8000

All options are those of `transformers serve` (`--help` shows them). On its own that command looks for a model's class
only in Transformers, and does not find one that is registered or comes as remote code; here it does.
"""

import sys

from periln.sft.arguments.serve import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("sft.serve", parse, check))  # parses before the imports below, which take seconds

import argparse
import sys
from pathlib import Path

from transformers.utils.import_utils import is_serve_available

from modeling_periln import PeriLlamaForCausalLM
from periln.runkit.control_tokens import END_OF_TURN, ROLES
from periln.runkit.errors import UsageError
from periln.runkit.models import check_loadable, find_model, is_local


def resolve(words: list[str]) -> None:
    """Replace a run folder in `words` by its checkpoint.

    Raises:
        UsageError: without the server's packages.
        UserError: a damaged checkpoint, or a folder without weights, tokenizer or chat template.
    """
    named = words[0] if words and not words[0].startswith("-") else None
    if named is not None and Path(named).is_dir():
        folder = find_model(named).checkpoint()
        check_loadable(folder)
        words[0] = str(folder)  # the server does not know run folders
        if not (folder / "chat_template.jinja").exists():
            raise UsageError(f"{folder} has no chat template (chat_template.jinja): serve a fine-tuned checkpoint")
    elif named is not None and not is_local(named.partition("@")[0]):
        pass  # an id of the Hub, which the server looks for
    elif named is not None:
        raise UsageError(f"{named} does not exist, and is not an id of the Hub")
    if not is_serve_available():
        raise UsageError("serving needs more packages: pip install 'transformers[serving]'")


def warn_of_old_template(words: list[str]) -> None:
    """Warn on stderr of an old chat template of ours, which parses contents and has no system turn."""
    file = Path(words[0]) / "chat_template.jinja" if words else Path()
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if ROLES[0] in text and END_OF_TURN in text and "raise_exception" not in text:
        print(
            f"{file} was written by an earlier version: a message that spells a control token becomes that token, and "
            "a system message is taken for a user's. Fine-tune again, or replace it by the template of "
            "sft.chat_template",
            file=sys.stderr,
        )


def main(args: argparse.Namespace) -> None:
    check(args)
    resolve(args.words)
    warn_of_old_template(args.words)
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import main as transformers_command

    model_manager.transformers.PeriLlamaForCausalLM = PeriLlamaForCausalLM  # where the server looks for it
    sys.argv = ["transformers", "serve", *args.words]
    transformers_command()
