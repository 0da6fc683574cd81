"""The paper's Propositions D.1 to D.3 on the paper's own network, where they are exact (arXiv 2502.02732, appendix D).

One token x (D,), a ReLU MLP with biases, a scalar gamma, and the stream itself is the logits:

    pre  (D.1)   h = ReLU(Norm(x) W1 + b1),  a = h W2 + b2,  logits o = x + a
    peri (D.2)   the same h and a,                           logits o = x + gamma RMSNorm(a)
    post (D.3)   h = ReLU(x W1 + b1),        a = h W2 + b2,  logits o = gamma RMSNorm(x + a)

With the cross entropy's dL/do = p - y, and D the width, for the gradient of one entry (i, j) of W2:

    D.1   dL/dW2[i, j] = h_i (p_j - y_j)
    D.2   |dL/dW2[i, j]| <= 4 gamma sqrt(D) |h| / |a|
    D.3   |dL/dW2[i, j]| <= 4 gamma sqrt(D) |h| / |x + a|

Sharper, and for the whole matrix: dL/dW2 is the outer product of h and dL/da, so its Frobenius norm is |h| |dL/da|; the
Jacobian of gamma RMSNorm is gamma / r (I - n n^T / (D r^2)) with r = sqrt(mean n^2 + eps), symmetric, with the norm
gamma / r <= gamma sqrt(D) / |n|; and |p - y| <= sqrt(2), as p and y are points of the simplex. So

    |dL/dW2|_F  <=  |p - y| gamma sqrt(D) |h| / |n|  <=  sqrt(2) gamma sqrt(D) |h| / |n|

with n = a (D.2) or x + a (D.3): 2 sqrt(2) below the paper's bound, which is for one entry. The paper prints h from x in
D.1 and D.2, where its equation 15 takes Norm(x); here h is what the network computes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

KINDS = ("pre", "peri", "post")


@dataclass(frozen=True)
class PaperNetwork:
    """The network of a proposition. w1 (D, H), b1 (H,), w2 (H, D), b2 (D,)."""

    kind: str
    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor
    gamma: float = 1.0
    eps: float = 0.0

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """RMSNorm without gain."""
        return x / (x.square().mean() + self.eps).sqrt()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """h (H,), a (D,) and the logits (D,)."""
        h = F.relu((x if self.kind == "post" else self.norm(x)) @ self.w1 + self.b1)
        a = h @ self.w2 + self.b2
        if self.kind == "pre":
            return h, a, x + a
        if self.kind == "peri":
            return h, a, x + self.gamma * self.norm(a)
        return h, a, self.gamma * self.norm(x + a)


@dataclass(frozen=True)
class Proposition:
    """What a proposition says about one token, next to autograd's gradient.

    `gradient` is dL/dW2 (H, D). `formula` (H, D) is D.1's own, exact (None but for `pre`). `paper` bounds every entry,
    `sharp` and `with_loss` (|p - y| measured) the Frobenius norm; None for `pre`, whose gradient has no such bound.
    """

    gradient: torch.Tensor
    formula: torch.Tensor | None
    paper: float | None
    sharp: float | None
    with_loss: float | None


def proposition(network: PaperNetwork, x: torch.Tensor, label: int) -> Proposition:
    """Evaluate a network's proposition on a token x (D,) with the label's index.

    Raises:
        ValueError: `kind` is none of `KINDS`, or what the norm divides by is zero.
    """
    if network.kind not in KINDS:
        raise ValueError(f"kind={network.kind!r} is none of {', '.join(KINDS)}")
    w2 = network.w2.detach().clone().requires_grad_(True)
    network = PaperNetwork(network.kind, network.w1, network.b1, w2, network.b2, network.gamma, network.eps)
    h, a, logits = network.forward(x)
    loss = F.cross_entropy(logits[None], torch.tensor([label]))
    (gradient,) = torch.autograd.grad(loss, w2)
    h, a, logits = h.detach(), a.detach(), logits.detach()
    residue = logits.softmax(0) - F.one_hot(torch.tensor(label), len(logits)).to(logits.dtype)
    if network.kind == "pre":
        return Proposition(gradient, torch.outer(h, residue), None, None, None)
    length = (a if network.kind == "peri" else x + a).norm().item()
    if length == 0:
        raise ValueError("the norm's input is zero: its Jacobian has no bound of this form")
    once = abs(network.gamma) * math.sqrt(len(x)) * h.norm().item() / length
    return Proposition(gradient, None, 4 * once, math.sqrt(2) * once, residue.norm().item() * once)
