"""Train three placements, one of them of your own, for some steps on one text, and print loss and headroom.

    python examples/own_placement.py --steps 60

A loop in plain PyTorch, to read and to change; the study itself is `periln sweep` and `periln report`. It trains in
FP32. Headroom is what FP16 would have left, log2(65504 / largest |x| in the residual stream).
"""

import argparse
import math
import sysconfig
from pathlib import Path

import torch

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM

PLACEMENTS = {
    "pre": "pre",
    "peri": "peri",
    "own": {"input_norm": True, "output_norm": True, "final_norm": True, "s": "1/sqrt(2L)"},
}
SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 3}


def text_bytes(most: int = 2_000_000) -> torch.Tensor:
    """The standard library's sources as bytes, which are the tokens here."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)[:most]), dtype=torch.uint8).long()


def train(placement: str | dict, data: torch.Tensor, steps: int, learning_rate: float) -> tuple[float, float]:
    """Train one model. Returns the mean loss of the last tenth, and the bits of headroom at the end."""
    torch.manual_seed(1)
    model = PeriLlamaForCausalLM(PeriLlamaConfig(vocab_size=256, norm_placement=placement, **SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.033)
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / max(1, steps // 10))
        starts = torch.randint(len(data) - 128, (8,), generator=generator)
        batch = torch.stack([data[start : start + 128] for start in starts])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        states = model.model(batch, output_hidden_states=True).hidden_states[:-1]  # the last is after the final norm
    largest = max(state.abs().max().item() for state in states)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last), math.log2(torch.finfo(torch.float16).max / largest)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    data = text_bytes()
    for name, placement in PLACEMENTS.items():
        loss, bits = train(placement, data, args.steps, args.learning_rate)
        print(f"{name:5} loss {loss:.3f} nats a byte, {bits:.1f} bits of headroom in the stream")


if __name__ == "__main__":
    main()
