"""The language model: sites, packed rows, tokenization, backbone, attention, key-value cache."""
