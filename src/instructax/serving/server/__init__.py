"""An HTTP server with OpenAI's API for a finished policy, with batching and streaming."""
