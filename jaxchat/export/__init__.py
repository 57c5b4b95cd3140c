"""Models for other programs, and from them: transformers' safetensors, and StableHLO."""
