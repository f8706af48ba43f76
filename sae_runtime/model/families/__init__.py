"""One place a model family: its settings, its weights."""
