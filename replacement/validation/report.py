"""The report folder of a validation: one page that needs nothing else, and its plots, tables and facts as files.

    DIR/index.html  DIR/validation.json  DIR/plots/*.svg, *.png  DIR/tables/*.csv

Every text that comes from a model, a tokenizer or a user is escaped; the page holds no script and loads nothing.
"""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

import jinja2

from replacement.files import atomic_folder
from replacement.validation.plots import as_file, plots
from replacement.validation.protocols import PROPAGATED
from replacement.validation.tables import nats, one_decimal, percent, share, signed, tables

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def write_report(facts: dict[str, Any], folder: str | Path) -> Path:
    """Write the folder, as a whole or not at all, and return the page.

    In an existing folder the files of an earlier report are replaced and all others kept.

    Raises:
        ValueError: names the path and the reason: not a folder, no permission, a full disk.
    """
    with atomic_folder(folder, keep_others=True) as scratch:
        (scratch / "plots").mkdir()
        (scratch / "tables").mkdir()
        pictures = {}
        for name, figure in plots(facts).items():
            svg = as_file(figure, "svg")
            pictures[name] = "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
            (scratch / "plots" / f"{name}.svg").write_bytes(svg)
            (scratch / "plots" / f"{name}.png").write_bytes(as_file(figure, "png"))
        for table in tables(facts):
            with (scratch / "tables" / f"{table.key}.csv").open(
                "w", encoding="utf-8", errors="replace", newline=""
            ) as file:
                csv.writer(file, lineterminator="\n").writerows([table.heads, *table.rows])
        text = json.dumps(facts, indent=1, allow_nan=False)
        (scratch / "validation.json").write_text(text + "\n", encoding="utf-8")
        (scratch / "index.html").write_text(render(facts, pictures), encoding="utf-8", errors="replace")
    return Path(folder) / "index.html"


def render(facts: dict[str, Any], pictures: dict[str, str]) -> str:
    """The page as text.

    Args:
        pictures: data addresses of the plots, by the key of the table each belongs to.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    output, reconstruction = facts["protocols"][PROPAGATED], facts["reconstruction"]
    figures = [
        ("KL, errors propagating (nats)", nats(output["kl"]["mean"])),
        ("cross-entropy increase (nats)", signed(output["cross_entropy_increase"])),
        ("top-1 agreement", percent(output["agreement"]["all"])),
        ("variance unexplained", share(reconstruction["unexplained"])),
        ("active features per token", one_decimal(reconstruction["l0"])),
        ("features that never fire here", percent(_dead_share(reconstruction))),
    ]
    verdict, *others = tables(facts)
    return template.render(facts=facts, verdict=verdict, tables=others, pictures=pictures, figures=figures)


def _dead_share(reconstruction: dict[str, Any]) -> float:
    """Dead features of all crosscoders, as a share of their features."""
    n_features = sum(group["n_features"] for part in reconstruction["crosscoders"] for group in part["groups"])
    return sum(part["dead"] for part in reconstruction["crosscoders"]) / n_features
