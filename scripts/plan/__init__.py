"""What a recipe costs: parameters, FLOPs, memory and time, before anything is run."""
