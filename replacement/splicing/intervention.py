"""`Intervention`: one feature set, scaled or added to. A plain value that needs no torch; `feature_changes` applies it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from replacement.crosscoder.wiring import Wiring
from replacement.number_checks import LARGEST, integer, real

PARTS = ("mlp", "attention")
"""Parts of a layer that a crosscoder may stand in for."""
_WAYS = ("activation", "scale", "add")


class UnknownFeatureError(ValueError):
    """An intervention names a layer, index or position that does not exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervention:
    """Change one feature, at one position or at all of them.

    Exactly one of `activation`, `scale` and `add` says how. Scaling an inactive feature leaves it inactive; setting and
    adding switch it on.

    >>> Intervention(layer=2, index=345, position=7, scale=0.0)         # suppress feature 2/345 at position 7
    Intervention(layer=2, index=345, position=7, activation=None, scale=0.0, add=None, part='mlp')

    Raises:
        ValueError: an unknown part, a layer, index or position that is no whole number, a change that is no number, or none or
            several ways to change the feature.
    """

    layer: int
    """Layer of the feature: the lowest layer that its group reads."""
    index: int
    """Index of the feature in its layer."""
    position: int | None
    """Token position in the prompt, from 0 with the beginning-of-sequence token included; negative counts from the end. None
    for every position, those generated later included."""
    activation: float | None = None
    """The activation it is set to, in the crosscoder's own units; 0 suppresses it."""
    scale: float | None = None
    """Multiple of the activation it has in this run when it is reached; 0 suppresses it."""
    add: float | None = None
    """What is added to that activation."""
    part: str = "mlp"
    """Whose feature it is: of the crosscoder for the `mlp`s or of the one for `attention`."""

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"the part of an intervention must be 'mlp' or 'attention', got {self.part!r}")
        for name in ("layer", "index", "position"):
            if name != "position" or self.position is not None:
                integer(f"the {name} of an intervention", getattr(self, name))
        given = [name for name in _WAYS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"an intervention needs exactly one of activation, scale and add, got {', '.join(given) or 'none'}"
            )
        real(f"the {given[0]} of an intervention", getattr(self, given[0]))

    @property
    def terms(self) -> tuple[float, float]:
        """`(m, c)`: the new activation is `m * current + c`."""
        if self.activation is not None:
            return 0.0, self.activation
        return (self.scale, 0.0) if self.scale is not None else (1.0, self.add or 0.0)


def check_interventions(
    interventions: Iterable[Intervention], wiring: Wiring, *, n_features: int, n_positions: int, first_position: int = 0
) -> tuple[Intervention, ...]:
    """The interventions, with positions counted from the start, if every feature exists.

    Args:
        wiring: of the crosscoder whose features they are.
        n_features: its features per layer.
        n_positions: tokens of the prompt.
        first_position: positions before it have no features.

    Raises:
        UnknownFeatureError: a layer, index or position that does not exist.
        ValueError: a number that is not finite or above 1e18, or one feature changed twice.
    """
    checked = []
    for intervention in interventions:
        layer, index, position = intervention.layer, intervention.index, intervention.position
        if layer not in wiring.layers:
            known = ", ".join(map(str, wiring.layers))
            raise UnknownFeatureError(f"intervention on layer {layer}: the crosscoder has features in layers {known}")
        if not 0 <= index < n_features:
            raise UnknownFeatureError(f"intervention on index {index}: expected 0 to {n_features - 1}")
        if position is not None:
            from_start = position + n_positions if position < 0 else position
            if not first_position <= from_start < n_positions:
                raise UnknownFeatureError(
                    f"intervention on position {position}: expected {first_position} to {n_positions - 1}"
                )
            intervention = replace(intervention, position=from_start)
        if not all(abs(term) <= LARGEST for term in intervention.terms):
            name = next(name for name in _WAYS if getattr(intervention, name) is not None)
            raise ValueError(
                f"intervention on feature {layer}/{index} at {position}: {name}={getattr(intervention, name)} "
                f"is not a finite number of at most {LARGEST:g}"
            )
        checked.append(intervention)
    everywhere = {(known.layer, known.index) for known in checked if known.position is None}
    single = [known for known in checked if known.position is not None and (known.layer, known.index) in everywhere]
    if single or len({(known.layer, known.index, known.position) for known in checked}) < len(checked):
        raise ValueError("two interventions set the same feature")
    return tuple(checked)
