"""Loading a model for a command: only when it is needed, with a spinner, and with what libraries print kept off stdout."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

if TYPE_CHECKING:
    from replacement import ReplacementModel

T = TypeVar("T")


def with_model(
    work: Callable[[ReplacementModel, Callable[[str], None]], T],
    *,
    model: str,
    crosscoder: str,
    attention_crosscoder: str | None,
) -> T:
    """Load the model and do some work with it, with what libraries print sent to stderr.

    Args:
        work: called with the model and a function that changes the text of the spinner.
        attention_crosscoder: checkpoint of an attention crosscoder, `demo`, or None where attention stays linear.
    """
    with contextlib.redirect_stdout(sys.stderr), _status("loading the model") as say:
        import replacement

        return work(replacement.load(model, crosscoder=crosscoder, attention_crosscoder=attention_crosscoder), say)


@contextlib.contextmanager
def _status(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr when that is a terminal; gives a function that changes its text."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status(text) as status:
        yield status.update
