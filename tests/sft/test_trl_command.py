"""`trl sft` as docs/how-to/fine-tune.md writes it: it asks nothing, and trains the checkpoint that it is given."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from small import ROOT, make_run, write_conversations
from transformers import AutoTokenizer

from modeling_periln import PeriLlamaForCausalLM
from periln.runkit.errors import run_command
from periln.sft import train
from periln.sft.conversations import CHAT_TEMPLATE


def written_command(start: str) -> list[str]:
    """The words of the page's command that begins so, over its continued lines."""
    page = (ROOT / "docs" / "how-to" / "fine-tune.md").read_text()
    found = re.search(rf"^{re.escape(start)}(?:.*\\\n)*.*$", page, re.MULTILINE)
    return shlex.split(found[0].replace("\\\n", " "))


@pytest.mark.slow
def test_the_command_as_written_runs_without_a_question(tmp_path):
    checkpoint = make_run(tmp_path).checkpoints()[-1]
    tuned = shutil.copytree(checkpoint, tmp_path / "tuned")
    (tuned / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    export = written_command("python -m sft.train --config sft/recipes/lima.yaml --export-data")
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(f"data: {write_conversations(tmp_path)}\n")
    asked = {"sft/recipes/lima.yaml": str(recipe), "lima/train.jsonl": str(tmp_path / "lima" / "train.jsonl")}
    assert run_command(train.main, train.parse([asked.get(word, word) for word in export[3:]])) == 0

    names = {"CHECKPOINT": checkpoint, "FINE_TUNED_CHECKPOINT": tuned, "OUT": tmp_path / "out"}
    placeholder = re.compile(r"\b(FINE_TUNED_CHECKPOINT|CHECKPOINT|OUT)\b")
    words = [placeholder.sub(lambda found: str(names[found[0]]), word) for word in written_command("trl sft")]
    few = ["--max_steps", "2", "--learning_rate", "1e-2", "--use_cpu", "--report_to", "none"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from trl.cli import main; main()", *words[1:], *few],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "[y/N]" not in said and "run the custom code" not in said

    before, after = (PeriLlamaForCausalLM.from_pretrained(path) for path in (checkpoint, tmp_path / "out"))
    assert after.config.vocab_size == before.config.vocab_size
    assert not torch.equal(after.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(checkpoint).get_vocab()
