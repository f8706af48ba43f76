"""Fetching published dictionaries by name: OpenAI's for GPT-2, and Hugging Face repositories."""
