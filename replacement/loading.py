"""Load a replacement model in one call: the demo that ships with the project, or any model folder and checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from replacement.crosscoder import checkpoint
from replacement.crosscoder.formats.hub import local_copy
from replacement.crosscoder.formats.layouts import open_published
from replacement.files import checked_path
from replacement.language_model.language_model import LanguageModel
from replacement.splicing.replacement_model import ReplacementModel

ARTIFACTS = Path(__file__).parent / "demo" / "artifacts"
DEMO = "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load(
    model: str | Path = DEMO,
    *,
    crosscoder: str | Path | None = None,
    attention_crosscoder: str | Path | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    lazy: bool | None = None,
) -> ReplacementModel:
    """A language model with a crosscoder spliced in for its MLPs, and one for attention if asked for.

    Args:
        model: `demo`, a hub name, or a local folder in Hugging Face layout.
        crosscoder: `demo`, the folder of a training run, or a crosscoder in any layout that `replacement layouts`
            lists: a folder, or `hf:org/repo[/path][@revision]` on the Hugging Face hub. It may be left out for the demo alone.
            A joint one replaces attention, too.
        attention_crosscoder: the same for a second crosscoder, which replaces attention; attention is left as it is if None.
        base: where the crosscoder is an adapter, the language model that `model` was fine-tuned from, named as that one is.
        dtype: float32, bfloat16, float16 or float64, which both are loaded in; its name will do. The model runs in it; exact
            work (`localize`, `circuits.trace`) raises 16-bit weights to float32 piece by piece.
        device: device both are put on: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` for the first of CUDA, MPS and CPU there is.
        lazy: leave the crosscoders' weights in their files, which may then be larger than memory; by default where they would
            take more than half of the memory that is free (see `replacement.checkpoint.load`).

    Raises:
        ValueError: one of them is missing, damaged or of another model, or a dtype or device that cannot be used.
    """
    is_demo = str(checked_path(model)) == DEMO
    if crosscoder is None and not is_demo:
        raise ValueError(f"expected a crosscoder for the model {str(model)!r}: give load(..., crosscoder=FOLDER)")
    crosscoder = DEMO if crosscoder is None else crosscoder
    dtype, device = dtype_of(dtype), _device(device)
    _check_together(dtype, device)
    folders = [crosscoder_folder(crosscoder)]
    if attention_crosscoder is not None:
        folders.append(crosscoder_folder(attention_crosscoder, shipped="attention_crosscoder"))
    for folder in folders:
        open_published(folder)  # a wrong path should not cost loading the language model
    lm = load_language_model(model, dtype=dtype, device=device)
    base_lm = None if base is None else load_language_model(base, dtype=dtype, device=device)
    loaded = [checkpoint.load(folder, dtype=dtype, device=device, lazy=lazy) for folder in folders]
    attention = loaded[1] if attention_crosscoder is not None else None
    result = ReplacementModel(lm, loaded[0], attention_crosscoder=attention, base=base_lm)
    names = {"model": model, "crosscoder": crosscoder, "attention_crosscoder": attention_crosscoder, "base": base}
    result.loaded_from = {name: _lasting(given) for name, given in names.items() if given is not None}
    return result


def load_language_model(
    model: str | Path = DEMO, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> LanguageModel:
    """The language model alone; `model` as for `load`."""
    is_demo = str(checked_path(model)) == DEMO
    lm = LanguageModel.from_pretrained(ARTIFACTS / "language_model" if is_demo else model, dtype=dtype, device=device)
    lm.name = DEMO if is_demo else lm.name
    return lm


def dtype_of(given: torch.dtype | str) -> torch.dtype:
    """A dtype by its name.

    Raises:
        ValueError: none of `DTYPES`.
    """
    dtype = DTYPES.get(given) if isinstance(given, str) else given
    if dtype is None or dtype not in DTYPES.values():
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {str(given).removeprefix('torch.')!r}")
    return dtype


def _device(given: str | torch.device) -> str:
    if given == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=given).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device: {str(given)!r} cannot be used here ({reason}); auto, cpu, cuda and mps are known"
        ) from error
    return str(given)


def _check_together(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.float64 and torch.device(device).type == "mps":
        raise ValueError("dtype: MPS has no float64: expected float32, bfloat16 or float16, or the device cpu")


def _lasting(given: str | Path) -> str:
    """A name that means the same from another working directory: folders become absolute."""
    is_folder = str(given) != DEMO and Path(given).is_dir()
    return str(Path(given).resolve()) if is_folder else str(given)


def crosscoder_folder(given: str | Path, *, shipped: str = "crosscoder") -> Path:
    """Where a crosscoder named as on the command line is: `demo`, the folder of a training run, its own, or `hf:org/repo`.

    Args:
        shipped: name of the demo's crosscoder that `demo` means.
    """
    if str(given) == DEMO:
        return ARTIFACTS / shipped
    folder = local_copy(given)
    inside = folder / "crosscoder"
    return inside if inside.is_dir() else folder
