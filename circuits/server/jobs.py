"""A queue of jobs for the model, which does one thing at a time."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
MOST_WAITING = 20
MOST_KEPT = 100
"""Jobs that are remembered once they are finished."""


class CancelledError(Exception):
    """The job was cancelled while it ran."""


@dataclass(eq=False, kw_only=True)
class Job:
    """One job, and how far it is."""

    id: str
    title: str
    work: Callable[[Job], dict[str, Any]]
    """Called in the queue's thread; what it returns is the job's result. It calls `say` often."""
    state: str = WAITING
    progress: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    is_cancelled: bool = False
    """Whether somebody asked to cancel it."""

    def say(self, text: str) -> None:
        """Say how far the job is.

        Raises:
            CancelledError: it was cancelled.
        """
        self.progress = text
        if self.is_cancelled:
            raise CancelledError


class JobQueue:
    """Runs jobs one after another, in a thread of its own."""

    def __init__(self, describe: Callable[[Exception], str] = str) -> None:
        """Start the thread.

        Args:
            describe: gives the message of an error.
        """
        self._describe = describe
        self._jobs: dict[str, Job] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._waiting: queue.Queue[Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()

    def add(self, title: str, work: Callable[[Job], dict[str, Any]]) -> Job:
        """Queue a job.

        Raises:
            ValueError: too many wait.
        """
        with self._lock:
            if sum(job.state == WAITING for job in self._jobs.values()) >= MOST_WAITING:
                raise ValueError(f"expected at most {MOST_WAITING} waiting jobs: wait for some of them, or cancel some")
            job = Job(id=str(next(self._numbers)), title=title, work=work)
            self._jobs[job.id] = job
            finished = [known.id for known in self._jobs.values() if known.state in (DONE, FAILED, CANCELLED)]
            for number in finished[:-MOST_KEPT]:
                del self._jobs[number]
        self._waiting.put(job)
        return job

    def get(self, number: str) -> Job | None:
        """The job of an id, unless it is forgotten."""
        return self._jobs.get(number)

    def cancel(self, job: Job) -> None:
        """Take a waiting job out of the queue, or ask a running one to end; a finished one stays as it is."""
        with self._lock:
            job.is_cancelled = True
            if job.state == WAITING:
                job.state = CANCELLED

    def facts(self) -> list[dict[str, Any]]:
        """What is known of all jobs, the oldest first; `place` counts the jobs that come before a waiting one."""
        with self._lock:
            place, facts = 0, []
            for job in self._jobs.values():
                shown = {name: getattr(job, name) for name in ("id", "title", "state", "progress", "result", "error")}
                facts.append(shown | ({"place": place} if job.state == WAITING else {}))
                place += job.state in (WAITING, RUNNING)
            return facts

    def close(self, seconds: float = 10) -> None:
        """Cancel everything and wait for the thread, at most so long."""
        for job in list(self._jobs.values()):
            self.cancel(job)
        self._waiting.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (job := self._waiting.get()) is not None:
            with self._lock:
                if job.state != WAITING:
                    continue
                job.state = RUNNING
            try:
                result, state, error = job.work(job), DONE, ""
            except CancelledError:
                result, state, error = {}, CANCELLED, ""
            except Exception as failure:  # whatever it is, the next job runs
                result, state, error = {}, FAILED, self._describe(failure) or type(failure).__name__
            with self._lock:
                job.result, job.error, job.state = result, error, state
