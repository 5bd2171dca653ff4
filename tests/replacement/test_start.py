"""What the commands set before they compute: an allocator that keeps memory, threads that fit; the user's settings first."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from replacement import allocator, start
from replacement.allocator import keep_freed_memory
from replacement.threads import SMALL_WIDTH, fit_threads

ROOT = Path(__file__).parents[2]
FAULTS = """
import resource, sys
from replacement.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    pair = [torch.ones(10 * 2**20) for _ in range(2)]
    del pair
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def python(script: str, *arguments: str, **environment: str) -> str:
    """What a script prints in a process of its own, without the test run's settings of allocator and threads."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "OMP_", "MKL_"))}
    command = [sys.executable, "-c", script, *arguments]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=inherited | environment, check=True
    )
    return ran.stdout.strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_freed_memory_is_not_fetched_again() -> None:
    """Forty times two tensors of 40 MiB: the pages of a few of them are fetched, or those of all."""
    mapped, kept = (int(python(FAULTS, mode)) for mode in ("mapped", "kept"))
    assert kept < mapped / 4


def test_other_allocators_and_settings_of_the_user_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "from replacement.allocator import keep_freed_memory; print(keep_freed_memory())"
    assert python(script, MALLOC_TRIM_THRESHOLD_="0") == "False"

    def unknown(name: str) -> str:
        raise ValueError(f"unrecognized configuration name {name}")  # as Python says on musl and macOS

    monkeypatch.setattr(allocator.os, "confstr", unknown)
    assert not keep_freed_memory()
    monkeypatch.delattr(allocator.os, "confstr")  # as on Windows
    assert not keep_freed_memory()


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_asleep(given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "keep_freed_memory", lambda: True)
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    start.prepare()
    assert os.environ["OMP_WAIT_POLICY"] == expected


@pytest.mark.parametrize(
    ("environment", "before", "width", "expected"),
    [
        ({}, 3, SMALL_WIDTH - 1, 1),
        ({}, 3, SMALL_WIDTH, 3),
        ({}, 1, 10_000, 1),
        ({"OMP_NUM_THREADS": "3"}, 3, 64, 3),
        ({"MKL_NUM_THREADS": "3"}, 3, 64, 3),
    ],
)
def test_narrow_models_get_one_thread(
    environment: dict[str, str], before: int, width: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    restored = torch.get_num_threads()
    torch.set_num_threads(before)
    try:
        fit_threads(width)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(restored)
