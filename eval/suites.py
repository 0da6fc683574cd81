"""What the suites are made of; no heavy imports, so that tables can be drawn without torch or lm-eval."""

SUITES = {
    "mini": ("mini_arc_easy", "mini_hellaswag", "mini_piqa", "mini_social_iqa", "mini_winogrande"),
    "hub": ("arc_easy", "hellaswag", "piqa", "social_iqa", "winogrande"),
}
CHANCE = (25.0, 25.0, 50.0, 100 / 3, 50.0)  # percent, in the order of a suite's tasks
METRICS = ("acc", "acc_norm")
