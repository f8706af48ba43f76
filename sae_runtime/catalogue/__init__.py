"""What features mean: contexts, figures, labels and their scores, neighbours, search. One SQLite file a dictionary."""
