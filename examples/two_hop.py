"""Does the demo model hop through the state? Swap the state's features and read the capital.

    python examples/two_hop.py

The prompt `the capital of the state containing Dallas is` needs two hops, and Dallas is a city the model never saw in such a
sentence. This script

1. finds each state's features: active for at least half of the state's cities (at the city or at the last word) and for at most
   half of all others. The city that is asked about is left out of the search, so nothing is fitted to it;
2. traces the Dallas prompt and lists the features in its pruned circuit that fire for Texas cities and for few others;
3. in the original model's own run (errors kept), switches Texas' features off and another state's on, at that state's mean
   activation, and reads the next token: the other state's capital, if the features carry the hop. Features of the last layer
   may simply say the answer, so the swap is repeated without that layer, with layer 0 alone, and at the city alone; and with
   only those features that fire for at most a fifth of the other cities, which shows how far a state is a single feature's
   matter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

import circuits
import replacement
from replacement import Intervention, ReplacementModel
from replacement.demo.corpus import HELD_OUT_CITIES, HELD_OUT_STATES, capital_of, cities_of, state_of, states

PROMPT = "the capital of the state containing {city} is"
FREQUENT, COMMON, RARE = 0.5, 0.5, 0.2
"""A state's feature fires for this share of its cities at least, for that share of the others at most; rare ones for less."""

Key = tuple[int, int, int]
"""Group, position, index."""


def active_features(model: ReplacementModel, city: str) -> dict[Key, float]:
    """Features at the city and at the last word of its prompt."""
    tokens = model.language_model.tokenize(PROMPT.format(city=city))
    features = model.localize(tokens).features
    columns = (features.group.tolist(), features.row.tolist(), features.index.tolist())
    found = zip(zip(*columns, strict=True), features.activation.tolist(), strict=True)
    return {key: value for key, value in found if key[1] >= len(tokens) - 2}


def features_by_city(model: ReplacementModel) -> dict[str, dict[Key, float]]:
    """Active features of every listed city that is no capital."""
    return {city: active_features(model, city) for state in states() for city in cities_of(state, capital=False)}


def state_features(
    by_city: dict[str, dict[Key, float]], state: str, *, without: str = "", elsewhere: float = COMMON
) -> dict[Key, float]:
    """A state's features and their mean activation over the cities they fire for, one city left out.

    `elsewhere`: largest share of the other states' cities a feature may fire for.
    """
    own = [by_city[city] for city in cities_of(state, capital=False) if city != without]
    others = [found for city, found in by_city.items() if state_of(city) != state]
    chosen: dict[Key, float] = {}
    for key in sorted(set().union(*own)):
        values = [found[key] for found in own if key in found]
        share = sum(key in found for found in others) / len(others)
        if len(values) >= FREQUENT * len(own) and share <= elsewhere:
            chosen[key] = float(np.mean(values))
    return chosen


def answer_after_swap(
    model: ReplacementModel, city: str, off: dict[Key, float], on: dict[Key, float]
) -> tuple[str, float]:
    """Next token and its probability with one state's features off and another's on, errors kept."""
    settings = {**dict.fromkeys(off, 0.0), **on}
    interventions = [
        Intervention(layer=layer, index=index, position=position, activation=value)
        for (layer, position, index), value in settings.items()
    ]
    lm = model.language_model
    tokens = lm.tokenize(PROMPT.format(city=city))
    probabilities = model(tokens, errors="keep", interventions=interventions)[-1].softmax(-1)
    top = int(probabilities.argmax())
    return lm.token_strings([top])[0], float(probabilities[top])


def print_circuit(model: ReplacementModel, texas: dict[Key, float]) -> None:
    """Scores of the Dallas circuit and the Texas features in it."""
    circuit = circuits.trace(model, PROMPT.format(city="Dallas")).prune()
    scores, nodes = circuit.scores(), circuit.nodes
    print(f"Dallas circuit: {len(nodes)} nodes, replacement {scores.replacement:.3f}, ", end="")
    print(f"completeness {scores.completeness:.3f}, identity error {circuit.identity_error:.1e}")
    inside = nodes.mask(circuits.NodeKind.FEATURE)
    rows = zip(nodes.layer[inside], nodes.position[inside], nodes.index[inside], nodes.activation[inside], strict=True)
    labels = [label for label, kept in zip(nodes.label, inside, strict=True) if kept]
    print("Texas features in it that few other cities share (layer/index@position, activation, label):")
    for (layer, position, index, activation), label in zip(rows, labels, strict=True):
        if (int(layer), int(position), int(index)) in texas:
            print(f"  {layer}/{index}@{position}  {activation:6.2f}  {label}")


VARIANTS: dict[str, Callable[[Key, int, int], bool]] = {
    "all features": lambda key, last_layer, last_position: True,
    "without the last layer": lambda key, last_layer, last_position: key[0] < last_layer,
    "layer 0 alone": lambda key, last_layer, last_position: key[0] == 0,
    "at the city alone": lambda key, last_layer, last_position: key[1] < last_position,
}
"""Which of the states' features are swapped."""


def swap(
    model: ReplacementModel,
    by_city: dict[str, dict[Key, float]],
    city: str,
    other: str,
    *,
    variant: str = "all features",
    elsewhere: float = COMMON,
) -> tuple[str, float]:
    """Next token and its probability after swapping the city's state for another."""
    last_layer = model.language_model.shape.n_layers - 1
    last_position = len(model.language_model.tokenize(PROMPT.format(city=city))) - 1
    off, on = (
        {key: value for key, value in found.items() if VARIANTS[variant](key, last_layer, last_position)}
        for found in (
            state_features(by_city, state_of(city), without=city, elsewhere=elsewhere),
            state_features(by_city, other, elsewhere=elsewhere),
        )
    )
    return answer_after_swap(model, city, off, on)


def print_swaps(model: ReplacementModel, by_city: dict[str, dict[Key, float]], pairs: list[tuple[str, str]]) -> int:
    """One line per pair of city and other state, then the number of right answers in every variant."""
    right = 0
    print(f"{'city':<18}{'its state':<16}{'injected state':<18}{'answer':<18}{'p':>5}  right")
    for city, other in pairs:
        answer, probability = swap(model, by_city, city, other)
        right += answer == capital_of(other)
        mark = "yes" if answer == capital_of(other) else f"no, {capital_of(other)}"
        print(f"{city:<18}{state_of(city):<16}{other:<18}{answer:<18}{probability:5.2f}  {mark}")
    print(f"right, all features: {right} of {len(pairs)}")
    for variant in list(VARIANTS)[1:]:
        answers = [swap(model, by_city, city, other, variant=variant)[0] for city, other in pairs]
        n_right = sum(answer == capital_of(other) for answer, (_, other) in zip(answers, pairs, strict=True))
        print(f"right, {variant}: {n_right} of {len(pairs)}")
    answers = [swap(model, by_city, city, other, elsewhere=RARE)[0] for city, other in pairs]
    n_right = sum(answer == capital_of(other) for answer, (_, other) in zip(answers, pairs, strict=True))
    print(f"right, features of at most {RARE:.0%} of the other cities: {n_right} of {len(pairs)}\n")
    return right


def random_pairs(n: int, *, seed: int = 0) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """`n` pairs of Dallas and another state, and `n` of a held-out city and another state.

    The five states held out of every two-hop sentence stay out: the model itself mostly cannot answer for them.
    """
    rng = np.random.default_rng(seed)
    known = [state for state in states() if state not in HELD_OUT_STATES]
    others = [state for state in known if state != "Texas"]
    cities = [city for city in HELD_OUT_CITIES if state_of(city) in known]
    from_texas = [("Dallas", others[i]) for i in rng.permutation(len(others))[:n]]
    anywhere = []
    for i in rng.permutation(len(cities))[:n]:
        city = cities[i]
        choices = [state for state in known if state != state_of(city)]
        anywhere.append((city, choices[int(rng.integers(len(choices)))]))
    return from_texas, anywhere


def main() -> None:
    """Print the circuit's facts and both tables."""
    parser = argparse.ArgumentParser(description="Swap the state in a two-hop question.")
    parser.add_argument("--pairs", type=int, default=20, help="state pairs per table")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model = replacement.load("demo")
    by_city = features_by_city(model)
    sizes = [len(state_features(by_city, state)) for state in states()]
    print(f"state features: {min(sizes)} to {max(sizes)} per state, median {int(np.median(sizes))}\n")
    print_circuit(model, state_features(by_city, "Texas", without="Dallas", elsewhere=RARE))
    from_texas, anywhere = random_pairs(options.pairs)
    print("\nTexas off, another state on (Dallas):")
    print_swaps(model, by_city, from_texas)
    print("Any state off, any other on (held-out cities):")
    print_swaps(model, by_city, anywhere)


if __name__ == "__main__":
    main()
