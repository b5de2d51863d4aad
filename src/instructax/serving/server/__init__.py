"""A finished policy behind OpenAI's protocol on HTTP: requests that are checked, answered
in batches, and streamed."""
