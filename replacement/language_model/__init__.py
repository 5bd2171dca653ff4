"""The language model: loading through TransformerLens, and its attention and norms frozen for one prompt."""
