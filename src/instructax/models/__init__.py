"""One decoder-only transformer for all model families; only this package imports flax."""
