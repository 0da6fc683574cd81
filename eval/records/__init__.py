"""Run folders as data frames, what is derived from them, and their history in words. Nothing here needs torch."""
