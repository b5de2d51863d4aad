"""Sampling from trained policies: engine, text streams, chat and an OpenAI-style server."""
