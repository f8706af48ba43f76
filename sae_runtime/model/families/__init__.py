"""One package for each model family: its settings, weights and forward pass."""
