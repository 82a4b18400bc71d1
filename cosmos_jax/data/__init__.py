"""From a named source of text to batches of token ids."""
