"""circuit-tracer's `.pt` files, written here from the published structure: read as graphs, and never run."""

import os
import pickle
import resource
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import CircuitGraph
from circuits.cli import main
from circuits.graph.importers import tensor_pickle

LAYERS, VOCABULARY = 2, 50
TOKENS = [3, 9, 4]
ACTIVE = [[0, 1, 7], [0, 2, 5], [1, 1, 2], [1, 2, 9], [1, 2, 11]]  # layer, position, index
SELECTED = [0, 2, 3, 4]


class LogitTarget(NamedTuple):
    token_str: str
    vocab_idx: int


class UnifiedConfig:
    def __init__(self, **facts: Any) -> None:
        self.__dict__.update(facts)


class HookedTransformerConfig(UnifiedConfig):
    pass


# Pickles name a class by its module.
LogitTarget.__module__ = "circuit_tracer.attribution.targets"
UnifiedConfig.__module__ = "circuit_tracer.utils.tl_nnsight_mapping"
HookedTransformerConfig.__module__ = "transformer_lens.HookedTransformerConfig"


def published(seed: int = 0) -> dict[str, Any]:
    """The dictionary that circuit-tracer saves. Rows are targets; features, errors, tokens, logits."""
    rng = np.random.default_rng(seed)
    n_features, n_tokens, n_logits = len(SELECTED), len(TOKENS), 2
    n_sources = n_features + LAYERS * n_tokens + n_tokens
    matrix = np.zeros((n_sources + n_logits, n_sources + n_logits), dtype=np.float32)
    matrix[:n_features, n_features:n_sources] = rng.normal(size=(n_features, n_sources - n_features))
    matrix[1:n_features, 0] = rng.normal(size=n_features - 1)  # feature 0 is in the first layer
    matrix[n_sources:, :n_sources] = rng.normal(size=(n_logits, n_sources))
    return {
        "input_string": "<s> a b",
        "adjacency_matrix": torch.from_numpy(matrix),
        "cfg": UnifiedConfig(
            n_layers=LAYERS, d_model=8, d_vocab=VOCABULARY, model_name="toy-2b", dtype=torch.float32, extra=None
        ),
        "active_features": torch.tensor(ACTIVE).T.contiguous().T,  # columns are contiguous, as those of a sparse tensor
        "logit_targets": [LogitTarget(" x", 6), LogitTarget("x - y", VOCABULARY + 1)],
        "logit_probabilities": torch.tensor([0.6, 0.2]),
        "vocab_size": VOCABULARY,
        "input_tokens": torch.tensor(TOKENS),
        "selected_features": torch.tensor(SELECTED),
        "activation_values": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.bfloat16),
        "scan": "org/toy-transcoders",
    }


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[object], Path]:
    """Saves a value with `torch.save`, while the modules that its classes name seem to exist."""

    def save(value: object) -> Path:
        with monkeypatch.context() as patch:
            for kind in (LogitTarget, UnifiedConfig, HookedTransformerConfig):
                parts = kind.__module__.split(".")
                for length in range(1, len(parts) + 1):
                    patch.setitem(sys.modules, ".".join(parts[:length]), types.ModuleType(parts[length - 1]))
            for kind in (LogitTarget, UnifiedConfig, HookedTransformerConfig):
                setattr(sys.modules[kind.__module__], kind.__qualname__, kind)
            torch.save(value, tmp_path / "graph.pt")
        return tmp_path / "graph.pt"

    return save


def test_a_published_file_is_read(write, to_dense) -> None:
    data = published()
    graph = CircuitGraph.load(write(data))
    tokens = [f"E_{token}_{position}" for position, token in enumerate(TOKENS)]
    errors = [f"{layer}_-1_{position}" for layer in range(LAYERS) for position in range(3)]
    features = [f"{layer}_{index}_{position}" for layer, position, index in (ACTIVE[number] for number in SELECTED)]
    logits = ["3_6_2", "3_-1_2"]
    ids = graph.nodes.ids()
    assert ids == (*tokens, *errors, *features, *logits)
    order = [[*features, *errors, *tokens, *logits].index(name) for name in ids]
    matrix = data["adjacency_matrix"].numpy()
    np.testing.assert_array_equal(to_dense(graph), matrix[np.ix_(order, order)])
    np.testing.assert_allclose(graph.nodes.inflow, np.abs(matrix.astype(np.float64)).sum(1)[order])
    assert graph.nodes.activation[9:13].tolist() == [1.0, 3.0, 4.0, 5.0]
    np.testing.assert_allclose(graph.nodes.probability[-2:], [0.6, 0.2])
    np.testing.assert_allclose(graph.nodes.output_weight[-2:], [0.75, 0.25], atol=1e-7)
    assert graph.nodes.expanded.tolist() == [False] * 9 + [True] * 6
    assert graph.nodes.label[-2:] == (" x", "x - y")
    facts = graph.metadata
    assert (facts["prompt"], facts["tokens"], facts["token_ids"]) == ("<s> a b", ["#3", "#9", "#4"], TOKENS)
    assert (facts["model"], facts["n_layers"], facts["identity_error"]) == ("toy-2b", LAYERS, None)
    assert facts["conventions"] == "circuit-tracer", "which pruning follows"
    assert "what 1 active features of 5 cause" in facts["imported"]["unknown"]
    assert facts["imported"]["config"]["d_model"] == 8
    assert graph.to_neuronpedia()["metadata"]["scan"] == "org/toy-transcoders"


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_the_published_definition(write, seed: int) -> None:
    """In float64, from the matrix: shares of rows, influence as a series, what ends in tokens or errors."""
    data = published(seed)
    matrix = np.abs(data["adjacency_matrix"].double().numpy())
    total = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, total, out=np.zeros_like(matrix), where=total > 0)
    output = np.zeros(len(matrix))
    output[-2:] = data["logit_probabilities"].double().numpy()
    influence = output @ (np.linalg.inv(np.eye(len(matrix)) - shares) - np.eye(len(matrix)))
    errors, tokens = slice(4, 10), slice(10, 13)
    replacement = influence[tokens].sum() / (influence[tokens].sum() + influence[errors].sum())
    through = influence + output
    completeness = ((1 - shares[:, errors].sum(1)) * through).sum() / through.sum()
    scores = CircuitGraph.load(write(data)).scores()
    assert scores.replacement == pytest.approx(replacement, rel=1e-6)
    assert scores.completeness == pytest.approx(completeness, rel=1e-6)


def test_earlier_versions(write) -> None:
    """Logits as a tensor of ids, under either name; no vocabulary size; TransformerLens's own configuration; two scans."""
    expected = CircuitGraph.load(write(published()))
    for name in ("logit_targets", "logit_tokens"):
        data = published()
        del data["logit_targets"], data["vocab_size"]
        data[name] = torch.tensor([6, 7])
        data["scan"] = ["a", "b"]
        data["cfg"] = HookedTransformerConfig(n_layers=LAYERS, d_vocab=VOCABULARY, device=torch.device("cpu"))
        graph = CircuitGraph.load(write(data))
        assert graph.nodes.ids()[-2:] == ("3_6_2", "3_7_2")
        assert graph.edges == expected.edges
        assert graph.to_neuronpedia()["metadata"]["scan"] == "a-b"
        assert [target["token"] for target in graph.metadata["targets"]] == ["#6", "#7"]


def test_a_saved_import_is_the_same_graph(write, tmp_path, capsys) -> None:
    path = write(published())
    graph = CircuitGraph.load(path)
    assert CircuitGraph.load(graph.save(tmp_path / "graph.safetensors")) == graph
    again = CircuitGraph.load(graph.export("neuronpedia", tmp_path / "graph.json"))
    assert (again.nodes.ids(), again.edges, again.scores()) == (graph.nodes.ids(), graph.edges, graph.scores())
    assert set(graph.metadata["imported"]["unknown"]) <= set(again.metadata["imported"]["unknown"])
    assert main(["show", str(path)]) == 0
    assert "texts of tokens" in capsys.readouterr().out


def test_reading_needs_no_torch(write) -> None:
    code = (
        "import sys; from circuits import CircuitGraph; CircuitGraph.load(sys.argv[1]); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(write(published()))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"


@settings(max_examples=50)
@given(st.data())
def test_strided_tensors_are_read(tmp_path_factory, data) -> None:
    """Any dtype, transposed, sliced or empty: the numbers that torch has."""
    dtype = data.draw(
        st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
    )
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    tensor = (torch.arange(torch.Size(shape).numel() * 2).reshape(2, *shape) % 7).to(dtype)[
        data.draw(st.integers(0, 1))
    ]
    if len(shape) >= 2:
        tensor = tensor.transpose(0, 1)[data.draw(st.integers(0, 2)) :]
    path = tmp_path_factory.mktemp("tensors") / "t.pt"
    torch.save([tensor], path)
    file = tensor_pickle.TensorFile(path)
    np.testing.assert_array_equal(file.array(file.value[0], "t"), tensor.to(torch.float64).numpy())


# Pickles that try to run code ----------------------------------------------------------------------------------------


def archive(path: Path, program: bytes) -> Path:
    """A file as `torch.save` makes it, with `program` in the place of its pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("graph/data.pkl", program)
        file.writestr("graph/byteorder", "little")
    return path


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


TARGET = "ccircuit_tracer.attribution.targets\nLogitTarget\n"
TENSOR = "ctorch._utils\n_rebuild_tensor_v2\n"
CONFIG = "ccircuit_tracer.utils.tl_nnsight_mapping\nUnifiedConfig\n"
PROGRAMS: dict[str, Callable[[str], bytes]] = {
    "reduce": lambda command: pickle.dumps(Call(os.system, command)),
    "protocol 0": lambda command: pickle.dumps(Call(os.system, command), protocol=0),
    "protocol 2": lambda command: pickle.dumps({"cfg": Call(os.system, command)}, protocol=2),
    "nested": lambda command: pickle.dumps({"a": 1, "cfg": [{"x": (1, Call(eval, f"__import__('os').system({command!r})"))}]}),
    "in an ordered dict": lambda command: pickle.dumps(OrderedDict(a=Call(os.system, command))),
    "instance": lambda command: f"(S'{command}'\nios\nsystem\n.".encode(),
    "object": lambda command: f"(cos\nsystem\nS'{command}'\no.".encode(),
    "attribute of an allowed name": lambda command: b"\x80\x04\x8c\x05torch\x8c\x08Size.mro\x93.",
    "getattr": lambda command: b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.",
    "partial state": lambda command: b"cfunctools\npartial\n(cos\nsystem\ntR(cos\nsystem\n(S'x'\nt}NtbN.",
    "build on an object": lambda command: f"{CONFIG})\x81(dS'f'\ncos\nsystem\nsb.".encode("latin-1"),
    "torch load": lambda command: b"ctorch\nload\n(S'x'\ntR.",
    "numpy": lambda command: b"cnumpy.core.multiarray\n_reconstruct\n(tR.",
    "extension": lambda command: b"\x82\x01.",
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys, name: str) -> None:
    witness = tmp_path / "witness"
    path = archive(tmp_path / "graph.pt", PROGRAMS[name](f"touch {witness}"))
    with pytest.raises(
        ValueError, match=r"graph\.pt: circuit-tracer \.pt file: refused or damaged: (it asks for .*, but only|unreg)"
    ):
        CircuitGraph.load(path)
    assert main(["show", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not witness.exists()


def test_the_witness_would_see_it(tmp_path) -> None:
    """The same programs do run where they are let: what the test above watches is what would happen."""
    for name in ("reduce", "protocol 0", "instance", "object", "in an ordered dict", "nested"):
        witness = tmp_path / name.replace(" ", "-")
        pickle.loads(PROGRAMS[name](f"touch {witness}"))
        assert witness.exists(), name


@pytest.mark.parametrize("target", [TARGET, TENSOR, CONFIG, "ccollections\nOrderedDict\n", "ctorch\nfloat32\n"])
@pytest.mark.parametrize("state", ["(dS'__new__'\nN", "(N(dS'__init__'\nNst"])
def test_a_pickle_cannot_change_the_classes_that_stand_in(tmp_path, target: str, state: str) -> None:
    """BUILD with a class on the stack would set its attributes, for every file read later."""
    before = {name: dict(vars(kind)) for name, kind in vars(tensor_pickle).items() if isinstance(kind, type)}
    end = "sb." if state.startswith("(d") else "b."
    with pytest.raises(ValueError, match=r"graph\.pt: circuit-tracer \.pt file: refused or damaged"):
        CircuitGraph.load(archive(tmp_path / "graph.pt", f"{target}{state}{end}".encode()))
    after = {name: dict(vars(kind)) for name, kind in vars(tensor_pickle).items() if isinstance(kind, type)}
    assert before == after


@pytest.mark.parametrize(
    "program", [b"\x80\x02Nr\xff\xff\xff\x03.", b"Np67108863\n.", b"\x8e" + b"\xff" * 5 + b"\0\0\0."]
)
def test_a_pickle_cannot_fill_the_memory(tmp_path, program: bytes) -> None:
    """A memo that would take a gigabyte, and bytes that are not there."""
    path = archive(tmp_path / "graph.pt", program)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        ValueError, match=r"refused or damaged: (it remembers a value as number 67108863|expected 10995)"
    ):
        CircuitGraph.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


def test_names_stand_for_inert_classes_and_texts_alone() -> None:
    """Whatever a pickle can name either is a text, or a class of this file (or dict) that has its state under control."""
    for found in tensor_pickle._NAMES.values():
        if isinstance(found, type):
            assert found is dict or (found.__module__ == tensor_pickle.__name__ and "__setstate__" in vars(found))
        else:
            assert type(found) is str


# Bad files -----------------------------------------------------------------------------------------------------------


def test_damage_is_named(write, tmp_path) -> None:
    content = write(published()).read_bytes()
    path = tmp_path / "cut.pt"
    for length in (4, 30, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.pt: "):
            CircuitGraph.load(path)


@settings(max_examples=200)
@given(st.data())
def test_a_flipped_bit_is_named_or_a_graph(tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("flips") / "graph.pt"
    value = published() | {
        "cfg": OrderedDict(n_layers=LAYERS, d_vocab=VOCABULARY),
        "logit_targets": torch.tensor([6, 7]),
    }
    torch.save(value, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        pickled = file.getinfo("graph/data.pkl")
    start = content.index(b"\x80\x02", pickled.header_offset)
    where = (
        st.integers(start, start + pickled.file_size) if data.draw(st.booleans()) else st.integers(0, len(content) - 1)
    )
    content[data.draw(where)] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        CircuitGraph.load(path)
    except ValueError as error:
        if not str(error).startswith(str(path)):
            raise


def with_weight(target: int, source: int, weight: float) -> dict[str, Any]:
    """A change of one entry of the matrix."""
    matrix = published()["adjacency_matrix"]
    matrix[target, source] = weight
    return {"adjacency_matrix": matrix}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "matrix": ({"adjacency_matrix": torch.zeros(15, 14)}, r"expected adjacency_matrix .* of shape \[15, 15\] \(4 selected"),
    "layers": ({"cfg": OrderedDict(n_layers=3, d_vocab=50)}, r"of shape \[18, 18\] \(4 selected features, 3 layers, 3 tok"),
    "no layers": ({"cfg": OrderedDict(d_vocab=50)}, "expected cfg to say n_layers, a whole number of at least 1, given None"),
    "features": ({"active_features": torch.zeros(5, 2).long()}, r"expected active_features .* of shape \[5, 3\]"),
    "dtype": ({"active_features": torch.zeros(5, 3)}, r"expected active_features to be whole numbers .* given float32\[5, 3\]"),
    "activations": ({"activation_values": torch.zeros(4)}, r"expected activation_values .* of shape \[5\]"),
    "selected": ({"selected_features": torch.tensor([0, 2, 3, 5])}, "expected selected_features among the 5 active ones"),
    "same feature": ({"selected_features": torch.tensor([0, 2, 3, 3])}, "expected unique rows"),
    "probabilities": ({"logit_probabilities": torch.zeros(2)}, "expected probabilities of the logits with a positive sum"),
    "count": ({"logit_probabilities": torch.ones(3)}, r"expected logit_probabilities .* of shape \[2\]"),
    "targets": ({"logit_targets": [" x", " y"]}, "expected logit_targets to be a list of a text and a vocabulary id each"),
    "no tensor": ({"input_tokens": [1, 2, 3]}, "expected input_tokens to be a tensor, given list"),
    "position": ({"active_features": torch.tensor(ACTIVE) + torch.tensor([0, 1, 0])}, "expected positions below 3, given 3"),
    "nan": (with_weight(0, 5, float("nan")), "expected finite numbers, given NaN"),
    "into a token": (with_weight(10, 4, 1.0), "expected edges into expanded nodes only"),
    "cycle": (with_weight(0, 1, 1.0), "expected a graph without cycles"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_wrong_contents_are_refused(write, name: str) -> None:
    changes, message = BAD[name]
    path = write(published() | changes)
    with pytest.raises(ValueError, match=message) as caught:
        CircuitGraph.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_other_archives_are_refused(tmp_path, write) -> None:
    path = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"keys of a graph, but there is no input_string, .* among weight"):
        CircuitGraph.load(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"expected a dictionary with the keys of a graph, but it holds a list"):
        CircuitGraph.load(path)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz: .*expected an archive with data\.pkl, as torch\.save makes it"):
        CircuitGraph.load(tmp_path / "other.npz")
    torch.save(torch.zeros(2), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"other\.pt: expected a circuit file"):
        CircuitGraph.load(path)
    squeezed = tmp_path / "squeezed.pt"
    with zipfile.ZipFile(write(published())) as whole, zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as file:
        for name in whole.namelist():
            file.writestr(name, whole.read(name))
    with pytest.raises(ValueError, match=r"squeezed\.pt: .*without compression, as torch\.save writes it"):
        CircuitGraph.load(squeezed)
