"""The command lines of `sft`: options, and what can be refused before anything heavy is imported."""
