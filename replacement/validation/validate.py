"""The conductor: every measurement of a replacement model, and the one dictionary they are reported in.

The keys are documented in `replacement/validation/README.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch

from replacement.console import finite
from replacement.data.open_tokens import open_source
from replacement.data.token_sources import DemoRows, TokenSource
from replacement.language_model.language_model import LanguageModel
from replacement.notebook import Report
from replacement.splicing.replacement_model import ReplacementModel
from replacement.validation.compute import compute_equivalent
from replacement.validation.controls import measure_controls
from replacement.validation.measure import Measured, Progress, measure, no_progress
from replacement.validation.protocols import BASIC, CLEAN, MEAN, PROPAGATED, cumulative, first, protocols, single
from replacement.validation.slices import Slice, demo_slices, shuffled, stream
from replacement.validation.terminal import page

FORMAT = "crosstrace validation"
VERSION = 1
WITHIN = 0.05
"""Nats within which `clean`, `propagated` and `single` are said to agree."""
_PASSES_OF_CONTROLS = 14
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
        for name in ("n_tokens", "slice_tokens", "n_probes", "n_worst", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.removeprefix('n_')}: expected at least 1, given {value}")
        _check_names([WHOLE, *(name for name, _ in self.slices)])


@torch.no_grad()
def validate(
    model: ReplacementModel, config: ValidationConfig | None = None, *, progress: Progress = no_progress
) -> Report:
    """Measure a replacement model, as plain JSON values that show themselves as a page.

    Args:
        progress: called with the number of tokens after every forward pass.

    Raises:
        ValueError: a source that cannot be opened or has no token to measure.
    """
    config = config or ValidationConfig()
    lm, crosscoders = model.language_model, list(model.crosscoders.values())
    known = protocols(crosscoders)
    basic = [known[name] for name in BASIC]
    whole, sample, rest, others = _slices(lm, config)
    with _naming(f"data {config.data}"):
        means = measure(lm, crosscoders, whole.batches(), [], progress=progress).means
        measure_rows = partial(measure, lm, crosscoders, means=means, progress=progress)
        measured = measure_rows(whole.batches(), known.values(), n_worst=config.n_worst)
    facts = measured.facts()
    slices = [_slice_facts(whole, facts, facts)]
    for other in others:
        with _naming(f"slice {other.name}"):
            slices.append(_slice_facts(other, measure_rows(other.batches(), basic).facts(), facts))
    controls = []
    if config.controls:
        controls = measure_controls(lm, model.crosscoder, sample, means, fitted_on=rest, progress=progress)
    increase, equivalent = facts["protocols"][PROPAGATED]["cross_entropy_increase"], None
    if config.curve and increase is not None:
        equivalent = compute_equivalent(list(config.curve), increase) | {"curve": list(map(list, config.curve))}
    result = {
        "format": FORMAT,
        "version": VERSION,
        "model": _model_facts(model),
        "data": {"source": config.data, "n_tokens": facts["n_tokens"], "about": whole.about},
        **{key: facts[key] for key in ("reconstruction", "original", "protocols")},
        "summary": _summary(measured, facts["protocols"]),
        "worst_tokens": measured.worst.facts(lm) if measured.worst else [],
        "slices": slices,
        "controls": controls,
        "compute_equivalent": equivalent,
    }
    title = f"validation of {lm.name} on {facts['n_tokens']:,} tokens"
    return Report({key: finite(value) for key, value in result.items()}, title=title, page=page)


def expected_tokens(model: ReplacementModel, config: ValidationConfig) -> int:
    """About how many tokens all forward passes will run, for a progress bar.

    Raises:
        ValueError: a source that cannot be opened.
    """
    whole, sample, _, others = _slices(model.language_model, config)
    n = whole.n_tokens * (len(protocols(list(model.crosscoders.values()))) + 2)
    n += sum(other.n_tokens for other in others) * (len(BASIC) + 1)
    return n + _PASSES_OF_CONTROLS * sample.n_tokens * config.controls


def _slices(lm: LanguageModel, config: ValidationConfig) -> tuple[Slice, Slice, Slice, list[Slice]]:
    """The whole stream, its start as a sample for the controls, its rest, and everything that the whole is compared with."""

    def opened(source: TokenSource, name: str, n_tokens: int) -> Slice:
        return stream(name, f"{source.name}, every token", source, lm, n_tokens=n_tokens)

    source = open_source(config.data, lm, context=config.context)
    whole = opened(source, WHOLE, config.n_tokens)
    sample = opened(source, WHOLE, min(whole.n_tokens // 2, config.slice_tokens))
    others = demo_slices(lm, n_probes=config.n_probes) if isinstance(source, DemoRows) else []
    others.append(shuffled(sample))
    for name, data in config.slices:
        with _naming(f"slice {name}"):
            others.append(opened(open_source(data, lm, context=config.context), name, config.slice_tokens))
    _check_names([WHOLE, *(other.name for other in others)])
    return whole, sample, whole.after(sample), others


def _check_names(names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        if not (name.strip() and name.isprintable()):
            raise ValueError(f"the name of a slice must be printable text, got {name!r}")
        if name in names[:place]:
            raise ValueError(f"slices need names of their own, got {name!r} beside {', '.join(names[:place])}")


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Put the name of the rows in front of an error about them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _summary(measured: Measured, outputs: dict[str, Any]) -> dict[str, Any]:
    """The three protocols of the literature side by side, and the curve over first layers."""
    sites = sorted(site for activity in measured.activity for site in activity.wiring.write_sites)
    rows = {
        "clean": _kl_and_increase([outputs[CLEAN]]),
        "propagated": _kl_and_increase([outputs[PROPAGATED]]),
        "single": _kl_and_increase([outputs[single(site)] for site in sites]),
    }
    spread = {}
    for key in ("kl", "cross_entropy_increase"):
        values = [row[key] for row in rows.values()]
        spread[key] = None if None in values else max(values) - min(values)
    ks = cumulative(sites)
    reached = [outputs[PROPAGATED if k == ks[-1] else first(k)] for k in ks]
    return {
        **rows,
        "spread": spread,
        "within": WITHIN,
        "is_within": all(value <= WITHIN for value in spread.values() if value is not None),
        "first_layers": [{"layers": k, **_kl_and_increase([row])} for k, row in zip(ks, reached, strict=True)],
    }


def _kl_and_increase(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over some protocols."""
    increases = [row["cross_entropy_increase"] for row in rows]
    return {
        "kl": fmean(row["kl"]["mean"] for row in rows),
        "cross_entropy_increase": None if None in increases else fmean(increases),
    }


def _slice_facts(part: Slice, facts: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """One slice beside the others: propagated output, clean reconstruction, and how far both are from the whole's."""
    output, reference = facts["protocols"][PROPAGATED], whole["protocols"][PROPAGATED]
    increase, of_whole = output["cross_entropy_increase"], reference["cross_entropy_increase"]
    return {
        "name": part.name,
        "about": part.about,
        "n_tokens": facts["n_tokens"],
        "l0": facts["reconstruction"]["l0"],
        "unexplained": facts["reconstruction"]["unexplained"],
        "kl": output["kl"],
        "kl_clean": facts["protocols"][CLEAN]["kl"]["mean"],
        "kl_mean_ablation": facts["protocols"][MEAN]["kl"]["mean"],
        "cross_entropy_original": facts["original"]["cross_entropy"],
        "cross_entropy_increase": increase,
        "cross_entropy_recovered": output["cross_entropy_recovered"],
        "agreement": output["agreement"]["all"],
        "accuracy_original": facts["original"]["accuracy"],
        "accuracy": output["accuracy"],
        "gap": {
            "kl": output["kl"]["mean"] - reference["kl"]["mean"],
            "cross_entropy_increase": None if increase is None or of_whole is None else increase - of_whole,
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
                "wiring": crosscoder.wiring.name,
                "n_groups": crosscoder.n_groups,
                "n_features": crosscoder.n_features,
                "activation": crosscoder.activation.to_dict(),
            }
            for part, crosscoder in model.crosscoders.items()
        ],
    }
