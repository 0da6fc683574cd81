"""The five benchmarks as lm-eval 0.4.13 reads them: repository, configuration, split, a name for people."""

BENCHMARKS = {
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", "ARC-Easy"),
    "hellaswag": ("Rowan/hellaswag", "default", "validation", "HellaSwag"),
    "piqa": ("baber/piqa", "default", "validation", "PIQA"),
    "social_iqa": ("lighteval/siqa", "default", "validation", "SIQA"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", "Winogrande"),
}
METRIC_NAMES = {"acc": "accuracy", "acc_norm": "accuracy, normalized by length"}
