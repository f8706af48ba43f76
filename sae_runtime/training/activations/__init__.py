"""Activations for training: rows dealt to streams, read through the backbone, cached, shuffled."""
