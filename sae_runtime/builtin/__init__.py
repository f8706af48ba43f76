"""The default model, its dictionaries, and how they were made. Here: where their files are."""

from pathlib import Path

BACKBONE = Path(__file__).parent / "backbone"
DICTIONARIES = Path(__file__).parent / "dictionaries"
HELD_OUT = Path(__file__).parent / "data" / "heldout.jsonl.xz"
"""Text that neither the model nor the dictionaries were trained on, by kind."""
