"""The payload holds the graph's numbers, and the page holds the payload whatever the texts of the graph are."""

import base64
import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_circuit import random_circuit

from circuits import CircuitGraph
from circuits.cli import main
from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.exporters import file_formats
from circuits.trace_options import TraceOptions, write_files
from circuits.viewer.columns import column, payload
from circuits.viewer.page import SCRIPTS, as_script_data, to_html

ASSETS = Path(__file__).parents[3] / "circuits" / "viewer" / "assets"
NASTY = "</script><img src=x onerror=alert(1)>\u2028 \u05e9\u05dc\u05d5\u05dd \U0001f469\u200d\U0001f52c \ud800 \"'&{{ head }}"


def decode(stored: list[str]) -> np.ndarray:
    kind, text = stored
    return np.frombuffer(base64.b64decode(text), dtype=f"<{kind}")


def payload_of(page: str) -> dict:
    """The payload as a browser finds it: up to the first end tag."""
    (text,) = re.findall(r'<script type="application/json" id="graph">(.*?)</script', page, re.DOTALL | re.IGNORECASE)
    return json.loads(text)


def test_the_payload_holds_the_graph(draw_circuit) -> None:
    @given(st.data())
    def check(data: st.DataObject) -> None:
        graph = draw_circuit(data)
        stored = json.loads(as_script_data(payload(graph)))
        nodes, edges = stored["nodes"], stored["edges"]
        assert nodes["id"] == list(graph.nodes.ids())
        for name in ("kind", "part", "layer", "position", "index", "expanded", "inflow"):
            assert np.array_equal(decode(nodes[name]), getattr(graph.nodes, name)), name
        assert np.array_equal(decode(nodes["outputWeight"]), graph.nodes.output_weight)
        assert np.array_equal(decode(nodes["influence"]), graph.influence())
        assert np.allclose(decode(nodes["value"]), graph.nodes.value, rtol=1e-6)
        assert np.array_equal(decode(edges["rowStart"]), graph.edges.indptr)
        assert np.array_equal(decode(edges["source"]), graph.edges.source)
        assert np.array_equal(decode(edges["weight"]), graph.edges.weight)
        assert stored["scores"] == dataclasses.asdict(graph.scores())

    check()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([], "u1"),
        ([0, 255], "u1"),
        ([-1, 5], "i1"),
        ([256], "u2"),
        ([-1, 200], "i2"),
        ([2**31 - 1], "i4"),
        ([2**40], "f8"),
    ],
)
def test_whole_numbers_take_the_least_room(values: list[int], kind: str) -> None:
    stored = column(np.array(values, dtype=np.int64))
    assert stored[0] == kind
    assert decode(stored).tolist() == values


def test_heads_beyond_the_listed_ones_are_in_the_rest(small: CircuitGraph) -> None:
    heads = np.random.default_rng(0).normal(size=(len(small.edges), 3, 5))
    direct = small.edges.weight - heads.sum(axis=(1, 2))
    graph = dataclasses.replace(small, heads=EdgeHeads.from_dense(direct, heads, listed=1.0))
    stored = payload(graph)["heads"]
    start, scale = decode(stored["rowStart"]), decode(stored["scale"]) / 32767
    for edge, row in enumerate(graph.heads):
        at = slice(start[edge], start[edge + 1])
        weights = decode(stored["weight"])[at] * scale[edge]
        names = list(zip(decode(stored["layer"])[at].tolist(), decode(stored["head"])[at].tolist(), strict=True))
        assert names == [head[:2] for head in row.heads[: len(names)]]
        assert len(names) == 8
        size = np.abs([row.direct, *[head[2] for head in row.heads]]).max()
        assert np.allclose(weights, [head[2] for head in row.heads[:8]], atol=1e-4 * size)
        parts = (decode(stored["direct"])[edge] + decode(stored["rest"])[edge]) * scale[edge]
        assert parts + weights.sum() == pytest.approx(graph.edges.weight[edge], abs=1e-3 * size)


def test_texts_cannot_leave_the_payload(small: CircuitGraph) -> None:
    labels = tuple(NASTY for _ in small.nodes.label)
    facts = {**small.metadata, "prompt": NASTY, "tokens": [NASTY] * 2, "note": NASTY}
    graph = dataclasses.replace(small, nodes=dataclasses.replace(small.nodes, label=labels), metadata=facts)
    page = to_html(graph)
    page.encode("utf-8")
    assert "\u2028" not in page
    stored = payload_of(page)
    assert stored["prompt"] == stored["metadata"]["note"] == NASTY
    assert "onerror" not in page.replace(as_script_data(NASTY)[1:-1], "").partition("<script")[0]
    assert page.lower().count("</script") == 2


def test_the_policy_allows_this_script_alone(small: CircuitGraph) -> None:
    page = to_html(small)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    loads = re.compile(r"\b(src|href)=|(inner|outer)HTML|insertAdjacentHTML|document\.write|https?://")
    assert not loads.search(page.replace("http://www.w3.org/2000/svg", "a name, not an address"))


def test_a_large_page_is_small() -> None:
    page = to_html(random_circuit(1000, 20_000, n_heads=8))
    assert len(page.encode("utf-8")) < 2_000_000


def test_options_reach_the_page(small: CircuitGraph, tmp_path: Path) -> None:
    page = small.to_html(tmp_path / "a.html", index=()).read_text(encoding="utf-8")
    assert page == to_html(small, index=())
    with pytest.raises(TypeError, match="unexpected keyword argument 'indx'"):
        small.to_html(tmp_path / "b.html", indx=())
    assert not (tmp_path / "b.html").exists()


def test_every_asset_is_used() -> None:
    assert {path.name for path in ASSETS.iterdir()} == {
        "page.html",
        "palette.css",
        "style.css",
        "panes.css",
        *(f"{name}.js" for name in SCRIPTS),
    }


def test_html_is_a_format(small: CircuitGraph, tmp_path: Path) -> None:
    assert file_formats()["html"].suffix == ".html"
    path = small.to_html(tmp_path / "a.html")
    assert path.read_text(encoding="utf-8") == to_html(small)
    assert small.export("html", tmp_path / "b.html").read_bytes() == path.read_bytes()


def test_show_writes_the_page(small: CircuitGraph, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    graph, out = small.save(tmp_path / "g.safetensors"), tmp_path / "page.html"
    assert main(["show", str(graph), "--html", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert payload_of(out.read_text(encoding="utf-8"))["nodes"]["count"] == len(small.nodes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--html", "/proc/foo"], "but /proc takes no new files"),
        (["--html", ""], "expected the name of a file or folder, given ''"),
        (["--html", "a.html", "--json"], "html: expected --html or --json, given both"),
        (["--index", "a.sqlite"], "index: expected --html beside it, given none"),
        (["--html", "a.html", "--index", "nowhere.sqlite"], "nowhere.sqlite does not exist: expected a feature index"),
    ],
)
def test_mistakes_are_named(
    small: CircuitGraph, tmp_path: Path, capsys, monkeypatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show", str(small.save(tmp_path / "g.safetensors")), *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("a.html").exists()


def test_the_page_takes_its_examples_from_the_index_of_the_trace(small: CircuitGraph, tmp_path: Path) -> None:
    assert TraceOptions().page_index is None
    assert TraceOptions(index="a.sqlite").page_index == (Path("a.sqlite"),)
    assert TraceOptions(index="a.sqlite", use_index=False).page_index == ()
    write_files(small, small, tmp_path, ["html", "svg"], index=())
    assert (tmp_path / "circuit.html").read_text(encoding="utf-8") == to_html(small, index=())
    with pytest.raises(ValueError, match=r"b\.sqlite does not exist"):
        write_files(small, small, tmp_path, ["html"], index=(tmp_path / "b.sqlite",))
