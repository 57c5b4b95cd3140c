"""Scores of a model; nothing here changes it."""
