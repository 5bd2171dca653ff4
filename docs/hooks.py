"""Hook of the documentation site: READMEs and notebooks of the repository become pages.

READMEs keep their paths, so that the links between them hold. The root of the site is `docs/`, so links to it lose that prefix.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
AT_ROOT = {"README.md": "overview.md", "CHANGELOG.md": "changelog.md"}
NOTEBOOKS = {"examples/tutorial.ipynb": "tutorial.md", "examples/your_model.ipynb": "your_model.md"}

REPLACED = {"](docs/": "](", "](../README.md": "](overview.md", ".ipynb)": ".md)", "<details>": "<details markdown>"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that come from elsewhere."""
    readmes = (path for package in ("circuits", "replacement") for path in (ROOT / package).rglob("README.md"))
    pages = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in readmes}
    pages |= {page: (ROOT / name).read_text(encoding="utf-8") for name, page in AT_ROOT.items()}
    pages |= {page: notebook_page(ROOT / name) for name, page in NOTEBOOKS.items()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links of the repository as links of the site, and tables inside of `<details>` as tables."""
    for old, new in REPLACED.items():
        markdown = markdown.replace(old, new)
    return markdown


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, and its code without outputs."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ((cell["cell_type"], "".join(cell["source"])) for cell in cells)
    parts = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in texts]
    where = f"*This page is the notebook `{path.relative_to(ROOT)}`; run it to see its outputs.*"
    return "\n\n".join([parts[0], where, *parts[1:]]) + "\n"
