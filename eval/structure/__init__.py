"""How a causal language model is taken apart: layers, sublayers, norms, and the points at which a tensor is seen."""
