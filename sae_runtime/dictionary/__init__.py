"""Sparse autoencoders: encode, decode, their files in and out."""
