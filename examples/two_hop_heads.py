"""Which heads move the state to the last word of a two-hop question, and does taking away what they add predict what happens?

    python examples/two_hop_heads.py

`the capital of the state containing Dallas is`: the state is known at the city, the capital is said at the last word. For
held-out cities this script

1. finds the features of the city's state at the last word (F1 of at least 0.5 over cities that are not held out) and adds up
   what each head brings to their pre-activations from the city's position;
2. takes away what the first heads of that list bring from the city, and predicts what happens from the traced graph: at the
   last word, layer by layer, every feature loses what these heads brought it and what fell among the features below it,
   through its own activation function; so does the answer's logit;
3. measures it in the original model, where these heads no longer read the city at the last word (all attention patterns held,
   norms and MLPs live): how far the state's features and the answer's logit fall.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from two_hop import PROMPT

import circuits
import replacement
from circuits import CircuitGraph, NodeKind
from circuits.heads.feature_heads import HeadViews
from circuits.heads.relu_credit import activation
from replacement import LanguageModel, LocalReplacement, ReplacementModel, Site
from replacement.demo.corpus import HELD_OUT_CITIES, HELD_OUT_STATES, capital_of, state_of, states, training_cities_of
from replacement.demo.family_cases import Case
from replacement.demo.feature_families import layer_and_index, read_firings, score_features

Head = tuple[int, int]
"""Layer and head."""
Key = tuple[int, int, int]
"""Layer, position and index."""
F1 = 0.5
"""A feature of a state has at least this F1 as a detector of its cities."""
CITY, LAST = -2, -1
"""Positions of the city and of the last word."""


@dataclass(frozen=True, slots=True)
class Question:
    """One city's question, and the S features active at its last word, by layer; the answer's logit is the last row."""

    city: str
    tokens_T: Tensor
    answer: int
    """Token id of the capital."""
    keys: list[Key]
    of_state_S: np.ndarray
    """Which of the features are the state's."""
    brought_NLH: np.ndarray
    """What every head brings to every feature, and to the logit, from the city's position."""
    edges_NS: np.ndarray
    """Direct effects of the features on each other and on the logit."""
    before_S: np.ndarray
    """Pre-activations."""
    threshold_S: np.ndarray

    def without(self, heads: Sequence[Head]) -> tuple[np.ndarray, float]:
        """Predicted activations, and fall of the answer's logit, when some heads bring nothing from the city."""
        gone_N = sum((self.brought_NLH[:, layer, head] for layer, head in heads), np.zeros(len(self.brought_NLH)))
        active_S = activation(self.before_S, self.threshold_S)
        kept_S = np.ones(len(self.keys))  # share of its activation that each feature keeps
        for number in range(len(self.keys)):  # features of lower layers come first
            fallen = gone_N[number] + self.edges_NS[number] @ (1 - kept_S)
            kept_S[number] = activation(self.before_S[number] - fallen, self.threshold_S[number]) / active_S[number]
        return active_S * kept_S, float(gone_N[-1] + self.edges_NS[-1] @ (1 - kept_S))


def read_questions(model: ReplacementModel, cities: Sequence[str]) -> list[Question]:
    """The questions about some cities."""
    cases = []
    for state in states():
        prompts = [PROMPT.format(city=city) for city in training_cities_of(state) if city != capital_of(state)]
        cases += [Case(prompt, prompt, state) for prompt in prompts]
    scores = score_features(read_firings(model, cases), cases)
    of_state = {
        state: {layer_and_index(model, feature) for feature in (f1_F >= F1).nonzero()[:, 0].tolist()}
        for state, f1_F in zip(scores.concepts, scores.f1_CF, strict=True)
    }
    return [_read(model, city, of_state[state_of(city)]) for city in cities]


def _read(model: ReplacementModel, city: str, of_state: set[tuple[int, int]]) -> Question:
    lm = model.language_model
    tokens_T = lm.tokenize(PROMPT.format(city=city))
    local, last = model.localize(tokens_T), len(tokens_T) - 1
    features = local.features
    columns = zip(features.group.tolist(), features.row.tolist(), features.index.tolist(), strict=True)
    numbers = {key: number for number, key in enumerate(columns) if key[1] == last}
    answer = lm.token_id(capital_of(state_of(city)))
    views = HeadViews(local, tuple(lm.token_strings(tokens_T.tolist())))
    head_views = [views.of(local.mlp, number) for number in numbers.values()]
    to_logit_LH = _brought_to_logit(local, local.W_U[:, answer] - local.W_U.mean(1))
    return Question(
        city=city,
        tokens_T=tokens_T,
        answer=answer,
        keys=list(numbers),
        of_state_S=np.array([(layer, index) in of_state for layer, _, index in numbers]),
        brought_NLH=np.stack([*(view.heads_LHT[:, :, CITY] for view in head_views), to_logit_LH]),
        edges_NS=_edges(circuits.trace(model, tokens_T, targets=answer, coverage=1.0), list(numbers)),
        before_S=np.array([view.pre_activation for view in head_views]),
        threshold_S=np.array([view.threshold for view in head_views]),
    )


def _brought_to_logit(local: LocalReplacement, direction_D: Tensor) -> np.ndarray:
    """What every head brings to a logit at the last word from the city's position, `[L, H]`."""
    u_D = local.frozen.norm_final.pull_back(direction_D[None], torch.tensor([local.n_positions - 1]))[0]
    rows = []
    for attention, stream_TD in zip(local.frozen.attentions, local.streams(), strict=False):
        weights = attention.weights
        value_X = stream_TD[CITY] @ weights.W_V_XD.T * (weights.W_O_XD @ u_D)
        rows.append(value_X.view(weights.n_heads, -1).sum(1) * attention.kernel_HTT[:, LAST, CITY])
    return torch.stack(rows).double().numpy()


def _edges(graph: CircuitGraph, keys: list[Key]) -> np.ndarray:
    """Edges from the features to each other and to the target, `[S + 1, S]`; zero into features the target does not need."""
    nodes, edges = graph.nodes, graph.edges
    number = {key: place for place, key in enumerate(keys)}
    is_feature = nodes.kind == NodeKind.FEATURE
    columns = zip(nodes.layer.tolist(), nodes.position.tolist(), nodes.index.tolist(), strict=True)
    place_N = np.array(
        [number.get(key, -1) if feature else -1 for key, feature in zip(columns, is_feature, strict=True)]
    )
    target_N = np.where(nodes.is_target, len(keys), place_N)
    matrix = np.zeros((len(keys) + 1, len(keys)))
    target_E, source_E = target_N[edges.target], place_N[edges.source]
    kept_E = (target_E >= 0) & (source_E >= 0)
    matrix[target_E[kept_E], source_E[kept_E]] = edges.weight[kept_E]
    return matrix


def ranked_heads(questions: Sequence[Question]) -> dict[Head, float]:
    """Share of what all heads bring to the state's features from the city, by magnitude; largest first."""
    total_LH = sum(np.abs(question.brought_NLH[:-1][question.of_state_S]).sum(0) for question in questions)
    order = np.argsort(-total_LH, axis=None)
    places = zip(*np.unravel_index(order, total_LH.shape), strict=True)
    return {(int(layer), int(head)): float(total_LH[layer, head] / total_LH.sum()) for layer, head in places}


@dataclass(frozen=True, slots=True)
class Drop:
    """What falls when heads bring nothing from the city."""

    features: np.ndarray
    """float64[S, 3]: layer of every feature of the state, fall of its activation as predicted and as measured."""
    logit: tuple[float, float]
    """Fall of the answer's logit (above the mean logit) as predicted and as measured."""
    right: bool
    """Whether the answer still comes first in the original model."""


def drop(model: ReplacementModel, question: Question, heads: Sequence[Head]) -> Drop:
    """Take away what heads bring from the city to the last word."""
    lm, tokens_T, answer = model.language_model, question.tokens_T, question.answer
    active_S = activation(question.before_S, question.threshold_S)
    predicted_S, predicted_fall = question.without(heads)
    clean_V = lm(tokens_T)[LAST]
    logits_V, inputs = run_without_reading(lm, tokens_T, heads, model.crosscoder.wiring.read_sites)
    after = model.crosscoder.encode(inputs)
    columns = zip(after.group.tolist(), after.row.tolist(), after.index.tolist(), strict=True)
    measured = dict(zip(columns, after.activation.tolist(), strict=True))
    measured_S = np.array([measured.get(key, 0.0) for key in question.keys])
    layer_S = np.array([key[0] for key in question.keys])
    falls = np.stack([layer_S, active_S - predicted_S, active_S - measured_S], axis=1)
    fall = float(clean_V[answer] - clean_V.mean() - logits_V[answer] + logits_V.mean())
    return Drop(falls[question.of_state_S], (predicted_fall, fall), int(logits_V.argmax()) == answer)


def run_without_reading(
    lm: LanguageModel, tokens_T: Tensor, heads: Sequence[Head], sites: Sequence[Site]
) -> tuple[Tensor, dict[Site, Tensor]]:
    """The original model, patterns held, with heads that do not read the city at the last word: its last logits and reads."""
    patterns = [pattern.clone() for pattern in lm.read_patterns(tokens_T[None])]
    for layer, head in heads:
        patterns[layer][:, head, LAST, CITY] = 0
    seen: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor], None]:
        return lambda x_BTD: seen.update({site: x_BTD[0]})

    logits_BTV = lm.run(tokens_T[None], {site: keep(site) for site in sites}, patterns=patterns)
    return logits_BTV[0, LAST], seen


def print_drops(model: ReplacementModel, questions: Sequence[Question], rankings: dict[str, Sequence[Head]]) -> None:
    """How far features and the answer's logit fall for each choice of heads: means over features, over cities."""
    drops = {name: [drop(model, question, heads) for question in questions] for name, heads in rankings.items()}
    print(f"\nFall of the state features' activations{'layer 0':>24}{'layers above':>27}")
    print(f"{'heads that bring nothing':32}" + f"{'predicted':>11}{'measured':>10}{'r':>7}" * 2)
    for name, of_cities in drops.items():
        falls = np.concatenate([city.features for city in of_cities])
        cells = ""
        for mask in (falls[:, 0] == 0, falls[:, 0] > 0):
            predicted, measured = falls[mask, 1], falls[mask, 2]
            cells += f"{predicted.mean():11.3f}{measured.mean():10.3f}{_pearson(predicted, measured):>7}"
        print(f"{name:32}{cells}")
    print(f"\n{'heads that bring nothing':32}{'logit falls: predicted':>24}{'measured':>10}{'r':>7}{'right':>8}")
    for name, of_cities in drops.items():
        logits = np.array([city.logit for city in of_cities])
        right = np.mean([city.right for city in of_cities])
        means = f"{logits[:, 0].mean():24.2f}{logits[:, 1].mean():10.2f}"
        print(f"{name:32}{means}{_pearson(logits[:, 0], logits[:, 1]):>7}{right:8.0%}")


def _pearson(x: np.ndarray, y: np.ndarray) -> str:
    return f"{np.corrcoef(x, y)[0, 1]:.3f}" if x.std() > 0 and y.std() > 0 else "-"


def main() -> None:
    """Print the ranking and the table."""
    parser = argparse.ArgumentParser(description="Name the heads that move the state, and take away what they bring.")
    parser.add_argument("--cities", type=int, default=30, help="held-out cities, drawn at random")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model = replacement.load("demo")
    cities = [city for city in HELD_OUT_CITIES if state_of(city) not in HELD_OUT_STATES]
    drawn = np.random.default_rng(0).permutation(len(cities))[: options.cities]
    questions = read_questions(model, [cities[i] for i in drawn])
    shares = ranked_heads(questions)
    n_features = sum(int(question.of_state_S.sum()) for question in questions)
    print(f"{len(questions)} held-out cities, {n_features} state features at the last word")
    print("What heads bring to them from the city (share of all magnitudes):")
    print("  " + "  ".join(f"L{layer}H{head} {share:.0%}" for (layer, head), share in list(shares.items())[:8]))
    ranking, rng = list(shares), np.random.default_rng(1)
    rankings: dict[str, Sequence[Head]] = {
        " ".join(f"L{layer}H{head}" for layer, head in ranking[:count]): ranking[:count] for count in (1, 2, 3, 4)
    }
    rest = ranking[4:]
    rankings["four others at random"] = [rest[i] for i in rng.permutation(len(rest))[:4]]
    print_drops(model, questions, rankings)


if __name__ == "__main__":
    main()
