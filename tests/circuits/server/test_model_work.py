"""Traces and interventions over HTTP give what `circuits.trace` and `model.intervene` give."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import httpx
import pytest

import circuits
from circuits import CircuitGraph
from circuits.server import model_work
from replacement import Intervention

PROMPT = "w5 w6 w7 w8 w5"


def post(client: httpx.Client, path: str, json: object) -> str:
    """The id of the job that a request gave."""
    answer = client.post(path, json=json)
    assert answer.status_code == 202, answer.text
    return answer.json()["job"]


def timeless(graph: CircuitGraph) -> CircuitGraph:
    """The graph without how long it took."""
    return dataclasses.replace(graph, metadata={**graph.metadata, "seconds": 0.0})


def features(graph: CircuitGraph) -> list[Any]:
    return [row for row in graph.features() if row.position > 0]


@pytest.mark.parametrize("targets", [[], ["w9"], ["w9", "w8"]])
def test_a_trace_is_that_of_the_library(serve, folder, model, wait, targets) -> None:
    client = serve(folder, model)
    assert client.get("/api/graphs").json()["model"] == model.language_model.name
    facts = wait(client, post(client, "/api/traces", {"prompt": PROMPT, "targets": targets}))
    assert facts["error"] == ""
    assert (facts["state"], facts["result"], facts["title"]) == ("done", {"graph": "w5-w6-w7-w8-w5"}, PROMPT)
    expected = circuits.trace(model, PROMPT, targets=targets or None)
    written = CircuitGraph.load(folder / "w5-w6-w7-w8-w5" / "graph.safetensors")
    assert timeless(written) == timeless(expected)
    circuit = CircuitGraph.load(folder / "w5-w6-w7-w8-w5" / "circuit.safetensors")
    assert circuit.nodes.ids() == expected.prune(most_nodes=60, most_edges=300).nodes.ids()
    assert circuit.heads is not None
    assert client.get("/graph/w5-w6-w7-w8-w5").status_code == 200


def test_a_second_trace_of_a_prompt_gets_a_name_of_its_own(serve, folder, model, wait) -> None:
    (folder / "w5-W6".lower()).write_text("in the way")
    client = serve(folder, model)
    names = [wait(client, post(client, "/api/traces", {"prompt": "w5 w6"}))["result"]["graph"] for _ in range(2)]
    assert names == ["w5-w6-2", "w5-w6-3"]
    assert (folder / "w5-w6").read_text() == "in the way"


WRONG = [
    ({}, "prompt: expected a text of 1 to 20,000 characters"),
    ({"prompt": "  "}, "prompt: expected a text"),
    ({"prompt": 5}, "prompt: expected a text"),
    ({"prompt": "w" * 20_001}, "prompt: expected a text"),
    ({"prompt": "w5", "targets": "w9"}, "targets: expected a list of texts"),
    ({"prompt": "w5", "targets": [5]}, "targets: expected a list of texts"),
    ({"prompt": "w5", "targets": ["w" * 201]}, "targets: expected a list of texts"),
    ({"prompt": "w5", "target": "w9"}, "expected prompt and targets, given 'target'"),
]


@pytest.mark.parametrize(("request_", "message"), WRONG, ids=range(len(WRONG)))
def test_another_form_of_a_trace_is_refused(serve, folder, model, request_, message) -> None:
    answer = serve(folder, model).post("/api/traces", json=request_)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(message)


def test_half_a_character_is_no_prompt(serve, folder, model) -> None:
    content, headers = b'{"prompt": "w5 \\ud83d"}', {"Content-Type": "application/json"}
    answer = serve(folder, model).post("/api/traces", content=content, headers=headers)
    assert answer.json()["error"] == "prompt: expected text, given half of a surrogate pair"


def test_mistakes_of_the_model_room_are_said(serve, folder, model, wait) -> None:
    before = sorted(folder.iterdir())
    client = serve(folder, model)
    facts = wait(client, post(client, "/api/traces", {"prompt": "w5 " * 40}))
    assert facts["state"] == "failed"
    assert "tokens" in facts["error"]
    facts = wait(client, post(client, "/api/traces", {"prompt": "w5", "targets": ["feature:0/9999@1"]}))
    assert facts["state"] == "failed"
    assert facts["error"]
    assert [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")] == before


def test_a_trace_that_needs_too_much_memory_is_refused_as_by_the_command(serve, folder, model, wait) -> None:
    client = serve(folder, model, memory="1MB")
    facts = wait(client, post(client, "/api/traces", {"prompt": PROMPT}))
    assert facts["state"] == "failed"
    assert facts["error"].startswith("memory: the trace needs about ")
    assert "raise --memory" in facts["error"]


def test_a_trace_is_cancelled_between_its_rounds(serve, folder, model, wait, monkeypatch) -> None:
    """The first round has ended, and the second never begins."""
    monkeypatch.setattr("circuits.attribution.expansion.FIRST_ROUND", 1)
    monkeypatch.setattr("circuits.attribution.expansion.LARGEST_ROUND", 1)
    told, go_on, rounds = threading.Event(), threading.Event(), []
    line = model_work.ProgressText.__call__

    def slow(self: object, expanded: int, share: float) -> str:
        rounds.append(expanded)
        told.set()
        assert go_on.wait(60)
        return line(self, expanded, share)

    monkeypatch.setattr(model_work.ProgressText, "__call__", slow)
    client = serve(folder, model)
    job = post(client, "/api/traces", {"prompt": PROMPT})
    behind = post(client, "/api/traces", {"prompt": "w5 w6"})
    assert told.wait(60)
    places = {facts["id"]: facts.get("place") for facts in client.get("/api/jobs").json()["jobs"]}
    assert places == {job: None, behind: 1}
    for number in (job, behind):
        assert client.post(f"/api/jobs/{number}/cancel", json={}).status_code == 200
    go_on.set()
    assert wait(client, job)["state"] == "cancelled"
    assert wait(client, behind)["state"] == "cancelled"
    assert rounds == [0]
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == ["toy.safetensors"]


def test_progress_is_shown(serve, folder, model, wait, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("circuits.server.jobs.Job.say", lambda self, text: said.append(text))
    client = serve(folder, model)
    wait(client, post(client, "/api/traces", {"prompt": PROMPT}))
    assert said[0] == "running the model"
    assert said[1].startswith("estimate: about ")
    assert "features expanded" in said[2]
    assert said[-1] == "writing the graph"


def test_without_a_model_nothing_is_traced(client) -> None:
    message = "no model is loaded: start `circuits serve` with --model"
    assert client.get("/api/graphs").json()["model"] is None
    for path in ("/api/traces", "/api/graphs/toy.safetensors/interventions"):
        answer = client.post(path, json={"prompt": PROMPT})
        assert (answer.status_code, answer.json()["error"]) == (409, message)


def test_an_unknown_job_is_said(serve, folder, model) -> None:
    answer = serve(folder, model).post("/api/jobs/77/cancel", json={})
    assert (answer.status_code, answer.json()["error"]) == (404, "there is no such job")


# Interventions -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def traced(folder, model) -> CircuitGraph:
    """A graph of the model, saved as `mine.safetensors`."""
    graph = circuits.trace(model, PROMPT)
    graph.save(folder / "mine.safetensors")
    return graph


PATH = "/api/graphs/mine.safetensors/interventions"


@pytest.mark.parametrize(
    ("way", "value", "everywhere"),
    [("scale", 0, False), ("scale", -2.5, False), ("activation", 3.0, False), ("add", 1.5, True), ("scale", 0.0, True)],
)
def test_an_intervention_is_that_of_the_model(serve, folder, model, traced, wait, way, value, everywhere) -> None:
    first, second = features(traced)[:2]
    changes = [
        {"node": first.id, way: value, "everywhere": everywhere},
        {"node": f"{second.layer}/{second.index}@{second.position}", "scale": 0.5},
    ]
    facts = wait(client := serve(folder, model), post(client, PATH, {"changes": changes}))
    assert facts["state"] == "done", facts["error"]
    position = None if everywhere else first.position
    interventions = [
        Intervention(layer=first.layer, index=first.index, position=position, **{way: float(value)}),
        Intervention(layer=second.layer, index=second.index, position=second.position, scale=0.5),
    ]
    run = model.intervene(PROMPT, interventions)
    before, after = (logits[-1].softmax(-1) for logits in (run.clean_logits, run.logits))
    assert facts["result"]["position"] == len(traced.metadata["tokens"]) - 1
    rows = {row["token"]: row for row in facts["result"]["tokens"]}
    tokens = {model.language_model.token_strings([token])[0]: token for token in range(len(before))}
    for name, row in rows.items():
        assert row["before"] == float(before[tokens[name]])
        assert row["after"] == float(after[tokens[name]])
    for shares in (before, after):
        top = model.language_model.token_strings(shares.topk(8).indices.tolist())
        assert set(top) <= rows.keys()
    assert (before - after).abs().max() > 1e-4, "the change is felt"


WRONG_CHANGES = [
    ({}, "changes: expected a list of 1 to 100 changes"),
    ({"changes": []}, "changes: expected a list of 1 to 100 changes"),
    ({"changes": [{"node": "a", "scale": 0}] * 101}, "changes: expected a list of 1 to 100 changes"),
    ({"changes": ["a"]}, "changes: expected objects with the id of a node"),
    ({"changes": [{"scale": 0}]}, "changes: expected objects with the id of a node"),
    ({"changes": [{"node": "a"}]}, "changes: expected one number, scale, activation or add, for 'a'"),
    ({"changes": [{"node": "a", "scale": 0, "add": 1}]}, "changes: expected one number"),
    ({"changes": [{"node": "a", "scale": "0"}]}, "changes: expected one number"),
    ({"changes": [{"node": "a", "scale": True}]}, "changes: expected one number"),
    ({"changes": [{"node": "a", "scale": 1e19}]}, "changes: expected one number"),
    ({"changes": [{"node": "a", "scale": 10**400}]}, "changes: expected one number"),
    ({"changes": [{"node": "a", "scale": 0, "everywhere": 1}]}, "changes: expected node, everywhere and one of"),
    ({"changes": [{"node": "a", "scale": 0, "more": 1}]}, "changes: expected node, everywhere and one of"),
]


@pytest.mark.parametrize(("request_", "message"), WRONG_CHANGES, ids=range(len(WRONG_CHANGES)))
def test_another_form_of_an_intervention_is_refused(serve, folder, model, traced, request_, message) -> None:
    answer = serve(folder, model).post(PATH, json=request_)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(message)


def test_nodes_that_cannot_be_changed_are_named(serve, folder, model, traced, wait) -> None:
    client = serve(folder, model)
    token = traced.nodes.ids()[0]
    twice = [{"node": features(traced)[0].id, "scale": 0}] * 2
    for changes, message in (
        ([{"node": "9_9_9", "scale": 0}], "node: the graph has no node '9_9_9'"),
        ([{"node": token, "scale": 0}], f"only features can be changed, and node {token} is of kind token"),
        (twice, "two interventions set the same feature"),
    ):
        facts = wait(client, post(client, PATH, {"changes": changes}))
        assert facts["state"] == "failed"
        assert facts["error"].startswith(message)


def test_a_graph_of_another_model_is_refused(serve, folder, model, wait) -> None:
    client = serve(folder, model)
    facts = wait(
        client, post(client, "/api/graphs/toy.safetensors/interventions", {"changes": [{"node": "1_3_1", "scale": 0}]})
    )
    assert facts["state"] == "failed"
    assert "the graph does not name its model and tokens" in facts["error"]
