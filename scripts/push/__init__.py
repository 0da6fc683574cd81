"""From a checkpoint to the Hub."""
