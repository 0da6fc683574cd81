"""How a retrofitted model does beside its source: loss, divergence, headroom, massive activations, formats."""
