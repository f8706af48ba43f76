"""Fast paths of encoding and decoding, each beside the plain computation it must equal."""
