"""Edits as text conditions, YAML files and messages. Needs neither torch nor a server."""
