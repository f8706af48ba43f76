"""Outputs of other projects' own code, to compare with."""

from pathlib import Path

FOLDER = Path(__file__).parent / "data" / "golden"
