"""A story in words: what its groups are called, and one sentence for each group that is raised or lowered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from circuits.explain.claims import Claim
from circuits.graph.group_names import distinct_names
from circuits.graph.groups import Grouping
from circuits.graph.text import printable

VERBS = {1: ("raises", "raise"), -1: ("lowers", "lower")}


def display_names(grouping: Grouping) -> list[str]:
    """Names of all groups as sentences have them: outputs are said, errors are unexplained error."""
    written = {"outputs": "say {}", "errors": "unexplained error"}
    names = [printable(written.get(group.kind, "{}").format(group.name)) for group in grouping.groups]
    return distinct_names(names, [(f"({group.kind})",) for group in grouping.groups])


def sentences(grouping: Grouping, claims: Sequence[Claim], told: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The sentences in the order of the layers they speak of, each with the numbers of its claims.

    Claims about one group with the same verb make one sentence; those about error terms, which cannot be tested, stand apart.

    Args:
        told: the claims as the report has them.
    """
    parts: dict[tuple[int, int, bool], list[int]] = {}
    for number, claim in enumerate(claims):
        is_error = grouping.groups[claim.edge.source].kind == "errors"
        parts.setdefault((claim.edge.target, claim.sign, is_error), []).append(number)
    layer = grouping.graph.nodes.layer
    height = [float(np.mean(layer[list(group.members)])) for group in grouping.groups]
    order = sorted(parts, key=lambda part: (height[part[0]], part[0], part[2], -part[1]))
    return [
        {
            "text": _text([told[number] for number in parts[part]], part[1]),
            "claims": parts[part],
            "verdict": _verdict([told[number]["verdict"] for number in parts[part]]),
        }
        for part in order
    ]


def _text(claims: Sequence[Mapping[str, Any]], sign: int) -> str:
    """`Texas and capital raise say Austin`; heads stand behind the cause that they carry."""
    causes = [claim["source"] for claim in claims]
    ways = [f" (through {_listed(claim['heads'])})" if claim["heads"] else "" for claim in claims]
    verb, target = VERBS[sign][len(causes) > 1], claims[0]["target"]
    if len(causes) == 1:
        return f"{causes[0]} {verb} {target}{ways[0]}"
    return f"{_listed([cause + way for cause, way in zip(causes, ways, strict=True)])} {verb} {target}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _verdict(verdicts: Sequence[str]) -> str:
    """That of the claims together: refuted if one is, held if those that could be tested are."""
    return next((verdict for verdict in ("refuted", "held") if verdict in verdicts), "untested")
