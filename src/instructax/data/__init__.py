"""From JSON lines of people's texts and judgements to batches of token ids."""
