"""What a traced graph says about itself: model, prompt, targets, and how the expansion ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from circuits.attribution.columns import source_table
from circuits.attribution.expansion import Attribution
from circuits.attribution.targets import LogitTarget
from replacement import Crosscoder, LocalReplacement, ReplacementModel


def trace_facts(
    model: ReplacementModel,
    local: LocalReplacement,
    logits: Sequence[LogitTarget],
    roots: Sequence[int],
    rows: Attribution,
) -> dict[str, object]:
    """Metadata of the graph.

    Args:
        roots: numbers, among the features of all parts, of those that are targets.
    """
    lm, token_ids = model.language_model, local.frozen.tokens_T.tolist()
    targets = _target_facts(logits, roots, local)
    return {
        "tokens": lm.prompt_strings(token_ids),
        "token_ids": token_ids,
        "model": lm.name,
        "model_fingerprint": lm.fingerprint,
        **({} if model.loaded_from is None else {"loaded_from": dict(model.loaded_from)}),
        "n_layers": lm.shape.n_layers,
        "crosscoder": _describe(model.crosscoder),
        "crosscoder_fingerprint": crosscoder_fingerprint(model),
        "attention": "linear" if model.attention_crosscoder is None else _describe(model.attention_crosscoder),
        "targets": targets,
        "top_tokens": _top_tokens(local, lm.token_strings, position=int(str(targets[0]["position"]))),
        "active_features": sum(len(part.features) for part in local.decompositions),
        "stopped_by": rows.stopped_by,
        "unexpanded_share": rows.unexpanded_share,
        "identity_error": rows.identity_error,
        **({} if local.frozen.logit_gap_16bit is None else {"logit_gap_16bit": local.frozen.logit_gap_16bit}),
    }


def crosscoder_fingerprint(model: ReplacementModel) -> str:
    """Digest of what every crosscoder of a model computes (`Crosscoder.fingerprint`)."""
    return "+".join(crosscoder.fingerprint for crosscoder in model.crosscoders.values())


def legacy_crosscoder_fingerprint(model: ReplacementModel) -> str:
    """What `crosscoder_fingerprint` was when earlier versions wrote their graphs."""
    return "+".join(crosscoder.legacy_fingerprint for crosscoder in model.crosscoders.values())


def _describe(crosscoder: Crosscoder) -> str:
    activation = type(crosscoder.activation).__name__
    return f"{crosscoder.wiring.name}, {crosscoder.n_groups} x {crosscoder.n_features} features, {activation}"


def _target_facts(
    logits: Sequence[LogitTarget], roots: Sequence[int], local: LocalReplacement
) -> list[dict[str, object]]:
    facts: list[dict[str, object]] = [
        {
            "token": one.label,
            "token_id": one.token_id,
            **({} if one.token_ids is None else {"token_ids": list(one.token_ids)}),
            "position": one.position,
            "probability": one.probability,
        }
        for one in logits
    ]
    table = source_table(local)
    first = len(table["kind"]) - sum(len(part.features) for part in local.decompositions)
    for root in roots:
        part, layer, index, position = (
            int(table[name][first + root]) for name in ("part", "layer", "index", "position")
        )
        name = f"{'attention' if part else 'feature'}:{layer}/{index}"
        facts.append({"token": name, "position": position, "probability": 0.0})
    return facts


def _top_tokens(
    local: LocalReplacement, token_strings: Callable[[Iterable[int]], list[str]], *, position: int
) -> list[dict[str, object]]:
    """The model's five most probable next tokens at a position."""
    top = local.probabilities[position].topk(min(5, local.probabilities.shape[1]))
    strings = token_strings(top.indices.tolist())
    return [{"token": text, "probability": p} for text, p in zip(strings, top.values.tolist(), strict=True)]
