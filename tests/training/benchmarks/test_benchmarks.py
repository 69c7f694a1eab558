"""The benchmarks: what they count and compare, on numbers known beforehand, and a tiny run. No test asserts a time."""

import json
import os
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from modeling_dca import DCAForCausalLM
from modeling_dca.grn import ALL_GRN_FUNCTIONS
from tests.training.tiny import call, failure, snapshot
from training.benchmarks import operation, run
from training.benchmarks.measure import PEAK_RESET, kept_bytes, peak_bytes
from training.benchmarks.models import MEASURES, NEW_TOKENS, PROMPT_TOKENS, PUBLISHED, SCHEMES, Candidate, build_models
from training.benchmarks.operation import COPY, Operation, bandwidth_shares, measure_operation, pass_bytes
from training.benchmarks.run import compare_with_published, main
from training.support.timing import interleave, seconds, summarize


CPU = torch.device("cpu")
TINY = "--layers 2 --hidden 64 --seq 8 --batch 1 --vocab 50 --rounds 3 --warmup 1"
MODELS = ["Llama", "standard", "2-DCA", "full DCA"]


class PublishedStandIn(nn.Module):
    """Takes what the published model takes."""

    def __init__(self, num_tokens, dim, depth, past_layers_k, dim_head, heads, ff_expansion_factor):
        super().__init__()
        assert (depth, past_layers_k, dim_head * heads, ff_expansion_factor) == (2, 2, dim, 6)
        self.layers = nn.Sequential(nn.Embedding(num_tokens, dim), nn.Linear(dim, num_tokens))

    def forward(self, ids):
        return self.layers(ids)


@pytest.fixture
def published(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_cross_attention", SimpleNamespace(DCAGPT=PublishedStandIn))


@pytest.fixture
def not_published(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_cross_attention", None)


@pytest.fixture
def small_copy(monkeypatch):
    monkeypatch.setattr(operation, "COPY_BYTES", 2**16)


@pytest.fixture
def folder(tmp_path, monkeypatch, small_copy):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_subjects_take_turns_and_warmup_does_not_count():
    calls = []

    def meter(subject):
        calls.append(subject)
        return len(calls)

    assert interleave("", {"a": "A", "b": "B"}, meter, rounds=2, warmup=1) == {"a": [3, 5], "b": [4, 6]}
    assert calls == ["A", "B"] * 3


def test_ratios_are_to_the_baseline_of_the_same_round():
    values = {"base": [2.0, 4.0, 6.0], "other": [4.0, 5.0, 4.0]}
    speed = summarize(values, "base", speed=True)
    assert speed["other"] == {
        "values": [4.0, 5.0, 4.0],
        "median": 4.0,
        "ratios": [0.5, 0.8, 1.5],
        "ratio": 0.8,
        "spread": [0.5, 1.5],
    }
    assert speed["base"]["ratios"] == [1, 1, 1]
    assert summarize(values, "base", speed=False)["other"]["ratios"] == [2, 1.25, 4 / 6]


def test_speed_is_compared_with_the_published_model():
    times = {"Llama": [1.0, 1.0], "2-DCA": [2.0, 2.0], "full DCA": [3.0, 4.0], PUBLISHED: [3.0, 5.0]}
    assert compare_with_published(summarize(times, "Llama", speed=True)) == [
        f"Llama trains at 4.00 x the speed of {PUBLISHED} (3.00 to 5.00).",
        f"2-DCA trains at 2.00 x the speed of {PUBLISHED} (1.50 to 2.50).",
        f"full DCA trains at 1.12 x the speed of {PUBLISHED} (1.00 to 1.25).",
    ]


def test_seconds_are_those_of_the_clock(monkeypatch):
    monkeypatch.setattr("time.perf_counter", iter([10.0, 12.5]).__next__)
    assert seconds(lambda: None, CPU) == 2.5


def test_share_of_the_copy_bandwidth():
    # Four entries of 10 bytes and three outputs: read 4, write 3; read 4 and the 3 gradients, write 4.
    assert pass_bytes(4, 10) == {"forward": 70, "backward": 110}
    # 70 bytes in 2 s, next to 200 bytes in 4 s, then in 2 s.
    assert bandwidth_shares(70, [2, 2], 200, [4, 2]) == [0.7, 0.35]


def test_kept_bytes_count_each_storage_once_and_no_parameter():
    linear, scale = nn.Linear(4, 3, bias=False), nn.Parameter(torch.ones(3))

    def forward():
        exp = linear(inputs).exp()  # keeps the inputs and the result
        return (exp.view(3, 2).sin().sum(), exp * scale)  # keep the same result, through a view too, and the parameter

    inputs = torch.ones(2, 4)
    assert kept_bytes(forward, [*linear.parameters(), scale]) == 4 * (2 * 4 + 2 * 3)
    with torch.no_grad():
        assert kept_bytes(forward, []) == 0


@pytest.mark.skipif(not os.access(PEAK_RESET, os.W_OK), reason="only Linux has it")
@pytest.mark.parametrize("layers", [12, 24])
def test_dca_keeps_at_most_a_quarter_more_than_llama(not_published, layers):
    models = build_models(vocab=50, hidden=64, layers=layers, dtype=torch.float32)
    input_ids = torch.zeros(2, 64, dtype=torch.long)
    kept = {name: MEASURES["kept_bytes"].meter(Candidate(model, input_ids)) for name, model in models.items()}
    assert kept["standard"] <= kept["Llama"]
    assert kept["2-DCA"] <= 1.25 * kept["Llama"] and kept["full DCA"] <= 1.25 * kept["Llama"]


def test_peak_is_what_is_taken_at_once():
    def run():
        for _ in range(3):
            torch.ones(2**24)  # 64 MiB, given back each time

    run()
    assert 60 * 2**20 < peak_bytes(run, CPU) < 100 * 2**20


def test_models_have_one_shape_and_dca_is_not_at_its_start(not_published):
    models = build_models(vocab=50, hidden=64, layers=2, dtype=torch.bfloat16)
    assert list(models) == MODELS
    sizes = {name: model.num_parameters() for name, model in models.items()}
    assert sizes["Llama"] == sizes["standard"] < sizes["2-DCA"] <= sizes["full DCA"]
    assert {parameter.dtype for model in models.values() for parameter in model.parameters()} == {torch.bfloat16}
    residual = models["full DCA"].model.layers[1].residual
    assert isinstance(models["full DCA"], DCAForCausalLM)
    assert residual.delta.count_nonzero() == residual.delta.numel() and residual.gate.count_nonzero()


def test_other_schemes_are_measured_too(folder, not_published, capsys):
    names = ["mhc", "denseformer", "resformer"]
    call(main, *TINY.split(), "--only", "training_step", "kept_bytes", "--variants", *names)
    output_dir = folder / "runs" / "benchmarks" / "cpu-2x64-1x8-float32-variants"
    results = json.loads((output_dir / "results.json").read_text())
    for measure in ("training_step", "kept_bytes"):
        assert list(results["measures"][measure]["models"]) == MODELS + names
    sizes = results["parameters"]
    assert sizes["standard"] < sizes["resformer"] < sizes["denseformer"] + 10 < sizes["mhc"]
    tables = (output_dir / "README.md").read_text()
    assert f"| {sizes['mhc']:,} " in tables.replace("  ", " ") and "in plain PyTorch" in tables
    assert "did you mean 'mudd'?" in failure(capsys, main, *TINY.split(), "--variants", "mud")


@pytest.mark.parametrize("name", SCHEMES)
def test_other_schemes_have_one_graph(not_published, name):
    """As the benchmark compiles them."""
    torch._dynamo.reset()  # the models share code, whose versions are counted
    model = build_models(vocab=50, hidden=64, layers=2, dtype=torch.float32, names=[], variants=[name])[name]
    candidate = Candidate(model, torch.arange(6).reshape(2, 3), compile=True, backend="eager")
    torch.testing.assert_close(candidate.loss(candidate.compiled), candidate.loss(candidate.model))
    candidate.training_step()


def test_candidate_trains_and_decodes(not_published):
    model = build_models(vocab=50, hidden=64, layers=2, dtype=torch.float32)["2-DCA"]
    candidate = Candidate(model, torch.arange(6).reshape(2, 3))
    before = model.lm_head.weight.clone()
    assert candidate.decode().shape == (1, PROMPT_TOKENS + NEW_TOKENS)
    candidate.training_step()
    assert not torch.equal(model.lm_head.weight, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_implementation_that_does_not_run_is_skipped(monkeypatch, small_copy):
    def broken(stack, delta, gate):
        raise RuntimeError("no such\ndevice")

    monkeypatch.setitem(ALL_GRN_FUNCTIONS, "broken", broken)
    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)  # takes long
    results, notes = measure_operation(Operation(3, (1, 4, 8), torch.float32, CPU), "test", rounds=2, warmup=1)
    assert "'broken' does not run here (RuntimeError: no such device)." in notes
    assert results["entries"] == 3
    for direction, entries in (("forward", 6), ("backward", 9)):
        measured = results[direction]["implementations"]
        assert {COPY, "eager"} <= measured.keys() and "broken" not in measured
        assert results[direction]["bytes"] == entries * 4 * 8 * 4
        assert measured[COPY]["shares"] == [1, 1]


def test_tiny_run(folder, published, capsys):
    call(main, *TINY.split())
    output_dir = folder / "runs" / "benchmarks" / "cpu-2x64-1x8-float32"
    results = json.loads((output_dir / "results.json").read_text())
    measures = ["training_step", "prefill", "decoding", "kept_bytes"]
    assert list(results["measures"]) == measures + ["peak_memory"] * os.access(PEAK_RESET, os.W_OK)
    assert results["command"] == f"python -m training.benchmarks.run {TINY}"
    assert results["machine"]["torch"] == torch.__version__ and results["machine"]["CPU"]
    assert results["parameters"].keys() == {*MODELS, PUBLISHED}
    for name, measure in results["measures"].items():
        assert list(measure["models"]) == MODELS + [PUBLISHED] * (name != "decoding")
        for model in measure["models"].values():
            assert len(model["values"]) == len(model["ratios"]) == (1 if name == "kept_bytes" else 3)
            assert model["median"] == median(model["values"]) and model["ratio"] == median(model["ratios"])
            assert min(model["values"]) > 0
    kept = results["measures"]["kept_bytes"]["models"]
    assert kept["Llama"]["median"] > 0 and kept["Llama"]["ratio"] == 1
    assert results["operation"].keys() == {"full DCA", "2-DCA"}
    assert {COPY, "eager", "eager, compiled"} <= results["operation"]["2-DCA"]["forward"]["implementations"].keys()

    terminal, tables = capsys.readouterr().out, (output_dir / "README.md").read_text()
    for text in ("training step (speed)", "full DCA, 2 entries", "trains at", "feed-forward modules without a gate"):
        assert text in terminal and text in tables
    assert tables.startswith("# 2 layers x 64, 1 x 8 tokens, float32, cpu\n")
    assert Image.open(output_dir / "results.png").size[0] > 500


def test_only_some_measures_without_the_published_model(folder, not_published, capsys):
    call(main, *TINY.split(), "--only", "kept_bytes", "--output_dir", "results")
    results = json.loads(Path("results/results.json").read_text())
    assert list(results["measures"]) == ["kept_bytes"] and not results["operation"]
    assert PUBLISHED not in results["parameters"]
    assert "pip install deep-cross-attention" in capsys.readouterr().out

    before = snapshot(folder)
    arguments = [*TINY.split(), "--only", "prefill", "--output_dir", "results"]
    assert failure(capsys, main, *arguments) == (
        "error: `output_dir` is 'results', which holds results: choose another, or pass --overwrite to replace them."
    )
    assert snapshot(folder) == before
    call(main, *arguments, "--overwrite")
    assert list(json.loads(Path("results/results.json").read_text())["measures"]) == ["prefill"]


def test_no_peak_memory_where_the_system_does_not_tell(folder, not_published, monkeypatch, capsys):
    monkeypatch.setattr(run, "PEAK_RESET", folder / "missing")
    assert failure(capsys, main, "--only", "peak_memory") == (
        f"error: `only` names 'peak_memory', which on the CPU needs Linux ({folder / 'missing'}): leave it out."
    )
    assert "peak_memory" not in run.BenchmarkArguments().only
    assert run.BenchmarkArguments(compile=True).only[:2] == ["compile_time", "training_step"]


@pytest.mark.slow
def test_compiled_run(folder, not_published):
    call(
        main,
        *TINY.split(),
        "--compile",
        "--only",
        "compile_time",
        "training_step",
        "prefill",
        "--output_dir",
        "results",
    )
    results = json.loads(Path("results/results.json").read_text())
    compile_time = results["measures"]["compile_time"]["models"]
    assert list(compile_time) == [*MODELS, "Llama, last"]
    assert all(len(model["values"]) == 1 and model["median"] > 0 for model in compile_time.values())


def test_residuals_are_computed_as_named(folder):
    models = build_models(16, 64, 1, torch.float32, grn_implementation="eager")
    assert {models[name].config.grn_implementation for name in ("standard", "2-DCA", "full DCA")} == {"eager"}
    assert run.BenchmarkArguments(grn_implementation="eager").output_dir.endswith("-eager")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--layers 0", "`layers` is 0; it must be at least 1."),
        ("--rounds 0", "`rounds` is 0; it must be at least 1."),
        ("--hidden 100", "`hidden` is 100; it must be a multiple of 64, the width of a head."),
        ("--dtype float64", "Argument --dtype: invalid choice: 'float64'"),
        ("--layers many", "Argument --layers: invalid int value: 'many'"),
        ("--layer 2", "Unrecognized arguments: --layer 2"),
        ("--only prefil", "`only` names 'prefil'; did you mean 'prefill'?"),
        ("--only compile_time", "`only` names 'compile_time' without `compile`: pass --compile, too."),
        ("--output_dir file", "`output_dir` is 'file', which cannot be created (File exists): choose another folder."),
        ("--grn_implementation egaer", "`grn_implementation` is 'egaer'; did you mean 'eager'?"),
        ("--device cuda", "`device` is 'cuda', but PyTorch finds no GPU here: pass --device cpu."),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (folder / "file").write_text("")
    assert failure(capsys, main, *arguments.split()).startswith(f"error: {message}")
    assert [path.name for path in folder.iterdir()] == ["file"]
