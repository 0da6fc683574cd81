"""The trainer: engines, steps, schedules, checkpoints, instruments and trackers."""
