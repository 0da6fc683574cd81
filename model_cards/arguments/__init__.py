"""The command lines of `model_cards`: options, and what can be refused before anything heavy is imported."""
