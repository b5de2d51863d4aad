"""Pretrained models: import from Hugging Face folders and GGUF files, export to the former."""
