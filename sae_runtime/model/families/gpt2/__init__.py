"""GPT-2: its settings, its weights, its forward pass."""
