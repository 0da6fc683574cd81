"""The command lines of `eval`: options, and what can be refused before anything heavy is imported."""
