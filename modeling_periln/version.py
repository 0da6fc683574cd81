"""The version of the model family."""

__version__ = "0.1.0"
