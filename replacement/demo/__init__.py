"""The model that ships with the project: its corpus, tokenizer, artifacts and measurements.

`replacement.load("demo")` loads it; `examples/train_demo.py` rebuilds it from nothing.
"""
