"""Figures that a dictionary is published with: held-out error and losses, statistics, densities, and their card.

Training publishes them and `saeserve evaluate` adds to them; both are above this room.
"""
