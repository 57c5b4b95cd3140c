"""Decoding: sampling and cached generation. Imports no optimizer."""
