"""How faithful a replacement model is by what it replaces: the MLPs, attention, or both. R rows, T tokens per row."""

from __future__ import annotations

from torch import Tensor

from replacement.splicing.replacement_model import ReplacementModel
from replacement.validation.fidelity import Fidelity, measure_fidelity


def fidelity_by_parts(
    model: ReplacementModel, rows_RT: Tensor, *, rows_per_pass: int = 64, keep_RT: Tensor | None = None
) -> dict[str, Fidelity]:
    """Fidelity of each crosscoder spliced in alone, and of all together, errors propagating.

    Args:
        rows_RT, rows_per_pass, keep_RT: as for `measure_fidelity`.

    Returns:
        `mlp`; and where the model has an attention crosscoder also `attention` and `both`.

    Raises:
        ValueError: what `measure_fidelity` raises.
    """
    choices = {part: [crosscoder] for part, crosscoder in model.crosscoders.items()}
    if len(choices) > 1:
        choices["both"] = list(model.crosscoders.values())
    lm = model.language_model
    return {
        name: measure_fidelity(lm, chosen, rows_RT, rows_per_pass=rows_per_pass, keep_RT=keep_RT)
        for name, chosen in choices.items()
    }
