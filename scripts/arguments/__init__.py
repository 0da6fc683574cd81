"""The command lines of `scripts`: options, and what can be refused before anything heavy is imported."""
