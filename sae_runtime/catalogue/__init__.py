"""What features mean: contexts, figures, labels with their scores, neighbours and search; one SQLite file a dictionary."""
