"""A live page beside running pretrainings: served on this machine alone, from run folders alone."""
