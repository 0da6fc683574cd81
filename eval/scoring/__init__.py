"""What is asked of a model: likelihoods of answers, and generated text."""
