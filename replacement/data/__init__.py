"""Training and validation data: rows of token ids, their sources, and shuffled batches of activations."""
