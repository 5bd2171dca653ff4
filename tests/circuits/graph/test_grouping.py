"""Which features are grouped, and into how many groups."""

import numpy as np
import pytest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_groups": 0}, "max_groups must be 1 or more, got 0"),
        ({"neighbours": -1}, "neighbours must be 0 or more, got -1"),
        (
            {"signatures": np.ones((3, 2))},
            r"signatures: expected a row for each of 8 nodes, given an array of \(3, 2\)",
        ),
        ({"signatures": np.ones(8)}, r"signatures: expected a row for each of 8 nodes, given an array of \(8,\)"),
        ({"signatures": np.full((8, 2), np.nan)}, "signatures: expected finite numbers"),
        ({"signatures": np.full((8, 2), "a")}, "signatures: expected finite numbers"),
    ],
)
def test_bad_options(small, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        small.group(**options)
