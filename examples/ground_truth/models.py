"""Models whose circuit is known because their weights are written by hand, each also behind a random rotation.

| builder | what it computes |
|---|---|
| `two_hop` | A -> B -> C: a B is on if one of its A's is, a C if one of its B's is (city -> state -> country) |
| `and_or` | ANDs and ORs of pairs of inputs, and ANDs and ORs of those |
| `token_copy` | a head moves the previous token, a neuron reads it and raises its logit |
| `induction` | after `x y ... x` comes y: a previous-token head and an induction head that finds it |
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from compiled import exact_crosscoder, language_model, random_rotation
from program import Head, Layer, Neuron, Program, run
from torch import Tensor

from circuits import DifferenceTarget
from replacement import Crosscoder, LanguageModel

SHARP = 60.0
"""Score by which the position a head looks for wins over any other: a softmax of 1 to the last bit."""

PROMPTS_DRAWN = 400
"""Different tokens drawn, by their probabilities, as prompts of a Boolean network; those with no C on are left out."""


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """A model, its exact dictionary, its true circuit and prompts."""

    name: str
    program: Program
    """The true circuit: `program.run` gives every true edge of a prompt, with its weight."""
    language_model: LanguageModel
    crosscoder: Crosscoder
    """Strictly causal, and exact: its features are the program's neurons."""
    prompts: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[tuple[int, int], ...], ...]
    """For every prompt, logit differences (token, token without a logit) to explain at the last position."""
    token_probability_V: Tensor | None = None
    """How often each token occurs, where tokens stand alone; None where a prompt is a sequence."""

    def logit_targets(self, prompt: int) -> list[DifferenceTarget]:
        """The targets of a prompt, for `circuits.trace`."""
        return [DifferenceTarget(plus, minus) for plus, minus in self.targets[prompt]]


def two_hop(
    *,
    rotation: int | None = None,
    n_families: int = 4,
    n_middle: int = 2,
    n_first: int = 3,
    rate: float = 0.35,
    dtype: torch.dtype = torch.float32,
) -> GroundTruth:
    """Two hops: every C has `n_middle` B's, every B has `n_first` A's; layer 0 computes A, layer 1 B, layer 2 C.

    A token is a whole assignment of the inputs: each family (a C and what is below it) is independently on with probability
    `rate`, and then exactly one of its A's is, all equally likely. The vocabulary holds every assignment.

    Args:
        rotation: seed of the random rotation; none if None.
    """
    names_c = [f"C{c}" for c in range(n_families)]
    names_b = {f"B{c}{b}": f"C{c}" for c in range(n_families) for b in range(n_middle)}
    names_a = {f"A{name[1:]}{a}": name for name in names_b for a in range(n_first)}
    layers = (
        Layer(neurons=[_gate({f"x{name}": 2.0}, -1.0, name) for name in names_a]),
        Layer(neurons=[_gate({a: 2.0 for a, of in names_a.items() if of == b}, -1.0, b) for b in names_b]),
        Layer(neurons=[_gate({b: 2.0 for b, of in names_b.items() if of == c}, -1.0, c) for c in names_c]),
    )
    by_family = [[a for a, b in names_a.items() if names_b[b] == c] for c in names_c]
    tokens, probabilities = [], []
    for chosen in itertools.product(*([None, *family] for family in by_family)):
        tokens.append({f"x{a}": 1.0 for a in chosen if a is not None})
        n_on = len(tokens[-1])
        probabilities.append((rate / len(by_family[0])) ** n_on * (1 - rate) ** (n_families - n_on))
    variables = (*(f"x{a}" for a in names_a), *names_a, *names_b, *names_c)
    return _boolean("two-hop", variables, tokens, probabilities, layers, names_c, rotation, dtype)


def and_or(
    *, rotation: int | None = None, rate: float = 0.35, pairs: int = 6, dtype: torch.dtype = torch.float32
) -> GroundTruth:
    """Gates over pairs of inputs, and gates over pairs of those: B's are ANDs and ORs in turn, C's ORs and ANDs in turn.

    Layer 0 computes the inputs A from the token, layer 1 the B's, layer 2 the C's. A token is a whole assignment of the
    inputs, each independently on with probability `rate`; the vocabulary holds every assignment.

    Args:
        rotation: seed of the random rotation; none if None.
        pairs: number of B's; even, so that they form pairs too.
    """
    names_a = [f"A{i}" for i in range(2 * pairs)]
    names_b = [f"B{i}" for i in range(pairs)]
    names_c = [f"C{i}" for i in range(pairs // 2)]
    gates_b = [
        _pair(names_a[2 * i], names_a[2 * i + 1], name, conjunction=i % 2 == 0) for i, name in enumerate(names_b)
    ]
    gates_c = [
        _pair(names_b[2 * i], names_b[2 * i + 1], name, conjunction=i % 2 == 1) for i, name in enumerate(names_c)
    ]
    layers = (
        Layer(neurons=[_gate({f"x{name}": 2.0}, -1.0, name) for name in names_a]),
        Layer(neurons=[neuron for gate in gates_b for neuron in gate]),
        Layer(neurons=[neuron for gate in gates_c for neuron in gate]),
    )
    tokens, probabilities = [], []
    for bits in itertools.product((False, True), repeat=len(names_a)):
        tokens.append({f"x{a}": 1.0 for a, on in zip(names_a, bits, strict=True) if on})
        n_on = sum(bits)
        probabilities.append(rate**n_on * (1 - rate) ** (len(bits) - n_on))
    variables = (*(f"x{a}" for a in names_a), *names_a, *names_b, *names_c)
    return _boolean("and-or", variables, tokens, probabilities, layers, names_c, rotation, dtype)


def token_copy(
    *, rotation: int | None = None, n_words: int = 10, context: int = 8, dtype: torch.dtype = torch.float32
) -> GroundTruth:
    """The next token is the previous one: a head of layer 0 moves it here, a neuron of layer 1 reads it.

    Layer 0 also has a neuron for every token that is here; nothing reads those.
    """
    words = range(n_words)
    layers = (
        Layer(heads=[_previous_token(n_words, context)], neurons=[_gate({f"e{v}": 2.0}, -1.0, f"h{v}") for v in words]),
        Layer(neurons=[_gate({f"p{v}": 2.0}, -1.0, f"o{v}") for v in words]),
    )
    program = Program(
        variables=(*(f"{kind}{v}" for kind in "epho" for v in words), *(f"at{t}" for t in range(context))),
        tokens=(*({f"e{v}": 1.0} for v in words), {}),
        positions=tuple({f"at{t}": 1.0} for t in range(context)),
        layers=layers,
        outputs={v: {f"o{v}": 3.0} for v in words},
    )
    prompts = tuple(_words(n_words, context - seed, seed=seed) for seed in range(3))
    targets = tuple(((prompt[-2], n_words),) for prompt in prompts)
    return _compile("token-copy", program, prompts, targets, rotation, dtype)


def induction(
    *, rotation: int | None = None, n_words: int = 12, context: int = 14, dtype: torch.dtype = torch.float32
) -> GroundTruth:
    """Induction: layer 0 notes the previous token at every position, layer 1 looks for where this token was noted.

    A neuron of layer 0 reads the moved previous token and writes what the induction head's keys read; the head moves the token
    it finds there, and a neuron of layer 1 reads it. Where no earlier position fits, the head rests on the first token, which
    embeds nothing that it moves.
    """
    words = range(n_words)
    scores = {(f"e{v}", f"k{v}"): SHARP for v in words} | {(f"e{v}", "first"): SHARP / 2 for v in words}
    layers = (
        Layer(
            heads=[_previous_token(n_words, context)],
            neurons=[_gate({f"p{v}": 2.0}, -1.0, f"k{v}") for v in words],
        ),
        Layer(
            heads=[Head(scores, {f"e{v}": f"f{v}" for v in words})],
            neurons=[_gate({f"f{v}": 2.0}, -1.0, f"o{v}") for v in words],
        ),
    )
    program = Program(
        variables=(
            *(f"{kind}{v}" for kind in "epkfo" for v in words),
            "first",
            *(f"at{t}" for t in range(context)),
        ),
        tokens=(*({f"e{v}": 1.0} for v in words), {"first": 1.0}),
        positions=tuple({f"at{t}": 1.0} for t in range(context)),
        layers=layers,
        outputs={v: {f"o{v}": 3.0} for v in words},
    )
    prompts, targets = [], []
    for seed in range(3):
        once = _words(n_words, 6 + seed, seed=seed)
        prompts.append((n_words, *once, *once[: 3 + seed]))
        targets.append(((once[3 + seed], n_words),))
    return _compile("induction", program, tuple(prompts), tuple(targets), rotation, dtype)


BUILDERS = {"two-hop": two_hop, "and-or": and_or, "token-copy": token_copy, "induction": induction}


def _gate(reads: Mapping[str, float], bias: float, name: str, *, writes: float = 1.0, gate: str = "") -> Neuron:
    return Neuron(reads, bias, {name: writes}, gate or name)


def _pair(first: str, second: str, name: str, *, conjunction: bool) -> list[Neuron]:
    """AND is one neuron; OR is two, because both inputs together must not count twice."""
    both = {first: 2.0, second: 2.0}
    if conjunction:
        return [_gate(both, -3.0, name)]
    return [_gate(both, -1.0, name), _gate(both, -3.0, name, writes=-2.0)]


def _previous_token(n_words: int, context: int) -> Head:
    scores = {(f"at{t}", f"at{t - 1}"): SHARP for t in range(1, context)}
    return Head(scores, {f"e{v}": f"p{v}" for v in range(n_words)})


def _words(n_words: int, length: int, *, seed: int) -> tuple[int, ...]:
    """Different words in random order."""
    return tuple(torch.randperm(n_words, generator=torch.Generator().manual_seed(seed))[:length].tolist())


def _boolean(
    name: str,
    variables: tuple[str, ...],
    tokens: list[dict[str, float]],
    probabilities: list[float],
    layers: tuple[Layer, ...],
    outputs: list[str],
    rotation: int | None,
    dtype: torch.dtype,
) -> GroundTruth:
    """A network without attention: every prompt is one token, and every C that is on is a target."""
    program = Program(
        variables=variables,
        tokens=tuple(tokens),
        positions=({}, {}, {}, {}),
        layers=layers,
        outputs={place: {output: 3.0} for place, output in enumerate(outputs)},
    )
    probability_V = torch.tensor(probabilities, dtype=torch.float64)
    n_drawn = min(PROMPTS_DRAWN, len(tokens))
    drawn = torch.multinomial(probability_V, n_drawn, generator=torch.Generator().manual_seed(0)).tolist()
    silent = len(tokens) - 1  # its unembedding is zero
    prompts, targets = [], []
    for token in drawn:
        on = _values(program, token)
        wanted = tuple((place, silent) for place, output in enumerate(outputs) if on.get(output, 0.0) > 0.5)
        if wanted:
            prompts.append((token,))
            targets.append(wanted)
    return _compile(name, program, tuple(prompts), tuple(targets), rotation, dtype, probability_V)


def _values(program: Program, token: int) -> dict[str, float]:
    return run(program, [token]).values[0]


def _compile(
    name: str,
    program: Program,
    prompts: tuple[tuple[int, ...], ...],
    targets: tuple[tuple[tuple[int, int], ...], ...],
    rotation: int | None,
    dtype: torch.dtype,
    probability_V: Tensor | None = None,
) -> GroundTruth:
    basis = None if rotation is None else random_rotation(len(program.variables), seed=rotation)
    lm = language_model(program, name=f"ground-truth-{name}", basis_ND=basis, dtype=dtype)
    crosscoder = exact_crosscoder(program, lm, basis_ND=basis)
    return GroundTruth(name, program, lm, crosscoder, prompts, targets, probability_V)
