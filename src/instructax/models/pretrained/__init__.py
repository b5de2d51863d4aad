"""Imports Hugging Face folders and GGUF files, and exports Hugging Face folders."""
