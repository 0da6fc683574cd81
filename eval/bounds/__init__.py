"""Bounds on what a residual step, a gradient or an FP16 tensor can reach, and how far below them each model is."""
