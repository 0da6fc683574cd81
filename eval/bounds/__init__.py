"""Bounds on what a residual step, a gradient or an FP16 tensor can reach, and where each model stands below them."""
