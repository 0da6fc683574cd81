"""Grids of runs: placements, learning rates and seeds from one YAML file."""
