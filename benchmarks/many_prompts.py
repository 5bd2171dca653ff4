"""What does a prompt cost in `circuits trace --prompts`, and are the files the same however the work was split or interrupted?

    python benchmarks/many_prompts.py                 1,000 held-out prompts of the demo
    python benchmarks/many_prompts.py --prompts 40    fewer

The command traces the file in one process, then in two (`torchrun`), then in two that are killed by SIGKILL at random moments
and started again. All folders and tables are compared byte by byte. A prompt counts as redone if its folder was there when the
processes were killed and is another one in the end.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine

from replacement.demo.corpus.behaviours import behaviours

TRACE = ["-m", "circuits", "trace", "--prompts"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def write_prompts(path: Path, n_prompts: int) -> int:
    """Write different held-out prompts of all behaviours in random order, and return how many there were."""
    prompts = sorted({probe.prompt for behaviour in behaviours() for probe in behaviour.probes})
    random.Random(0).shuffle(prompts)
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts[:n_prompts]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def start(file: Path, out: Path, launcher: list[str]) -> subprocess.Popen[bytes]:
    """Start the command."""
    command = [sys.executable, *launcher, *TRACE, str(file), "--out", str(out)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=ENVIRONMENT, **quiet)


def kill(launcher: subprocess.Popen[bytes]) -> None:
    """SIGKILL a launcher and its workers, which would outlive it."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    workers = [int(pid) for pid, parent in map(str.split, listed.splitlines()) if int(parent) == launcher.pid]
    for process in (launcher.pid, *workers):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    launcher.wait()
    time.sleep(0.2)


def finish(file: Path, out: Path, launcher: list[str]) -> float:
    """Run the command to its end, and return seconds."""
    started = time.perf_counter()
    code = start(file, out, launcher).wait()
    if code:
        raise SystemExit(f"the command ended with exit code {code}")
    return time.perf_counter() - started


def folders(out: Path) -> dict[str, int]:
    """Finished prompts: the inode of each record, which another folder would not have."""
    return {path.parent.name: path.stat().st_ino for path in out.glob("[!.]*/record.json")}


def digests(out: Path) -> dict[str, str]:
    """All files, hidden ones too, by path."""
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_often(file: Path, out: Path, *, n_kills: int, n_prompts: int) -> tuple[int, int]:
    """Kill two processes at random moments, start them again, and let the last ones finish.

    Returns:
        How many kills came before the end, and how many prompts were redone.
    """
    moments, seen, kills = random.Random(1), {}, 0
    for goal in sorted(
        moments.sample(range(1, n_prompts), n_kills)
    ):  # finished prompts, so that each start gets further
        running = start(file, out, TWO)
        while len(folders(out)) < goal and running.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.1))
        kills += running.poll() is None
        kill(running)
        seen |= {name: inode for name, inode in folders(out).items() if name not in seen}
    finish(file, out, TWO)
    after = folders(out)
    return kills, sum(after[name] != inode for name, inode in seen.items())


def main() -> None:
    """Run all of it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = folder / "prompts.jsonl"
        n_prompts = write_prompts(file, arguments.prompts)
        print(f"{machine()}; {n_prompts} prompts")
        for name, launcher in (("one", []), ("two", TWO)):
            seconds = finish(file, folder / name, launcher)
            rate = f"{seconds / n_prompts:.3f} s per prompt, {60 * n_prompts / seconds:.0f} prompts/min"
            print(f"{name} process(es): {seconds:.1f} s, {rate}", flush=True)
        reference = digests(folder / "one")
        kills, redone = kill_often(file, folder / "killed", n_kills=arguments.kills, n_prompts=n_prompts)
        size = sum(path.stat().st_size for path in (folder / "one").rglob("*") if path.is_file())
        print(f"{size / n_prompts / 1e6:.2f} MB per prompt")
        print(f"two processes write the same files: {digests(folder / 'two') == reference}")
        print(
            f"killed {kills} times: same files: {digests(folder / 'killed') == reference}; finished prompts redone: {redone}"
        )


if __name__ == "__main__":
    main()
