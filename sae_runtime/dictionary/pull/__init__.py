"""Fetches published dictionaries by name: OpenAI's for GPT-2, and those in Hugging Face repositories."""
