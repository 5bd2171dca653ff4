"""The feature index: what every feature fires on, reads and promotes, and a label with a score.

`replacement index` makes one SQLite file in a pass over text; `FeatureIndex` reads it without loading it whole.
"""
