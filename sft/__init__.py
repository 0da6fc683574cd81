"""Supervised fine-tuning on LIMA-format conversations, through TRL."""
