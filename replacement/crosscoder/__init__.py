"""Crosscoders: wiring, weights, sparse encoding and decoding, checkpoints. Nothing here runs a language model."""
