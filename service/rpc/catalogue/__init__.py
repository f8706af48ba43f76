"""What features mean, one file a call or two; the messages of catalogues."""
