"""Which number formats a causal LM survives, by emulation: scale, cast, cast back, product in FP32."""
