"""Training on Ray Train: many workers, restarted from their checkpoint when one is lost."""
