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

from transformers.utils.import_utils import is_serve_available

from modeling_periln import PeriLlamaForCausalLM
from runkit.errors import UsageError


def main(args: argparse.Namespace) -> None:
    check(args)
    if not is_serve_available():
        raise UsageError("serving needs more packages: pip install 'transformers[serving]'")
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import main as transformers_command

    model_manager.transformers.PeriLlamaForCausalLM = PeriLlamaForCausalLM  # where the server looks for it
    sys.argv = ["transformers", "serve", *args.words]
    transformers_command()
