"""Prepares rows on disk from documents, and reads batches of rows. Does not import jax, so that workers start fast."""
