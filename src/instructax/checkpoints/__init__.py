"""Checkpoints on disk: save, restore, checksums, manifests and parent runs."""
