"""What the `heads` command shows, question by question: a page for what `facts.py` found out."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.text import Text

from circuits.graph.text import head_name, printable
from circuits.heads.facts import Facts
from circuits.heads.qk_result import node_words
from replacement import console
from replacement.token_texts import visible

_RUNGS = {
    "direct": "only what the feature itself reads changes (ablation is exact here by construction)",
    "frozen": "removed from the residual stream; MLPs react, attention patterns do not",
    "live": "removed from the residual stream; everything reacts",
}
_RULES = {
    "gate": "its contribution, while the feature is active",
    "path": "its share of the activation, in proportion to its contribution",
    "shapley": "its share of the activation, the mean over all orders in which players may join",
    "ablation": "what the activation loses without that player alone; these losses need not sum to the activation",
}
_BAR = 20
_TEXTS = ("", "carried by", "key node")
"""Columns of text; the others hold numbers."""
_MOST_OF_SIDE = 5
"""Nodes of each side of a score that are shown; JSON holds more."""


def graph_page(facts: Facts) -> Group:
    """The heads of a graph and its strongest edges."""
    carriers = [(_name(head), head, f"{head['edges']:,}") for head in facts["heads"]]
    carriers += [(name, facts[name], "") for name in ("direct", "rest") if facts[name]["influence"]]
    heads = [
        (name, f"{carrier['influence']:.4f}", _percent(carrier["share"]), edges, _bar(carrier["share"]))
        for name, carrier, edges in carriers
    ]
    ends = "{source_name} → {target_name}\n{source}->{target}"
    edges = [(ends.format(**edge), f"{edge['weight']:+.3f}", edge["carried_by"]) for edge in facts["edges"]]
    by_head = "Influence carried by each head, the last one on the way (sums to the average path length)"
    return Group(
        Text(printable(facts["prompt"]), style="bold"),
        Text(),
        _section(by_head, ("head", "influence", "share", "edges", ""), heads),
        _section("Strongest edges", ("edge", "weight", "carried by"), edges),
    )


def edge_page(facts: Facts) -> Group:
    """One edge, by last and by first hop."""
    title = f"{facts['source_name']} → {facts['target_name']}: {facts['weight']:+.4f}"
    hops = {"last": "Head that writes to the target's position", "first": "Head that first moves what the source wrote"}
    parts: list[RenderableType] = [Text(title, style="bold"), Text()]
    for hop, heading in hops.items():
        split = facts[hop]
        shares = [("direct", split["direct"], split["direct_share"])]
        shares += [(_name(head), head["weight"], head["share"]) for head in split["heads"]]
        rows = [(name, f"{weight:+.4f}", _percent(share), _bar(share)) for name, weight, share in shares]
        rows.append(("other heads", f"{split['rest']:+.4f}", "", ""))
        parts.append(_section(f"{heading} ({hop} hop)", ("part", "weight", "share", ""), rows))
    return Group(*parts)


def feature_page(facts: Facts) -> Group:
    """One feature: players, their contributions and credits."""
    title = (
        f'feature {facts["feature"]} "{visible(facts["token"])}": activation {facts["activation"]:.4g} = '
        f"f({facts['pre_activation']:.4g}), threshold {facts['threshold']:.4g}"
    )
    rows = [(*_player(head["name"], head), _percent(head["encoder_share"])) for head in facts["heads"]]
    others = facts["other_heads"]
    if others["number"]:
        rows.append(_player("1 other head" if others["number"] == 1 else f"{others['number']} other heads", others))
    if facts["part"] == "mlp":
        rows.append(_player("direct", facts["direct"]))
    rows += [("bias", f"{facts['bias']:+.4f}"), ("residual", "", f"{facts['residual']:+.4f}")]
    heads = ("player", "to pre-activation", f"credit ({facts['rule']})", "± error", "encoder")
    credit = f"credit of a player ({facts['rule']}): {_RULES[facts['rule']]}; residual: what all credits leave"
    identity = f"sum of players and bias = pre-activation up to {facts['identity_error']:.1e} (relative)"
    drawn = [Text(f"picture: {file}") for file in facts.get("files", {}).values()]
    return Group(
        Text(title, style="bold"), Text(), _section("Players", heads, rows), Text(credit), Text(identity), *drawn
    )


def attends_page(facts: Facts) -> Group:
    """One score: its pairs, and the nodes of each side."""
    query, key = (f'"{visible(facts[f"{side}_token"])}" at {facts[side]}' for side in ("query", "key"))
    numbers = (
        f"pattern {facts['pattern']:.4f}, score {facts['score']:+.4f}, "
        f"above the mean of the other visible keys by {facts['value']:+.4f}"
    )
    pairs = [
        (node_words(pair["query"]), node_words(pair["key"]), f"{pair['contribution']:+.4f}") for pair in facts["pairs"]
    ]
    parts: list[RenderableType] = [
        Text(f"{facts['name']}: {query} attends to {key}", style="bold"),
        Text(numbers),
        Text(),
        _section("Largest pairs", ("query node", "key node", "contribution"), pairs),
    ]
    for side in ("query", "key"):
        rows = [(node_words(node), f"{node['contribution']:+.4f}") for node in facts[f"by_{side}"][:_MOST_OF_SIDE]]
        parts.append(_section(f"By {side} node, all its pairs", (f"{side} node", "contribution"), rows))
    identity = f"sum of all pairs = the model's own difference up to {facts['identity_error']:.1e} (relative)"
    return Group(*parts, Text(identity))


def check_page(facts: Facts) -> Group:
    """Rules against measured removals, rung by rung."""
    counts = f"{facts['pairs']:,} (feature, head) pairs, {facts['features']} features, {facts['prompts']} prompts"
    parts: list[RenderableType] = [Text("Loss of activation: credit and what is measured", style="bold"), Text(counts)]
    for rung, rules in facts["rungs"].items():
        rows = [
            (rule, *("–" if number is None else f"{number:.3f}" for number in row.values()))
            for rule, row in rules.items()
        ]
        parts += [Text(), _section(f"{rung}: {_RUNGS[rung]}", ("rule", "correlation", "relative error"), rows)]
    return Group(*parts)


def _section(title: str, heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Group:
    return console.section(title, console.table(*heads, rows=rows, texts=_TEXTS))


def _name(head: Facts) -> str:
    return head_name(head["layer"], head["head"])


def _player(name: str, player: Facts) -> tuple[str, ...]:
    error = f"{player['standard_error']:.4f}" if player.get("standard_error") else ""
    return name, f"{player['contribution']:+.4f}", f"{player['credit']:+.4f}", error


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _bar(share: float) -> str:
    return "█" * round(_BAR * share)
