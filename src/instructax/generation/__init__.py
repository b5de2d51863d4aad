"""Samples responses: prefill, then decoding in slots."""
