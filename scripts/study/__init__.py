"""The study: from a budget to a verdict on every claim of the paper."""
