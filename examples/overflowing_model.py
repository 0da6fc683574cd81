"""Write a small Peri-LN model whose residual stream overflows FP16: something to diagnose and to cure.

    python examples/overflowing_model.py overflowing
    periln bench overflowing --data random --samples 16 --tokens 64
    periln cure overflowing cured --data random --samples 16 --tokens 64

The weights are random. The embedding's norm and the output norms are multiplied by 2^13, so that the stream, whose
typical size is 1 after the embedding, passes 65504 after a few layers. The norms before the modules and before the
head divide by the stream's size again: in FP32 this changes nothing but what their epsilon does.
"""

import argparse
from pathlib import Path

import torch

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM

SCALE = 2.0**13


@torch.no_grad()
def overflowing(seed: int = 0) -> PeriLlamaForCausalLM:
    """The model, in FP32."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4}
    model = PeriLlamaForCausalLM(
        PeriLlamaConfig(norm_placement="peri", vocab_size=512, max_position_embeddings=256, **sizes)
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("embed_norm.weight", "output_norm.weight")):
            parameter.mul_(SCALE)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="new folder")
    out = parser.parse_args().out
    if out.exists():
        parser.error(f"{out} exists: nothing is overwritten, give another folder")
    overflowing().save_pretrained(out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
