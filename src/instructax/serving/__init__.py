"""Trained models in use: sampling engine, text streams, chat and the OpenAI-compatible HTTP
server."""
