"""Tables of scores, from run folders or from a file of scores."""
