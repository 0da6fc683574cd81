"""The trainer checked on a GPU, in one call."""
