"""Pretraining: text -> tokens -> checkpoints, and the demo that runs the whole path."""
