"""Evaluation: benchmark metrics, policy responses, validation, confidence intervals."""
