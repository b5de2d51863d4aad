"""Models of other people in and out: Hugging Face folders, and GGUF files in, as the
parameters of `model`."""
