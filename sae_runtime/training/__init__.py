"""The offline job: text to activations, activations to a trained and published dictionary."""
