"""`transformers serve` for our checkpoints, to be talked to by `transformers chat` or any OpenAI client.

    pip install "transformers[serving]"
    python -m sft.serve runs/NAME/sft/checkpoints/step_00000120 --port 8000

All words are those of `transformers serve` (`--help` shows them). By itself that command looks for a model's class
in Transformers alone and does not find one that is registered or brought along as remote code; here it is told.
"""

import argparse
import re
import sys
from pathlib import Path

from transformers.utils.import_utils import is_serve_available

from modeling_periln import PeriLlamaForCausalLM
from runkit.control_tokens import END_OF_TURN
from runkit.errors import UsageError, run_command

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def check(words: list[str]) -> None:
    """Raise UsageError for a folder that is missing or without chat template, and without the server's packages."""
    named = words[0] if words and not words[0].startswith("-") else None
    if named is not None and Path(named).is_dir():
        if not (Path(named) / "config.json").exists():
            raise UsageError(f"{named} is no checkpoint (config.json): name one of those in its checkpoints/")
        if not (Path(named) / "chat_template.jinja").exists():
            raise UsageError(f"{named} has no chat template (chat_template.jinja): serve a fine-tuned checkpoint")
    elif named is not None and not _HUB_ID.fullmatch(named.partition("@")[0]):
        raise UsageError(f"{named} does not exist, and is no id of the Hub")
    if not is_serve_available():
        raise UsageError("serving needs more packages: pip install 'transformers[serving]'")


def warn_of_old_template(words: list[str]) -> None:
    """Say on stderr that a chat template of ours is one that parses contents, and knows no system turn."""
    file = Path(words[0]) / "chat_template.jinja" if words else Path()
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if END_OF_TURN in text and "raise_exception" not in text:
        print(
            f"{file} was written by an earlier version: a message that spells a control token becomes that token, and "
            "a system message is taken for a user's. Fine-tune again, or replace it by the template of "
            "sft.chat_template",
            file=sys.stderr,
        )


def main(args: argparse.Namespace) -> None:
    check(args.words)
    warn_of_old_template(args.words)
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import main as transformers_command

    model_manager.transformers.PeriLlamaForCausalLM = PeriLlamaForCausalLM  # where the server looks for it
    sys.argv = ["transformers", "serve", *args.words]
    transformers_command()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Everything is handed on; `--debug` is read here as well."""
    words = sys.argv[1:] if argv is None else argv
    return argparse.Namespace(words=[word for word in words if word != "--debug"], debug="--debug" in words)


if __name__ == "__main__":
    arguments = parse()
    sys.exit(run_command(main, arguments))
