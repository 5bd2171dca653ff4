"""Pages for people of what the `heads` command says; each takes the facts of `circuits.heads.json_facts` of the same name."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from circuits.graph.text import printable
from circuits.heads.json_facts import Facts

_RUNGS = {
    "direct": "only the feature's own read changes (ablation is exact here by construction)",
    "frozen": "removed from the residual stream; MLPs react, attention patterns do not",
    "live": "removed from the residual stream; everything reacts",
}
_BAR = 20
_MOST_OF_SIDE = 5
"""Nodes of each side of a score that are shown; JSON holds more."""


def graph_page(facts: Facts) -> Group:
    """The heads of a graph and its strongest edges."""
    heads = _table("head", "influence", "share", "edges", "")
    rows = [(_name(head), head, f"{head['edges']:,}") for head in facts["heads"]]
    rows += [(name, facts[name], "") for name in ("direct", "rest") if facts[name]["influence"]]
    for name, row, edges in rows:
        heads.add_row(name, f"{row['influence']:.4f}", _percent(row["share"]), edges, _bar(row["share"]))
    edges_table = _table("edge", "weight", "carried by")
    for edge in facts["edges"]:
        ends = f"{edge['source_name']} → {edge['target_name']}\n{edge['source']}->{edge['target']}"
        edges_table.add_row(Text(ends), f"{edge['weight']:+.3f}", Text(_carried(edge["parts"])))
    return Group(
        Text(printable(facts["prompt"]), style="bold"),
        Text(),
        _section("Influence carried by each head, the last one on the way (sums to the average path length)", heads),
        _section("Strongest edges", edges_table),
    )


def edge_page(facts: Facts) -> Group:
    """One edge, by last and by first hop."""
    title = f"{facts['source_name']} → {facts['target_name']}: {facts['weight']:+.4f}"
    hops = {"last": "Head that writes to the target's position", "first": "Head that first moves what the source wrote"}
    parts: list[RenderableType] = [Text(title, style="bold"), Text()]
    for hop, heading in hops.items():
        split, table = facts[hop], _table("part", "weight", "share", "")
        rows = [("direct", split["direct"], split["direct_share"])]
        rows += [(_name(head), head["weight"], head["share"]) for head in split["heads"]]
        for name, weight, share in rows:
            table.add_row(name, f"{weight:+.4f}", _percent(share), _bar(share))
        table.add_row("other heads", f"{split['rest']:+.4f}", "", "")
        parts.append(_section(f"{heading} ({hop} hop)", table))
    return Group(*parts)


def feature_page(facts: Facts) -> Group:
    """One feature: players, their contributions and credits."""
    kind = "attention feature" if facts["part"] == "attention" else "feature"
    token = printable(facts["token"]).strip()
    title = (
        f'{kind} {facts["feature"]} "{token}": activation {facts["activation"]:.4g} = '
        f"f({facts['pre_activation']:.4g}), threshold {facts['threshold']:.4g}"
    )
    table = _table("player", "to pre-activation", f"credit ({facts['rule']})", "± error", "encoder")
    for head in facts["heads"]:
        table.add_row(*_player(_name(head), head), _percent(head["encoder_share"]))
    others = facts["other_heads"]
    if others["number"]:
        table.add_row(f"{others['number']} other heads", f"{others['contribution']:+.4f}", f"{others['credit']:+.4f}")
    if facts["part"] == "mlp":
        table.add_row(*_player("direct", facts["direct"]), "")
    table.add_row("bias", f"{facts['bias']:+.4f}")
    table.add_row("residual", "", f"{facts['residual']:+.4f}")
    identity = f"sum of players and bias = pre-activation up to {facts['identity_error']:.1e} (relative)"
    drawn = [Text(f"picture: {file}") for file in facts.get("files", {}).values()]
    return Group(Text(title, style="bold"), Text(), _section("Players", table), Text(identity), *drawn)


def attends_page(facts: Facts) -> Group:
    """One score: its pairs, and the nodes of each side."""
    query, key = (f'"{printable(facts[f"{side}_token"]).strip()}" at {facts[side]}' for side in ("query", "key"))
    numbers = (
        f"pattern {facts['pattern']:.4f}, score {facts['score']:+.4f}, "
        f"above the mean of the other visible keys by {facts['value']:+.4f}"
    )
    pairs = _table("query node", "key node", "contribution")
    for pair in facts["pairs"]:
        pairs.add_row(Text(_node(pair["query"])), Text(_node(pair["key"])), f"{pair['contribution']:+.4f}")
    parts: list[RenderableType] = [
        Text(f"{_name(facts)}: {query} attends to {key}", style="bold"),
        Text(numbers),
        Text(),
        _section("Largest pairs", pairs),
    ]
    for side in ("query", "key"):
        table = _table(f"{side} node", "contribution")
        for node in facts[f"by_{side}"][:_MOST_OF_SIDE]:
            table.add_row(Text(_node(node)), f"{node['contribution']:+.4f}")
        parts.append(_section(f"By {side} node, all its pairs", table))
    identity = f"sum of all pairs = the model's own difference up to {facts['identity_error']:.1e} (relative)"
    return Group(*parts, Text(identity))


def check_page(facts: Facts) -> Group:
    """Rules against measured removals, rung by rung."""
    counts = f"{facts['pairs']:,} (feature, head) pairs, {facts['features']} features, {facts['prompts']} prompts"
    parts: list[RenderableType] = [Text("Loss of activation: credit and what is measured", style="bold"), Text(counts)]
    for rung, rules in facts["rungs"].items():
        table = _table("rule", "correlation", "relative error")
        for rule, row in rules.items():
            table.add_row(rule, *("–" if row[name] is None else f"{row[name]:.3f}" for name in row))
        parts += [Text(), _section(f"{rung}: {_RUNGS[rung]}", table)]
    return Group(*parts)


def _section(title: str, body: RenderableType) -> Group:
    return Group(Text(title, style="bold blue"), Padding(body, (0, 0, 1, 2), expand=False))


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, min_width=8)
    for name in others:
        table.add_column(name, justify="left" if name in ("", "carried by", "key node") else "right")
    return table


def _name(head: Facts) -> str:
    return f"L{head['layer']}H{head['head']}"


def _node(node: Facts) -> str:
    """A source node in words; feature ids as elsewhere, so that they can be looked up."""
    label = printable(node["label"]).strip()
    if node["kind"] == "feature":
        part = "attention " if node["part"] == "attention" else ""
        return f"{part}feature {node['layer']}/{node['index']} at {node['position']}" + (f" ({label})" if label else "")
    if node["kind"] == "token":
        return f'token "{label}" at {node["position"]}'
    return f"{label} at {node['position']}" if node["kind"] == "error" else label


def _player(name: str, player: dict[str, Any]) -> tuple[str, str, str, str]:
    error = f"{player['standard_error']:.4f}" if player["standard_error"] else ""
    return name, f"{player['contribution']:+.4f}", f"{player['credit']:+.4f}", error


def _carried(parts: Facts) -> str:
    named = [(_name(head), head["weight"], head["share"]) for head in parts["heads"]]
    named.append(("direct", parts["direct"], parts["direct_share"]))
    named.sort(key=lambda part: -part[2])
    return ", ".join(
        f"{'−' if weight < 0 else ''}{name} {_percent(share)}" for name, weight, share in named[:4] if share
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _bar(share: float) -> str:
    return "█" * round(_BAR * share)
