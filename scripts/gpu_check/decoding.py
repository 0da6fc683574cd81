"""Section `decoding`: greedy tokens/s of `pre`, `peri` and the stock Llama with the weights of `pre`."""

import statistics
import time

import torch

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from modeling_periln.convert import to_native
from periln.scripts.gpu_check.notes import Notes
from periln.scripts.gpu_check.place import TINY, Place

MODEL = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 8}
BATCHES = (1, 16)
ROUNDS = 3


def check_decoding(place: Place, notes: Notes) -> None:
    sizes, new = (TINY, 4) if place.toy else (MODEL, 32)
    dtype = torch.float32 if place.toy else torch.float16
    models = {}
    for placement in ("pre", "peri"):
        torch.manual_seed(0)
        model = PeriLlamaForCausalLM(PeriLlamaConfig(**sizes, norm_placement=placement))
        models[placement] = model.to(place.device, dtype).eval()
    models["llama"] = to_native(models["pre"], "llama").to(place.device, dtype).eval()
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    found: dict[int, dict[str, float]] = {}
    for batch in BATCHES:
        if not notes.has_time(f"batch {batch}", 1 if place.toy else 12):
            continue
        ids = torch.randint(0, TINY["vocab_size"], (batch, 32), device=place.device)
        times: dict[str, list[float]] = {name: [] for name in models}
        texts = {}
        for i in range(-1, ROUNDS):  # the first does not count
            for name, model in models.items():
                place.synchronize()
                start = time.perf_counter()
                texts[name] = model.generate(ids, **options)
                place.synchronize()
                if i >= 0:
                    times[name].append(time.perf_counter() - start)
        found[batch] = {name: batch * new / statistics.median(t) for name, t in times.items()}
        notes.measure("tokens_per_second_by_batch", found)
        same = bool((texts["pre"] == texts["llama"]).float().mean() > (0.99 if place.toy else 0.9))
        notes.check(f"batch {batch}: our pre and Llama write the same", same, same, "nearly every token")
