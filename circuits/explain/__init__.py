"""Explanations: what graphs say in sentences, each tested in the model, and what graphs of many prompts share."""
