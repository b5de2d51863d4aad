"""The training loop, train state, optimizer, gradient accumulation and the life cycle of a
run."""
