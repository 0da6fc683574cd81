"""A live page of running pretrainings, served on this machine alone, from run folders alone."""
