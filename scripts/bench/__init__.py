"""How fast PeriLlama is beside Transformers' own models, and its trainer beside theirs."""
