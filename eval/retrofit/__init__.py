"""How a retrofitted model compares with its source: loss, divergence, headroom, massive activations, formats."""
