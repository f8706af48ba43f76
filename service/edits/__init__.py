"""Edits in their forms outside the library: conditions as text, YAML files, messages. Neither torch nor calls here."""
