"""The study in miniature, end to end."""
