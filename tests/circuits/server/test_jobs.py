"""The queue of the model's jobs: one at a time, in order, each says its place and can be cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from circuits.server import jobs
from circuits.server.jobs import Job, JobQueue


@pytest.fixture
def line() -> Iterator[JobQueue]:
    """A queue, which is closed after the test."""
    line = JobQueue()
    yield line
    line.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    tick = threading.Event()
    for _ in range(3000):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError("it never came to that")


class Held:
    """Work that waits until it is let go, and says something all the time."""

    def __init__(self) -> None:
        self.started, self.let_go = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> dict[str, Any]:
        self.started.set()
        while not self.let_go.wait(0.005):
            job.say("at it")
        job.say("done with it")
        return {"number": 7}


def states(line: JobQueue) -> list[str]:
    return [facts["state"] for facts in line.facts()]


def test_jobs_run_one_after_another_and_say_their_place(line) -> None:
    first, second = Held(), Held()
    for number, work in enumerate((first, second, lambda job: {"number": 8})):
        line.add(f"job {number}", work)
    assert first.started.wait(30)
    until(lambda: line.facts()[0]["progress"] == "at it")
    assert states(line) == ["running", "waiting", "waiting"]
    assert [facts.get("place") for facts in line.facts()] == [None, 1, 2]
    assert not second.started.is_set()
    first.let_go.set()
    assert second.started.wait(30)
    assert states(line) == ["done", "running", "waiting"]
    assert line.facts()[2]["place"] == 1
    second.let_go.set()
    until(lambda: states(line) == ["done"] * 3)
    assert [facts["result"] for facts in line.facts()] == [{"number": 7}, {"number": 7}, {"number": 8}]
    assert [facts["title"] for facts in line.facts()] == ["job 0", "job 1", "job 2"]


def test_a_running_job_ends_when_it_speaks_next(line) -> None:
    work = Held()
    job = line.add("a", work)
    assert work.started.wait(30)
    line.cancel(job)
    until(lambda: states(line) == ["cancelled"])
    assert line.facts()[0]["result"] == {}


def test_a_waiting_job_that_is_cancelled_never_starts(line) -> None:
    first, second, third = Held(), Held(), Held()
    line.add("a", first)
    cancelled = line.add("b", second)
    line.add("c", third)
    line.cancel(cancelled)
    assert line.facts()[2]["place"] == 1
    first.let_go.set()
    assert third.started.wait(30)
    assert states(line) == ["done", "cancelled", "running"]
    assert not second.started.is_set()
    third.let_go.set()


def test_cancelling_what_is_finished_changes_nothing(line) -> None:
    job = line.add("a", lambda job: {"number": 1})
    until(lambda: states(line) == ["done"])
    line.cancel(job)
    assert states(line) == ["done"]


@pytest.mark.parametrize(
    ("error", "message"),
    [(ValueError("no such token"), "no such token"), (MemoryError(), "MemoryError"), (KeyError("x"), "'x'")],
)
def test_a_job_that_fails_says_why_and_the_next_one_runs(line, error, message) -> None:
    def fail(job: Job) -> dict[str, Any]:
        raise error

    line.add("a", fail)
    line.add("b", lambda job: {"number": 2})
    until(lambda: states(line) == ["failed", "done"])
    assert line.facts()[0]["error"] == message


def test_too_many_waiting_jobs_are_refused(line, monkeypatch) -> None:
    monkeypatch.setattr(jobs, "MOST_WAITING", 2)
    work = Held()
    line.add("running", work)
    assert work.started.wait(30)
    for _ in range(2):
        last = line.add("waiting", work)
    with pytest.raises(ValueError, match="expected at most 2 waiting jobs: wait for some of them, or cancel some"):
        line.add("one too many", work)
    line.cancel(last)
    line.add("waiting", work)
    work.let_go.set()


def test_old_jobs_are_forgotten(line, monkeypatch) -> None:
    monkeypatch.setattr(jobs, "MOST_KEPT", 2)
    first = line.add("0", lambda job: {})
    for number in range(1, 6):
        until(lambda: not set(states(line)) & {"waiting", "running"})
        line.add(str(number), lambda job: {})
    assert [facts["title"] for facts in line.facts()] == ["3", "4", "5"]
    assert line.get(first.id) is None


def test_closing_cancels_all() -> None:
    line = JobQueue()
    work, waits = Held(), Held()
    line.add("a", work)
    line.add("b", waits)
    assert work.started.wait(30)
    line.close()
    assert states(line) == ["cancelled", "cancelled"]
    assert not waits.started.is_set()
