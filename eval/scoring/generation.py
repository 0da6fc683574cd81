"""Generated text, seeded, to read next to the scores."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from periln.runkit.encoding import added_around, text_ids


def generate_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], chat: bool, new_tokens: int = 60
) -> list[dict[str, Any]]:
    """One continuation of each prompt (temperature 0.8, top-k 50, seed 0); with `chat`, through the chat template."""
    samples = []
    for prompt in prompts:
        if chat:
            turns = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        else:
            ids = torch.tensor([added_around(tokenizer)[0] + text_ids(tokenizer)(prompt)])
        ids = ids.to(model.device)
        torch.manual_seed(0)
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=True,
                temperature=0.8,
                top_k=50,
                pad_token_id=tokenizer.pad_token_id,
            )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        samples.append({"prompt": prompt, "text": text, "temperature": 0.8, "top_k": 50, "seed": 0})
    return samples
