"""Evaluation: benchmarks through lm-eval, held-out loss, samples, tables, figures, the report."""
