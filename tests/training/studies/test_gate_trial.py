"""The trial of the gate's forms: models side by side are the models that they stand for, each trained for itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_dca import DCAConfig, DCAForCausalLM
from tests.training.tiny import call, failure
from training import gate_trial as command
from training.studies import gate_trial
from training.variants.registry import VARIANTS


VOCABULARY, WIDTH = 50, 64


def parameters_of(variant, std=0.05):
    parameters = gate_trial.initial_parameters(WIDTH, VOCABULARY, variant, [1, 2], "cpu")
    for name, values in parameters.items():
        if "residual" in name:
            torch.nn.init.normal_(values, std=std)
    return parameters


@pytest.mark.parametrize(
    ("name", "model_class", "scheme"),
    [
        ("standard", DCAForCausalLM, "standard"),
        ("normalised, rms", DCAForCausalLM, "dca"),
        ("literal", VARIANTS["raw_gate"].model(DCAForCausalLM), "dca"),
    ],
)
def test_models_side_by_side_are_the_models(name, model_class, scheme):
    torch.manual_seed(0)
    variant = gate_trial.VARIANTS[name]
    parameters = parameters_of(variant)
    input_ids = torch.randint(VOCABULARY, (2, 2, gate_trial.BLOCK))
    losses = gate_trial.losses_of(parameters, input_ids, variant, gate_trial.rotary("cpu"))
    for run in range(2):
        config = DCAConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=gate_trial.LAYERS,
            num_attention_heads=WIDTH // gate_trial.HEAD_DIM,
            residual_scheme=scheme,
        )
        model = model_class(config)
        model.load_state_dict({name: values[run] for name, values in parameters.items()})
        loss = model(input_ids[run], labels=input_ids[run], use_cache=False).loss
        torch.testing.assert_close(losses[run], loss, rtol=1e-5, atol=1e-5)


def test_forms_of_the_gate():
    """The bias inside, against the alteration of that name: with the norm that it has there."""
    torch.manual_seed(0)
    variant = gate_trial.Variant(gate=gate_trial.rms, bias_inside=True)
    parameters = parameters_of(variant, std=0.5)
    model = VARIANTS["bias_inside_gate"].model(DCAForCausalLM)(
        DCAConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=6, num_attention_heads=2)
    )
    model.load_state_dict({name: values[1] for name, values in parameters.items()})
    input_ids = torch.randint(VOCABULARY, (2, 2, gate_trial.BLOCK))
    logits = gate_trial.logits_of(parameters, input_ids, variant, gate_trial.rotary("cpu"))[1]
    torch.testing.assert_close(logits, model(input_ids[1]).logits, rtol=1e-3, atol=1e-3)
    # A norm takes the size from an entry, and the other two its mean, too.
    entry = 7 + 3 * torch.randn(4, 100)
    for norm in (gate_trial.layer_norm, gate_trial.centred_rms):
        torch.testing.assert_close(norm(entry).mean(-1), torch.zeros(4), rtol=0, atol=1e-5)
    for norm in (gate_trial.layer_norm, gate_trial.rms):
        torch.testing.assert_close(norm(entry).square().mean(-1), torch.ones(4))


def test_every_run_has_its_own_optimizer():
    torch.manual_seed(0)
    shapes = {"model.norm.weight": (2, 3), "model.residual.gate": (2, 1, 3), "lm_head.weight": (2, 4, 3)}
    start = {name: torch.randn(shape) for name, shape in shapes.items()}
    optimizer = gate_trial.Optimizer(start, torch.tensor([0.1, 0.01]), gate_rate=0.5)
    singles = []
    for run, rate in enumerate((0.1, 0.01)):
        own = {name: values[run].clone().requires_grad_() for name, values in start.items()}
        groups = [
            {"params": [own["model.norm.weight"]], "weight_decay": 0.0, "lr": rate},
            {"params": [own["model.residual.gate"]], "weight_decay": 0.1, "lr": rate / 2},
            {"params": [own["lm_head.weight"]], "weight_decay": 0.1, "lr": rate},
        ]
        singles.append((own, torch.optim.AdamW(groups, betas=(0.9, 0.98))))
    # (Adam does not see a factor that all gradients share: one of them is so small that it is not clipped.)
    for size in (5, 0.05, 5):
        grads = {name: size * torch.randn(shape) for name, shape in shapes.items()}
        optimizer.step(torch.cat([grad.flatten(1) for grad in grads.values()], dim=1), 1.0)
        for run, (own, single) in enumerate(singles):
            for name, parameter in own.items():
                parameter.grad = grads[name][run].clone()
            torch.nn.utils.clip_grad_norm_(own.values(), 1.0)
            single.step()
    for run, (own, _) in enumerate(singles):
        for name, values in optimizer.parameters(optimizer.flat).items():
            torch.testing.assert_close(values[run], own[name].detach(), rtol=1e-5, atol=1e-6)


def test_schedule():
    factors = [gate_trial.learning_rate_factor(step) for step in range(gate_trial.STEPS)]
    assert factors[0] == 1 / 500 and factors[499] == 1.0 and factors[2099] == 1.0
    assert factors[2100] == 1.0 and factors[2101] < 1.0 and factors[-1] == pytest.approx(1 / 900)


def test_a_trial_from_its_data_to_its_report(tmp_path, monkeypatch):
    for name, value in {"STEPS": 4, "WARMUP": 1, "COOLDOWN": 2, "EVAL_STEPS": 2, "EVAL_BLOCKS": 16}.items():
        monkeypatch.setattr(gate_trial, name, value)
    monkeypatch.setattr(gate_trial, "RATES", {64: (0.003, 0.01)})
    monkeypatch.setattr(gate_trial, "SEEDS", (1, 2))
    generator = np.random.default_rng(0)
    train = generator.integers(0, VOCABULARY, (64, gate_trial.BLOCK), dtype=np.int16)
    data = {"vocab_size": np.array(VOCABULARY), "train": train, "held_out": train[:32]}
    for name in ("standard", "normalised, rms"):
        result = gate_trial.train(name, 64, data, "cpu", compiled=False)
        assert [(run["rate"], run["seed"]) for run in result["runs"]] == [(0.003, 1), (0.003, 2), (0.01, 1), (0.01, 2)]
        assert all(3 < run["loss"] < 5 and [at for at, _ in run["curve"]] == [2, 4] for run in result["runs"])
        assert len({run["loss"] for run in result["runs"]}) == 4
        assert bool(result["gate_size"]) == (name != "standard")
        (tmp_path / f"64-{name}.json").write_text(json.dumps(result))
    lines = gate_trial.report(tmp_path).splitlines()
    assert (
        lines[0] == "## 6 layers x 64"
        and lines[4].startswith("| standard | ")
        and lines[5].startswith("| normalised, rms")
    )
    best = min(np.mean([run["loss"] for run in result["runs"] if run["rate"] == rate]) for rate in (0.003, 0.01))
    assert f"{best:.3f} ±" in lines[5]
    # How sure the difference is, is left beside the results, which can be read again.
    (cell,) = json.loads((tmp_path / "comparison.json").read_text())["differences"]
    assert cell["group"] == "6 x 64" and cell["variant"] == "normalised, rms" and cell["seeds"] == 2
    assert f"| {cell['mean']:+.3f} (" in lines[5] and f"{cell['mean']:+.4f}" in "\n".join(lines)
    assert gate_trial.report(tmp_path).splitlines() == lines


EVIDENCE = Path(__file__).parents[3] / "model_cards" / "evidence" / "gate"


@pytest.mark.parametrize("dark", [False, True])
def test_figure_of_the_results(tmp_path, monkeypatch, dark):
    """Its lines and titles are the figures of the table."""
    drawn, subplots = [], gate_trial.plt.subplots
    monkeypatch.setattr(gate_trial.plt, "subplots", lambda *a, **k: drawn.append(subplots(*a, **k)) or drawn[-1])
    call(command.main, "figure", EVIDENCE, tmp_path / "new" / "results.png", *(["--dark"] if dark else []))
    with Image.open(tmp_path / "new" / "results.png") as picture:
        assert picture.width > 1000
        red, green, blue = picture.convert("RGB").getpixel((0, 0))
        assert max(red, green, blue) < 50 if dark else min(red, green, blue) > 200
    (figure, panels) = drawn[0]
    assert "not the paper's scale" in figure.get_suptitle() and "3 seeds" in figure.get_suptitle()
    table = gate_trial.report(EVIDENCE)
    for axes, width, best in zip(panels[0], (128, 64), ("-0.067", "-0.148")):
        assert axes.get_title() == f"6 layers x {width}: DCA {best} nats, each at its best of 3 rates"
        own = table.split(f"x {width}\n")[1].split("## ")[0]
        lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        assert list(lines) == ["transformer", "DCA", "DCA without gates"]
        for name, label in gate_trial.DRAWN.items():
            row = next(row for row in own.splitlines() if row.startswith(f"| {name} |"))
            assert [f"{loss:.3f}" for loss in lines[label].get_ydata()] == [
                cell.split(" ± ")[0].strip() for cell in row.split("|")[2:5]
            ]
            if name == "normalised, rms":
                assert f"| {best} (" in row


def test_committed_figures_are_those_of_the_results(tmp_path):
    for name, options in (("results", ()), ("results-dark", ("--dark",))):
        call(command.main, "figure", EVIDENCE, tmp_path / f"{name}.png", *options)
        committed = EVIDENCE.parents[1] / "figures" / f"{name}.png"
        with Image.open(tmp_path / f"{name}.png") as now, Image.open(committed) as before:
            assert now.size == before.size  # (the pixels depend on fonts)
            assert {key: value for key, value in before.text.items() if key == "Title"} == {"Title": now.text["Title"]}


def test_figure_of_no_results(tmp_path, capsys):
    line = failure(capsys, command.main, "figure", tmp_path, tmp_path / "results.png")
    assert "holds no results: name the OUTPUT_DIR of an earlier `train`." in line
    content = json.loads((EVIDENCE / "64-standard.json").read_text())
    (tmp_path / "64-standard.json").write_text(json.dumps(content))
    line = failure(capsys, command.main, "figure", tmp_path, tmp_path / "results.png")
    assert "holds no results of 'normalised, rms' at a width of 64: train it first." in line
    line = failure(capsys, command.main, "figure", EVIDENCE, tmp_path / "results.movie")
    assert "The figure cannot be written to" in line
