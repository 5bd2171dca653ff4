"""The page of a tested story for terminals and notebooks; takes the facts of `circuits.explain.story`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from circuits.graph.text import printable, shorten
from replacement import console

NOT_TOLD = "Not told: the replacement model does not bear them out"
WHY_NOT_TOLD = (
    " Not told: a graph holds attention, norms and the choice of features still; run with all of these live, the replacement "
    "model shows no such effect in one of the trials, or a random change that does as much."
)
"""What claims are that are not told."""
COMPETE = (
    " Several answers compete here, and without one group most of them stay as they are: ask why one and not another "
    "(circuits trace --target 'are - is') for a story that tells more."
)
"""What to do where little is told of several answers."""
WITHHELD_HEADS = ("", "fails in", "graph", "replacement", "original", "if told")
"""Of the table of these claims; the first column says the claim."""
STYLES = {"held": "bold", "refuted": "bold red", "untested": "dim"}
LONGEST_NAME = 24


def page(facts: Mapping[str, Any]) -> Group:
    """The overall figure, the groups, and every sentence with what was measured under it."""
    parts: list[RenderableType] = [Text(printable(facts["prompt"]), style="bold"), Text(headline(facts)), Text()]
    parts.append(console.section(f"Groups ({len(facts['groups'])})", _groups(facts)))
    for sentence in facts["sentences"]:
        parts += [_sentence(sentence), *_tests(facts, sentence), Text()]
    if facts["withheld"]:
        parts += [console.section(NOT_TOLD, _withheld(facts)), Text()]
    parts.append(Text(legend(facts), style="dim"))
    return Group(*parts)


def headline(facts: Mapping[str, Any]) -> str:
    """How many claims held, were refuted, and could not be tested; and how much of the graph they tell."""
    tested, share = facts["held"] + facts["refuted"], facts["share_held"]
    held = (
        "no claim could be tested"
        if share is None
        else f"{facts['held']} of {tested} tested claims held ({100 * share:.0f} %)"
    )
    rest = f", {facts['untested']} of {len(facts['claims'])} could not be tested" if facts["untested"] else ""
    n_withheld = len(facts["withheld"])
    withheld = f", {n_withheld} more {'is' if n_withheld == 1 else 'are'} not told" if n_withheld else ""
    told = f"{held}{rest}{withheld}; the story tells {100 * facts['told']:.0f} % of what flows into its groups"
    shares = [facts["within_factor_two"][name] for name in ("predicted", "replacement")]
    if None in shares:
        return told
    graph, replacement = (f"{100 * share:.0f} %" for share in shares)
    sizes = f"of the graph's in {graph} of tests, of the replacement's in {replacement}"
    return f"{told}. Live effects are within a factor of two {sizes}"


def legend(facts: Mapping[str, Any]) -> str:
    """What the figures mean."""
    n_controls, n_others = facts["controls"], len(facts["against"])
    n_answers = sum(group["kind"] == "outputs" for group in facts["groups"])
    others = f" or {n_others} other {'prompt' if n_others == 1 else 'prompts'} (set)" if n_others else ""
    return (
        "ablated: the cause is switched off; set: it has its values of another prompt. "
        "A group changes by % of its activation (members weighted by influence), outputs by logits. graph: what is predicted, "
        "from edges (constrained) or all paths (live). constrained: all other outputs are held; replacement: the replacement "
        "model runs on, its features reacting; live: the original model does. Brackets, 90 %: of features, the effect in "
        f"excess of {n_controls} random changes of that size; of tokens, the median over {n_controls} random tokens "
        f"(ablated){others}. A test holds if effect and brackets go the way that "
        "the claim says, whatever their size; a claim is refuted if one of its tests fails."
        + (WHY_NOT_TOLD if facts["withheld"] else "")
        + (COMPETE if facts["withheld"] and n_answers > 1 else "")
    )


def withheld_rows(facts: Mapping[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """Of every claim that is not told, the first test that the replacement model does not bear out: what the claim would say;
    which test; what the graph predicts, the replacement model does and the original does; and the verdict if it were told."""
    rows = []
    for claim in facts["withheld"]:
        test = next(test for test in claim["tests"] if not test["is_borne_out"])
        expected = [change(test[key], claim["unit"]) for key in ("predicted", "replacement")]
        rows.append(
            (
                f"{claim['source']} {claim['says']} {claim['target']}",
                f"{test['trial']}, {test['condition']}",
                *expected,
                measured(test, claim["unit"]),
                claim["verdict"],
            )
        )
    return rows


def change(value: float | None, unit: str) -> str:
    """A change of a reading: in % of the activation, or in logits."""
    if value is None:
        return "–"
    return f"{value:+.1f}" if unit == "logits" else f"{100 * value:+.0f} %"


def measured(test: Mapping[str, Any], unit: str) -> str:
    """What was measured, with its interval."""
    interval = test["interval"] and f" [{change(test['interval'][0], unit)}, {change(test['interval'][1], unit)}]"
    return change(test["measured"], unit) + (interval or "").replace(" %", "")


def _groups(facts: Mapping[str, Any]) -> RenderableType:
    rows = (
        (
            shorten(group["name"], 44),
            group["kind"],
            f"{100 * group['influence']:.0f} %",
            len(group["members"]),
            "" if group["f1"] is None else f"{group['f1']:.2f}",
        )
        for group in facts["groups"]
    )
    return console.table("group", "kind", "influence", "nodes", "F1 of name", rows=rows, texts=("kind",))


def _withheld(facts: Mapping[str, Any]) -> RenderableType:
    rows = [(shorten(says, 44), *rest) for says, *rest in withheld_rows(facts)]
    return console.table(*WITHHELD_HEADS, rows=rows, texts=WITHHELD_HEADS[1:2] + WITHHELD_HEADS[-1:])


def _sentence(sentence: Mapping[str, Any]) -> Text:
    mark = {"held": "held", "refuted": "REFUTED", "untested": "not tested"}[sentence["verdict"]]
    return Text(f"{sentence['text']}  –  {mark}", style=STYLES[sentence["verdict"]])


def _tests(facts: Mapping[str, Any], sentence: Mapping[str, Any]) -> list[RenderableType]:
    """A row for every trial of every claim of the sentence, and what refutes it."""
    rows, refuted = [], []
    for claim in (facts["claims"][number] for number in sentence["claims"]):
        by_trial: dict[str, list[Mapping[str, Any]]] = {}
        for test in claim["tests"]:
            by_trial.setdefault(test["trial"], []).append(test)
        for trial, tests in by_trial.items():
            row: list[Text | str] = [shorten(claim["source"], LONGEST_NAME), trial]
            for test in tests:
                style = "" if test["outcome"] == "held" else "bold red"
                predicted = [test["predicted"], *([test["replacement"]] if test["condition"] == "live" else [])]
                row += [change(value, claim["unit"]) for value in predicted]
                row.append(Text(measured(test, claim["unit"]), style=style))
            rows.append(row)
            failed = [f"{test['outcome']} ({test['condition']})" for test in tests if test["outcome"] != "held"]
            if failed:
                refuted.append(Text(f"{claim['source']} {trial}: effect {', '.join(failed)}", style="red"))
    heads = ("", "", "graph", "constrained", "graph", "replacement", "live")
    return [Padding(Group(console.table(*heads, rows=rows, texts=("",)), *refuted), (0, 0, 0, 2))] if rows else []
