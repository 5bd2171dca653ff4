"""Other prompts to set groups to, for prompts of the demo: held-out probes of its corpus with another answer."""

from __future__ import annotations

from circuits.graph.circuit_graph import CircuitGraph
from replacement import LanguageModel
from replacement.demo.corpus import behaviours

OTHERS = 8
"""Other prompts: from five on, a median has an interval of 90 %."""


def demo_counterfactuals(lm: LanguageModel, graph: CircuitGraph, *, most: int = OTHERS) -> list[str]:
    """The probes that share most tokens with a graph's prompt, place by place, among those of its length with other answers.

    The graph's answers are its targets, or the likeliest token where no target is a single token. Equally close probes are
    taken in the order of the corpus. At least half of the tokens must be shared.
    """
    tokens, targets = graph.metadata["token_ids"], graph.metadata.get("targets", [])
    told = [target for target in targets if target.get("token_id", -1) >= 0] or graph.metadata.get("top_tokens", [])[:1]
    answers = {str(target["token"]).strip() for target in told}
    found = []
    for probe in (probe for behaviour in behaviours() for probe in behaviour.probes):
        others = lm.tokens(probe.prompt).tolist()
        shared = sum(token == other for token, other in zip(tokens, others, strict=False))
        if len(tokens) / 2 <= shared < len(tokens) == len(others) and not answers & set(probe.answers):
            found.append((-shared, probe.prompt))
    ranked = dict.fromkeys(prompt for _, prompt in sorted(found, key=lambda pair: pair[0]))
    return list(ranked)[:most]
