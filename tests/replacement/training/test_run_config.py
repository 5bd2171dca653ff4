"""Settings: what a file says is what the run does, and every mistake is one clear error."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_runs
from hypothesis import given
from hypothesis import strategies as st

from replacement import checkpoint
from replacement.cli import main
from replacement.crosscoder import activation, topk
from replacement.crosscoder.activation import Activation, JumpReLU
from replacement.crosscoder.topk import BatchTopK, JointTopK, TopK
from replacement.crosscoder.wiring import Wiring
from replacement.data.documents import special_ids
from replacement.training.build import build_crosscoder, build_wiring, load_models, open_tokens
from replacement.training.config import CrosscoderConfig, DataConfig, LanguageModelConfig, RunConfig, TrainingConfig
from replacement.training.dead_features import Auxiliary
from replacement.training.metrics_log import MetricsLog, read_metrics
from replacement.training.model_losses import OutputKL
from replacement.training.penalties import Tanh
from replacement.training.reads import choose_reads
from replacement.training.run_config import ACTIVATIONS, read_config, run_config
from replacement.training.runs import run
from replacement.training.settings import settings_table

TEXT = """
model = "somewhere"
checkpoint_every = 7

[data]
source = ["a.txt", "b.txt"]

[crosscoder]
wiring = "per_layer"
activation = { name = "jumprelu", bandwidth = 1.0 }

[training]
n_tokens = 100_000
learning_rate = 1
losses = [{ name = "tanh", coefficient = 1e-3, c = 2.0 }, { name = "auxiliary" }]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_file_says_everything(file: Path) -> None:
    config = read_config(file)
    assert (config.model, config.checkpoint_every, config.data.source) == ("somewhere", 7, ["a.txt", "b.txt"])
    assert config.crosscoder.activation == JumpReLU(bandwidth=1.0)
    assert config.training.losses == [Tanh(1e-3, c=2.0), Auxiliary()]
    assert config.training.learning_rate == 1.0


def test_overrides_are_toml_or_text(file: Path) -> None:
    changes = [
        "training.n_tokens=8_192",
        "model=other/name",
        'crosscoder.activation={name="topk", k=[3, 4]}',
        "crosscoder.tied=true",
    ]
    config = read_config(file, overrides=changes)
    assert (config.training.n_tokens, config.model, config.crosscoder.tied) == (8192, "other/name", True)
    assert config.crosscoder.activation == TopK((3, 4))


def test_settings_survive_json(file: Path) -> None:
    config = read_config(file)
    assert run_config(json.loads(json.dumps(config.to_dict()))) == config


@given(
    n_tokens=st.integers(4096, 10**12),
    k=st.integers(1, 99),
    seed=st.integers(0, 2**31),
    clip=st.floats(1e-6, 1e6),
    reads=st.sampled_from(["clean", "propagated", "subset"]),
)
def test_any_settings_survive_json(n_tokens: int, k: int, seed: int, clip: float, reads: str) -> None:
    training = {"n_tokens": n_tokens, "seed": seed, "gradient_clip": clip, "reads": reads}
    config = run_config({"training": training, "crosscoder": {"activation": {"name": "batchtopk", "k": k}}})
    assert config.crosscoder.activation == BatchTopK(k)
    assert run_config(json.loads(json.dumps(config.to_dict()))) == config


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "crosscoder": CrosscoderConfig,
    "training": TrainingConfig,
    "language_model": LanguageModelConfig,
}


def defaults(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names and default values of a dataclass of settings and its sections."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        section = SECTIONS.get(field.name)
        if section is not None:
            values |= defaults(section, f"{field.name}.")
        elif field.default_factory is not dataclasses.MISSING:
            values[prefix + field.name] = field.default_factory()
        else:
            values[prefix + field.name] = field.default
    return values


def test_the_table_of_settings_is_that_of_the_dataclasses() -> None:
    """Thirty-two of a crosscoder and seven of a language model, each with its default, a unit and a line of explanation."""
    names = {"TopK": TopK, "Auxiliary": Auxiliary, "auto": None, "needed": dataclasses.MISSING, "true": True}
    shown = {setting.name: eval(setting.default, {**names, "false": False}) for setting in settings_table()}
    assert shown == defaults(RunConfig)
    of_language_model = [name for name in shown if name.startswith("language_model.")]
    assert (len(shown) - len(of_language_model), len(of_language_model)) == (32, 7)
    for setting in settings_table():
        assert setting.unit
        assert 10 < len(setting.meaning) < 200, setting


def test_help_shows_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    words = capsys.readouterr().out.split()
    assert {setting.name for setting in settings_table()} <= set(words)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.lerning_rate=1"],
            "unknown setting lerning_rate: expected some of model, checkpoint_every, data.source,",
        ),
        (["training.n_tokens=many"], "training.n_tokens must be a whole number, got 'many'"),
        (["training.n_tokens=0"], "n_tokens must be 1 or more, got 0"),
        (["model.size=3"], "model is not a section of the settings, so model.size cannot be set"),
        (["n_tokens"], "expected key=value, such as training.n_tokens=1_000_000; got 'n_tokens'"),
        (["checkpoint_every=0"], "checkpoint_every must be 1 or more, got 0"),
        (["data.context=1"], "context must be 2 or more tokens, got 1"),
        (["crosscoder.n_features=0"], "n_features must be 1 or more, got 0"),
        (['crosscoder.activation={name="gelu"}'], "unknown activation 'gelu'"),
        (['training.losses=[{name="l0"}]'], "unknown loss 'l0': expected one of l1, l2, tanh"),
        (['training.losses=[{name="l1"}]'], "the loss l1 has the parameters ['coefficient'], needs ['coefficient']"),
        (
            ['training.losses=[{name="l1", coefficient=-1.0}]'],
            "the coefficient of l1 must be 0 or more and finite, got -1.0",
        ),
        (['training.losses=[{name="auxiliary", k=0}]'], "the auxiliary k must be 1 or more, got 0"),
        (
            ['training.losses=[{name="l1", coefficient=1}, {name="auxiliary"}, {name="l1", coefficient=2}]'],
            "losses names l1 2 times: expected each loss at most once",
        ),
        (['crosscoder.layers="01"'], "crosscoder.layers must be a list of whole numbers, got '01'"),
        (["crosscoder.layers=[]"], "layers must name one layer or more, counted from 0; got []"),
        (["crosscoder.layers=[0, -1]"], "layers must name one layer or more, counted from 0; got [0, -1]"),
        (["crosscoder.undecomposed_positions=-1"], "undecomposed_positions must be 0 or more, got -1"),
        (["training.seed=true"], "training.seed must be a whole number, got True"),
        (["training.seed=-1"], "seed must be 0 or more, got -1"),
        (["training.gradient_clip=true"], "training.gradient_clip must be a number, got True"),
        (["training.n_tokens=inf"], "training.n_tokens must be a whole number, got inf"),
        ([f"training.n_tokens={10**400}"], "training.n_tokens must be a whole number, got 1000"),
        ([f"training.learning_rate={10**400}"], "training.learning_rate must be a number, got 1000"),
        (["training.learning_rate=inf"], "learning_rate must be above 0 and finite, got inf"),
        (["training.gradient_clip=nan"], "gradient_clip must be above 0 and finite, got nan"),
        (["training=3"], "training must be a table of settings, got 3"),
        (["data.source=3"], "data.source must be text, or a list of texts, got 3"),
        (
            ['training.losses=[{name="l1", coefficient=inf}]'],
            "the coefficient of l1 must be 0 or more and finite, got inf",
        ),
        (['training.losses=[{name="tanh", coefficient=1, c=nan}]'], "the tanh c must be above 0 and finite, got nan"),
    ],
)
def test_mistakes_are_named(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(file, overrides=overrides)


@pytest.mark.parametrize(
    "override",
    [
        "training.n_tokens=x{}",
        "x{}",
        "training.losses=x{}",
        'crosscoder.activation={{name="x{}"}}',
        "x{}=1",
    ],
)
def test_long_inputs_are_not_shown_whole(file: Path, override: str) -> None:
    with pytest.raises(ValueError, match=r"expected|must be") as caught:
        read_config(file, overrides=[override.format("1" * 5000)])
    assert len(str(caught.value)) < 1000 + len(str(file))


NUMBER_OR_LIST = "a whole number, or a list of whole numbers"


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("topk", "crosscoder.activation must be a table such as { name = \"topk\", ... }, got 'topk'"),
        (
            {"k": 3},
            "unknown activation None: expected one of topk, batchtopk, jumprelu, relu as the name in crosscoder.",
        ),
        ({"name": ["topk"]}, "unknown activation ['topk']: expected one of"),
        ({"name": "topk", "n": 8}, "the activation topk has the parameters ['k'], needs ['k']; got ['n']"),
        ({"name": "topk", "k": "8"}, f"crosscoder.activation.k of topk must be {NUMBER_OR_LIST}, got '8'"),
        ({"name": "topk", "k": []}, f"crosscoder.activation.k of topk must be {NUMBER_OR_LIST}, got []"),
        ({"name": "topk", "k": [3, "4"]}, f"crosscoder.activation.k of topk must be {NUMBER_OR_LIST}, got [3, '4']"),
        ({"name": "topk", "k": True}, f"crosscoder.activation.k of topk must be {NUMBER_OR_LIST}, got True"),
        (
            {"name": "batchtopk", "k": ["3"]},
            f"crosscoder.activation.k of batchtopk must be {NUMBER_OR_LIST}, got ['3']",
        ),
        (
            {"name": "jumprelu", "bandwidth": "x"},
            "crosscoder.activation.bandwidth of jumprelu must be a number, got 'x'",
        ),
    ],
)
def test_mistakes_in_the_activation_are_named(activation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run_config({"training": {"n_tokens": 4096}, "crosscoder": {"activation": activation}})


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ("l1", "training.losses must be a list of tables such as [{ name = \"l1\", coefficient = 1e-3 }], got 'l1'"),
        ({"name": "l1", "coefficient": 1.0}, "training.losses must be a list of tables such as"),
        (["l1"], "training.losses must be a table such as { name = \"l1\", ... }, got 'l1'"),
        ([{"name": "l1", "coefficient": "x"}], "training.losses.coefficient of l1 must be a number, got 'x'"),
        ([{"name": "l1", "coefficient": True}], "training.losses.coefficient of l1 must be a number, got True"),
        ([{"name": "auxiliary", "k": 1.5}], "training.losses.k of auxiliary must be a whole number, got 1.5"),
        (
            [{"name": "tanh", "coefficient": 1, "d": 2}],
            "the loss tanh has the parameters ['coefficient', 'c'], needs ['coefficient']; got ['coefficient', 'd']",
        ),
        ([{"name": "jacobian", "coefficient": 1, "maps": {}}], "the loss jacobian has the parameters ['coefficient'],"),
    ],
)
def test_mistakes_in_the_losses_are_named(losses: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run_config({"training": {"n_tokens": 4096, "losses": losses}})


def test_every_activation_and_loss_can_be_written_in_a_file() -> None:
    """Whole numbers stand for floats of their value, lists for tuples."""
    defined = (vars(activation) | vars(topk)).values()
    own = [kind for kind in defined if isinstance(kind, type) and issubclass(kind, Activation)]
    named = {kind.name: kind for kind in own if "name" in vars(kind)}
    assert named == ACTIVATIONS | {"jointtopk": JointTopK}  # which is read alone
    config = run_config(
        {
            "training": {"n_tokens": 4096, "losses": [{"name": "tanh", "coefficient": 1, "c": 2}]},
            "crosscoder": {"activation": {"name": "jumprelu", "threshold": 1}},
        }
    )
    assert config.training.losses == [Tanh(1.0, c=2.0)]
    assert config.crosscoder.activation == JumpReLU(threshold=1.0)
    assert isinstance(config.crosscoder.activation.threshold, float)


def test_files_that_are_no_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist: expected a TOML file"):
        read_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("a = [", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.toml is not TOML"):
        read_config(broken)
    broken.write_text("model = 'x'", encoding="utf-8")
    with pytest.raises(ValueError, match="the setting training is missing"):
        read_config(broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wiring": "clt"}, "unknown wiring 'clt': expected one of autoencoder, transcoder, per_layer"),
        ({"layers": [0]}, "the wiring strictly_causal covers every layer; layers=[0] does not apply"),
        ({"wiring": "transcoder", "layers": [0, 1]}, "the wiring transcoder takes one layer, got [0, 1]"),
        ({"wiring": "autoencoder", "layers": [9]}, "layer 9 does not exist: the model has layers 0 to 2"),
        ({"wiring": "autoencoder", "read": "resid_high"}, "unknown site kind 'resid_high'"),
        ({"read": "mlp_out"}, "a transcoder reads one of resid_mid, resid_pre, mlp_in, mlp_normalized; got 'mlp_out'"),
        ({"wiring": "model_diffing"}, 'model diffing needs two models or more: model = ["first", "second"]'),
    ],
)
def test_crosscoders_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str, model_folder: Callable[[str], Path]
) -> None:
    models = load_models(str(model_folder("gpt2")))
    with pytest.raises(ValueError, match=re.escape(message)):
        build_crosscoder(CrosscoderConfig(**options), models, torch.ones(2, 4, dtype=torch.int64), seed=0)


def test_models_that_cannot_be_compared_are_refused(model_folder: Callable[[str], Path]) -> None:
    folders = [str(model_folder(name)) for name in ("gpt2", "gemma2")]
    with pytest.raises(ValueError, match="expected one model, or several for model diffing; got none"):
        load_models([])
    with pytest.raises(ValueError, match=re.escape(f"the model {folders[0]}/. is named twice")):
        load_models([f"{folders[0]}/.", *folders])
    two = load_models(folders)
    with pytest.raises(ValueError, match="the wiring strictly_causal takes one model, 2 were given"):
        build_crosscoder(CrosscoderConfig(), two, torch.ones(2, 4, dtype=torch.int64), seed=0)


def test_one_special_token_for_everything_is_special(model_folder: Callable[[str], Path]) -> None:
    """As GPT-2's, whose unknown token begins and ends texts as well."""
    lm = load_models(str(model_folder("gpt2"))).first
    lm.tokenizer.eos_token = "w1"
    assert special_ids(lm) == {1, 2}, "w0 is the unknown word"
    lm.tokenizer.bos_token = lm.tokenizer.eos_token = lm.tokenizer.unk_token
    assert 0 in special_ids(lm)


def test_a_mistake_does_not_take_the_folder(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    tokens = training_runs.write_tokens(tmp_path / "tokens.npy")
    value = training_runs.settings(model_folder("gpt2"), tokens, n_steps=2)
    wrong = value | {"data": value["data"] | {"source": str(tmp_path / "missing.npy")}}
    with pytest.raises(ValueError, match="missing"):
        run(run_config(wrong), tmp_path / "run")
    run(run_config(value), tmp_path / "run")
    assert (tmp_path / "run" / "crosscoder").is_dir()


def test_every_family_is_built_by_name(model_folder: Callable[[str], Path]) -> None:
    shape = load_models(str(model_folder("gpt2"))).first.shape
    expected = {
        "autoencoder": Wiring.autoencoder(shape),
        "transcoder": Wiring.transcoder(shape, layer=1),
        "per_layer": Wiring.per_layer(shape),
        "strictly_causal": Wiring.strictly_causal(shape),
        "weakly_causal": Wiring.weakly_causal(shape),
        "acausal": Wiring.acausal(shape),
        "model_diffing": Wiring.model_diffing([shape, shape], layer=1),
    }
    for name, wiring in expected.items():
        shapes = [shape] * wiring.n_models
        assert build_wiring(CrosscoderConfig(wiring=name), shapes) == wiring


@pytest.mark.parametrize(
    ("wiring", "given", "expected"),
    [
        ("strictly_causal", None, "subset"),
        ("per_layer", None, "subset"),
        ("autoencoder", None, "clean"),
        ("transcoder", None, "clean"),
        ("acausal", None, "clean"),
        ("strictly_causal", "clean", "clean"),
        ("autoencoder", "propagated", "propagated"),
    ],
)
def test_what_is_read_while_training_suits_the_wiring(
    wiring: str, given: str | None, expected: str, model_folder: Callable[[str], Path]
) -> None:
    models = load_models(str(model_folder("gpt2")))
    crosscoder = build_crosscoder(CrosscoderConfig(wiring=wiring), models, torch.ones(1, 4, dtype=torch.int64), seed=0)
    assert choose_reads(TrainingConfig(n_tokens=4096, reads=given), crosscoder.wiring, models) == expected


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"reads": "subset"}, "reads='subset' needs a causal crosscoder of one model, not one with the wiring acausal"),
        ({"reads": "clean", "losses": [OutputKL(1.0)]}, "the loss output_kl needs a causal crosscoder of one model"),
        (
            {"losses": [OutputKL(1.0)]},
            "the loss output_kl needs a causal crosscoder of one model, not one with the wiring",
        ),
    ],
)
def test_splices_that_are_impossible_are_refused(
    training: dict[str, Any], message: str, model_folder: Callable[[str], Path]
) -> None:
    models = load_models(str(model_folder("gpt2")))
    tokens_RT = torch.ones(1, 4, dtype=torch.int64)
    crosscoder = build_crosscoder(CrosscoderConfig(wiring="acausal"), models, tokens_RT, seed=0)
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_reads(TrainingConfig(n_tokens=4096, **training), crosscoder.wiring, models)


def test_position_0_is_not_decomposed_where_it_is_special(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The first token of every row is special, so it has an error term; the user may decide otherwise."""
    models = load_models(str(model_folder("gpt2")))
    rows_RT = open_tokens(
        DataConfig(source=str(training_runs.write_tokens(tmp_path / "t.npy")), held_out_rows=4), models
    ).held_out()
    assert 1 in special_ids(models.first)
    undecomposed = [
        build_crosscoder(CrosscoderConfig(undecomposed_positions=given), models, tokens_RT, seed=0)
        for given, tokens_RT in ((None, rows_RT), (None, rows_RT + 2), (0, rows_RT))
    ]
    assert [crosscoder.undecomposed_positions for crosscoder in undecomposed] == [1, 0, 0]


def test_a_clt_for_any_local_folder_trains_with_one_command(
    model_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a Llama in Hugging Face layout and a text file to a checkpoint that loads."""
    text = tmp_path / "corpus.txt"
    words = np.random.default_rng(0).integers(3, 97, 6000)
    text.write_text(" ".join(f"w{word}" for word in words), encoding="utf-8")
    settings = tmp_path / "clt.toml"
    settings.write_text(
        f"""
model = "{model_folder("llama")}"
[data]
source = "{text}"
held_out_rows = 8
buffer_tokens = 2048
[training]
n_tokens = 20_000
batch_tokens = 256
""",
        encoding="utf-8",
    )
    assert main(["train", str(settings), "--out", str(tmp_path / "run"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    crosscoder = checkpoint.load(tmp_path / "run" / "crosscoder")
    assert crosscoder.wiring.name == "strictly_causal"
    assert crosscoder.n_features == 16 * 32
    first, last = (read_metrics(tmp_path / "run", kind="train")[place] for place in (0, -1))
    assert last["loss"] < 0.9 * first["loss"]
    assert facts["cross_entropy_original"] > 0
    assert facts["step"] == 20_000 // 256


def test_the_cache_gives_the_same_training(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """In bfloat16, so up to its rounding; the second run finds it built."""
    tokens = training_runs.write_tokens(tmp_path / "tokens.npy")
    value = training_runs.settings(model_folder("gpt2"), tokens, n_steps=20)
    with pytest.raises(ValueError, match=r"data\.cache serves training on shuffled clean activations"):
        run(run_config(value | {"data": value["data"] | {"cache": str(tmp_path / "cache")}}), tmp_path / "refused")
    value["training"]["reads"] = "clean"
    cached = value | {"data": value["data"] | {"cache": str(tmp_path / "cache")}}
    losses = []
    for name, settings in (("direct", value), ("built", cached), ("found", cached)):
        run(run_config(settings), tmp_path / name)
        losses.append([record["loss"] for record in read_metrics(tmp_path / name, kind="train")])
    assert losses[1] == losses[2]
    assert losses[1] == pytest.approx(losses[0], rel=3e-2)


def test_metrics_hold_what_the_docs_say(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    tokens = training_runs.write_tokens(tmp_path / "tokens.npy")
    run(run_config(training_runs.settings(model_folder("gpt2"), tokens, n_steps=10)), tmp_path / "run")
    train, held_out = (read_metrics(tmp_path / "run", kind=kind)[-1] for kind in ("train", "held_out"))
    assert {"unexplained", "l0", "l0_total", "dead_fraction", "learning_rate", "tokens_per_second"} <= train.keys()
    assert {"cross_entropy_recovered", "kl", "agreement_all", "unexplained", "l0"} <= held_out.keys()
    assert list(train["unexplained"]) == ["mlp_out.0", "mlp_out.1", "mlp_out.2"]
    assert train["l0_total"] == pytest.approx(12)
    assert train["tokens"] == 1280


def test_loggers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown logger 'mlflow': expected one of tensorboard, wandb"):
        MetricsLog(tmp_path, loggers=["mlflow"])
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match="the logger wandb needs a package that is not installed: pip install wandb"):
        MetricsLog(tmp_path, loggers=["wandb"])


def test_weights_and_biases_without_a_login_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package's own check where it is installed; nothing is asked of any server before it."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # nobody to ask for a key
    message = r"Weights & Biases does not start: No API key configured.*WANDB_MODE=offline needs no login"
    with pytest.raises(ValueError, match=message):
        MetricsLog(tmp_path, loggers=["wandb"])
    wandb.teardown()


def test_a_half_written_line_is_dropped_on_resume(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"kind": "tr', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: line 4 is no record of a run"):
        read_metrics(tmp_path)
    MetricsLog(tmp_path, last_step=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    with pytest.raises(ValueError, match="is not the folder of a training run"):
        read_metrics(tmp_path / "nowhere")


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[1]", b'{"kind": "train"}', b'{"step": 2}', b"{"])
def test_a_damaged_line_between_others_is_named(tmp_path: Path, line: bytes) -> None:
    """Records after it would be lost without a word."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n' + line + b'\n{"kind": "train", "step": 3}\n')
    before = path.read_bytes()
    for use in (read_metrics, lambda folder: MetricsLog(folder, last_step=3)):
        with pytest.raises(
            ValueError, match=r"metrics\.jsonl is damaged: line 2 is no record of a run; delete the line"
        ):
            use(tmp_path)
    assert path.read_bytes() == before


def test_defaults_need_only_a_budget() -> None:
    config = run_config({"training": {"n_tokens": 1_000_000}})
    assert isinstance(config, RunConfig)
    assert config.model == config.data.source == "demo"
    assert config.training.peak_learning_rate(2500) == pytest.approx(0.002)
