"""Documents to rows on disk, and rows to batches. Nothing in here imports jax, so that worker processes start fast."""
