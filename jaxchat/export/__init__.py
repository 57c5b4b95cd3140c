"""Exports models to transformers (safetensors) and StableHLO, and imports them from transformers."""
