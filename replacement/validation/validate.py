"""The conductor: every measurement of a replacement model, and the one dictionary they are reported in.

The keys are documented in `replacement/validation/README.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from replacement.data.open_tokens import open_source
from replacement.data.token_sources import DemoRows
from replacement.language_model.language_model import LanguageModel
from replacement.splicing.replacement_model import ReplacementModel
from replacement.validation.compute import compute_equivalent
from replacement.validation.controls import measure_controls
from replacement.validation.measure import Measured, Progress, measure, no_progress, site_means
from replacement.validation.protocols import BASIC, CLEAN, PROPAGATED, cumulative, first, protocols, single
from replacement.validation.slices import Slice, demo_slices, shuffled, stream

FORMAT = "crosstrace validation"
VERSION = 1
WITHIN = 0.05
"""Nats within which `clean`, `propagated` and `single` are said to agree."""
_PASSES_OF_CONTROLS = 12
WHOLE = "whole"


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """What is measured, and on how much of it."""

    data: str = "demo"
    """Source of the rows, as training takes it: text files, a dataset, stored token ids, or `demo`."""
    n_tokens: int = 32_768
    """Tokens of the whole stream, rounded down to rows."""
    slice_tokens: int = 4096
    """Most tokens of every other slice, and of the controls."""
    slices: tuple[tuple[str, str], ...] = ()
    """(name, source) of more slices."""
    n_probes: int = 100
    """Most probes of every behaviour of the demo."""
    n_worst: int = 20
    """Tokens of largest KL that are listed."""
    controls: bool = True
    """Whether the controls are run."""
    curve: tuple[tuple[float, float], ...] = ()
    """Training curve of the original, (compute, loss) by rising compute."""
    context: int | None = None
    """Tokens per row; the source's own by default."""

    def __post_init__(self) -> None:
        for name in ("n_tokens", "slice_tokens", "n_probes", "n_worst"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        names = [WHOLE, *(name for name, _ in self.slices)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not all(name.strip() for name in names):
            raise ValueError(f"slices need names of their own, got {', '.join(map(repr, names[1:]))} beside {WHOLE!r}")


@torch.no_grad()
def validate(
    model: ReplacementModel, config: ValidationConfig | None = None, *, progress: Progress = no_progress
) -> dict[str, Any]:
    """Measure a replacement model, as plain JSON values.

    Args:
        progress: told how many tokens were run after every forward pass.

    Raises:
        ValueError: a source that cannot be opened or has no token to measure.
    """
    config = config or ValidationConfig()
    lm, crosscoders = model.language_model, list(model.crosscoders.values())
    known = protocols(crosscoders)
    basic = [known[name] for name in BASIC]
    whole, others = slices_of(lm, config)
    means = site_means(lm, crosscoders, whole.batches(), progress=progress)
    measure_rows = partial(measure, lm, crosscoders, means=means, progress=progress)
    measured = measure_rows(whole.batches(), known.values(), n_worst=config.n_worst)
    facts = measured.facts()
    rows = [_slice_row(whole, facts, facts)]
    for other in others:
        part = measure_rows(other.batches(), basic)
        rows.append(_slice_row(other, part.facts(), facts))
    controls = []
    if config.controls:
        sample = _sample(lm, config)
        controls = measure_controls(lm, model.crosscoder, sample, means, progress=progress)
    increase = facts["protocols"][PROPAGATED]["cross_entropy_increase"]
    return finite(
        {
            "format": FORMAT,
            "version": VERSION,
            "model": _model_facts(model),
            "data": {"source": config.data, "n_tokens": facts["n_tokens"], "about": whole.about},
            **{key: facts[key] for key in ("reconstruction", "original", "protocols")},
            "summary": summary(measured, facts),
            "worst_tokens": measured.worst.facts(lm) if measured.worst else [],
            "slices": rows,
            "controls": controls,
            "compute_equivalent": None
            if not config.curve or increase is None
            else compute_equivalent(list(config.curve), increase) | {"curve": [list(point) for point in config.curve]},
        }
    )


def slices_of(lm: LanguageModel, config: ValidationConfig) -> tuple[Slice, list[Slice]]:
    """The whole stream, and everything it is compared with.

    Raises:
        ValueError: a source that cannot be opened.
    """
    source = open_source(config.data, lm, context=config.context)
    whole = stream(WHOLE, f"{source.name}, every token", source, lm, n_tokens=config.n_tokens)
    few = stream(WHOLE, "", source, lm, n_tokens=min(config.n_tokens, config.slice_tokens))
    others = demo_slices(lm, n_probes=config.n_probes) if isinstance(source, DemoRows) else []
    others.append(shuffled(few))
    for name, data in config.slices:
        try:
            own = open_source(data, lm, context=config.context)
        except ValueError as error:
            raise ValueError(f"slice {name}: {error}") from None
        others.append(stream(name, f"{own.name}, every token", own, lm, n_tokens=config.slice_tokens))
    return whole, others


def expected_tokens(lm: LanguageModel, config: ValidationConfig, n_protocols: int) -> int:
    """About how many tokens all forward passes will run, for a progress bar."""
    whole, others = slices_of(lm, config)
    n = whole.n_tokens * (n_protocols + 2) + sum(other.n_tokens for other in others) * (len(BASIC) + 1)
    return n + _PASSES_OF_CONTROLS * min(config.slice_tokens, whole.n_tokens) * config.controls


def summary(measured: Measured, facts: dict[str, Any]) -> dict[str, Any]:
    """The three protocols of the literature side by side, and the curve over first layers."""
    protocols = facts["protocols"]
    sites = sorted(site for activity in measured.activity for site in activity.wiring.write_sites)
    alone = [protocols[single(site)] for site in sites]
    rows = {
        "clean": _kl_and_increase([protocols[CLEAN]]),
        "propagated": _kl_and_increase([protocols[PROPAGATED]]),
        "single": _kl_and_increase(alone),
    }
    spread = {}
    for key in ("kl", "cross_entropy_increase"):
        values = [row[key] for row in rows.values() if row[key] is not None]
        spread[key] = max(values) - min(values) if values else None
    known = [value for value in spread.values() if value is not None]
    ks = cumulative(sites)
    reached = [protocols[PROPAGATED if k == ks[-1] else first(k)] for k in ks]
    return {
        **rows,
        "spread": spread,
        "within": WITHIN,
        "is_within": all(value <= WITHIN for value in known),
        "first_layers": [{"layers": k, **_kl_and_increase([row])} for k, row in zip(ks, reached, strict=True)],
    }


def finite(value: Any) -> Any:
    """The same value with numbers that JSON cannot hold (NaN, infinity) as None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sample(lm: LanguageModel, config: ValidationConfig) -> Slice:
    """The tokens the controls are measured on."""
    source = open_source(config.data, lm, context=config.context)
    return stream("controls", "", source, lm, n_tokens=min(config.n_tokens, config.slice_tokens))


def _kl_and_increase(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over some protocols."""
    increases = [row["cross_entropy_increase"] for row in rows if row["cross_entropy_increase"] is not None]
    return {
        "kl": sum(row["kl"]["mean"] for row in rows) / len(rows),
        "cross_entropy_increase": sum(increases) / len(increases) if increases else None,
    }


def _slice_row(part: Slice, facts: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """One slice beside the others: propagated output, clean reconstruction, and how far both are from the whole's."""
    output, reference = facts["protocols"][PROPAGATED], whole["protocols"][PROPAGATED]
    increase, before = output["cross_entropy_increase"], reference["cross_entropy_increase"]
    return {
        "name": part.name,
        "about": part.about,
        "n_tokens": facts["n_tokens"],
        "l0": facts["reconstruction"]["l0"],
        "unexplained": facts["reconstruction"]["unexplained"],
        "kl": output["kl"],
        "kl_clean": facts["protocols"][CLEAN]["kl"]["mean"],
        "kl_mean_ablation": facts["protocols"]["mean"]["kl"]["mean"],
        "cross_entropy_original": facts["original"]["cross_entropy"],
        "cross_entropy_increase": increase,
        "cross_entropy_recovered": output["cross_entropy_recovered"],
        "agreement": output["agreement"]["all"],
        "accuracy_original": facts["original"]["accuracy"],
        "accuracy": output["accuracy"],
        "gap": {
            "kl": output["kl"]["mean"] - reference["kl"]["mean"],
            "cross_entropy_increase": None if increase is None or before is None else increase - before,
        },
    }


def _model_facts(model: ReplacementModel) -> dict[str, Any]:
    lm = model.language_model
    return {
        "name": lm.name,
        "fingerprint": lm.fingerprint,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "n_layers": lm.shape.n_layers,
        "crosscoders": [
            {
                "part": part,
                "wiring": each.wiring.name,
                "n_groups": each.n_groups,
                "n_features": each.n_features,
                "activation": each.activation.to_dict(),
            }
            for part, each in model.crosscoders.items()
        ],
    }


def curve_of(path: str | Path | None) -> tuple[tuple[float, float], ...]:
    """A training curve for `ValidationConfig.curve`; empty for no file."""
    from replacement.validation.compute import read_curve

    return () if path is None else tuple(read_curve(path))
