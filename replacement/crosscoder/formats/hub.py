"""Crosscoders on the Hugging Face hub: `hf:org/repo[/path][@revision]` becomes a path on this machine."""

from __future__ import annotations

import glob
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from replacement.files import checked_path

_URI = re.compile(r"hf://(?P<repo>[^/\s]+/[^/\s]+)(?:/(?P<path>[^?\s]+))?(?:\?revision=(?P<revision>\S+))?")
_SHORT = re.compile(r"hf:(?P<repo>[^/\s@]+/[^/\s@]+)(?:/(?P<path>[^@\s]+))?(?:@(?P<revision>\S+))?")


class Reference(NamedTuple):
    """A place on the hub."""

    repo: str
    """Such as `google/gemma-scope-2b-pt-transcoders`."""
    path: str | None
    """File or folder in it; everything by default."""
    revision: str | None
    """Branch, tag or commit; the default branch by default."""

    @classmethod
    def parse(cls, text: str) -> Reference | None:
        """Read `hf:org/repo[/path][@revision]`, or `hf://org/repo/file?revision=...` as configurations write it.

        None for texts that do not begin with `hf:`.

        Raises:
            ValueError: another form behind `hf:`.
        """
        if not text.startswith("hf:"):
            return None
        match = (_URI if text.startswith("hf://") else _SHORT).fullmatch(text)
        if match is None:
            raise ValueError(f"cannot read {text!r:.120}: expected hf:org/repo[/path][@revision]")
        return cls(match["repo"], (match["path"] or "").strip("/") or None, match["revision"])

    @property
    def _config(self) -> str:
        """A configuration beside a file, which says what it reads and writes; empty for folders."""
        path = PurePosixPath(self.path or "")
        return str(path.with_name("config.json")) if path.suffix in (".safetensors", ".npz") else ""

    def download(self) -> Path:
        """Path of the file or folder on this machine; fetched unless it is in the hub's cache.

        Nothing else of the repository is fetched, but for a `config.json` beside a file of weights.

        Raises:
            ValueError: it does not exist, needs a login, or the hub cannot be reached.
        """
        from huggingface_hub import snapshot_download

        patterns = None
        if self.path is not None:
            path = glob.escape(self.path)
            patterns = [path, f"{path}/*", *([glob.escape(self._config)] if self._config else [])]
        try:
            folder = Path(snapshot_download(self.repo, revision=self.revision, allow_patterns=patterns))
        except (OSError, ValueError) as error:  # requests and hub errors are both
            reason = " ".join(str(error).split())
            raise ValueError(f"cannot fetch {self.repo} from the Hugging Face hub: {reason[:300]}") from error
        found = folder if self.path is None else folder / self.path
        if not found.exists():
            raise ValueError(
                f"the repository {self.repo} has no {self.path} at {self.revision or 'its default branch'}"
            )
        return found


def local_copy(given: str | Path) -> Path:
    """The path that a `hf:` reference or a path stands for; see `Reference`. A query at its end (`reference.Asked`) is kept."""
    text, mark, query = str(given).partition("?") if not str(given).startswith("hf://") else (str(given), "", "")
    reference = Reference.parse(text)
    return checked_path(given) if reference is None else Path(f"{reference.download()}{mark}{query}")


def local_file(given: str, *, beside: Path) -> Path:
    """The same for an entry of a configuration: paths are relative to its folder."""
    reference = Reference.parse(given)
    return beside / given if reference is None else reference.download()
