"""Push with the libraries' own methods, from a process whose environment names the Hub: argv = a folder to work in."""

import sys
from pathlib import Path

import hub_run
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import modeling_periln  # noqa: F401 (it registers the family)

folder = Path(sys.argv[1])
model, tokenizer = hub_run.model(seed=11), hub_run.tokenizer()
model.push_to_hub("acme/plain")
tokenizer.push_to_hub("acme/plain")

# Loaded from the Hub and saved again: `auto_map` must name the code next to it, and the code must be there.
again = AutoModelForCausalLM.from_pretrained("acme/plain")
again.save_pretrained(folder / "again")
AutoModelForCausalLM.from_pretrained(folder / "again").push_to_hub("acme/again")
AutoTokenizer.from_pretrained("acme/plain").push_to_hub("acme/again")


class Rows(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(6) + i
        return {"input_ids": ids, "labels": ids}


arguments = TrainingArguments(
    output_dir=str(folder / "trained"),
    hub_model_id="acme/trained",
    max_steps=1,
    learning_rate=0.0,
    report_to=[],
    use_cpu=True,
    save_strategy="no",
)
trainer = Trainer(model=hub_run.model(seed=11), args=arguments, train_dataset=Rows(), processing_class=tokenizer)
trainer.train()
trainer.push_to_hub()
