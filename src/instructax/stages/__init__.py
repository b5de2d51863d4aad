"""The stages of the pipeline: each is one module with Config, validate, train, row_lengths
and memory."""
