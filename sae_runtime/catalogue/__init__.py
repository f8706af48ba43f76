"""What features mean: contexts, figures, labels with scores, neighbours and search; one SQLite file a dictionary."""
