"""Fine-tuning: a run that overflows is recorded as it was."""

import pytest
import torch

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from runkit.checkpoints import write_checkpoint
from runkit.errors import run_command
from runkit.folder import RunFolder
from runkit.recipes import dump_yaml
from scripts.prepare_data import train_tokenizer
from sft import train


@pytest.mark.slow
@pytest.mark.parametrize("blown_up", [False, True])
def test_a_fine_tuning_that_overflows_is_diverged_and_its_losses_are_not_numbers(tmp_path, blown_up):
    tokenizer = train_tokenizer(["a little text about eggs and water"], 300, 128)
    torch.manual_seed(0)
    config = PeriLlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        norm_placement="pre",
        eos_token_id=tokenizer.eos_token_id,
    )
    model = PeriLlamaForCausalLM(config)
    if blown_up:
        model.model.layers[0].mlp.down_proj.weight.data.mul_(1e9)
    run = RunFolder(tmp_path / "run")
    run.claim({"stage": "pretrain"})
    with write_checkpoint(run.checkpoint_path(1), model, tokenizer):
        pass
    run.set_status("completed", step=1)
    recipe = {"data": "mini", "epochs": 1, "batch_size": 24, "learning_rate": 1e-3, "max_length": 96}
    (tmp_path / "sft.yaml").write_text(dump_yaml(recipe))
    words = ["--config", str(tmp_path / "sft.yaml"), "--model", str(run.checkpoints()[-1])]
    assert run_command(train.main, train.parse(words)) == 0
    tuned = RunFolder(run.path / "sft")  # a checkpoint of a run writes to the run, and is not taken for a newer one
    assert run.checkpoints() == [run.checkpoint_path(1)]
    losses = [r["loss"] for r in tuned.metrics()]
    assert len(losses) == 3
    if blown_up:
        assert losses == [None] * 3
        assert {r["skip_kind"] for r in tuned.metrics()} == {"forward"}
        assert tuned.status == "diverged"
    else:
        assert all(loss > 1 for loss in losses)
        assert tuned.status == "completed"
