"""Text for the offline jobs: documents, data sets, token folders, rows of token ids."""
