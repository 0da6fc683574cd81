"""Cure an FP16 overflow without changing the function: `python -m eval.fp16 MODEL OUT`."""
