"""The stability bench: what a norm placement does to any causal LM with a residual stream, measured and bounded."""
