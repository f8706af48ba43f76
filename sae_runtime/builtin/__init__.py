"""The small default model: a GPT-2 trained here on public-domain text, with the dictionaries trained on it."""
