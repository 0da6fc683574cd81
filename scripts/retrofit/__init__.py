"""Give a trained checkpoint another norm placement: fold what is exact, calibrate the rest, and heal by training."""
