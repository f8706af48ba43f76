"""What a dictionary and a backbone are worth, measured on text."""
