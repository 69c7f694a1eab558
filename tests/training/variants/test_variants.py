"""Models with one part of DCA altered: what is altered, against a computation by hand, and that nothing else is."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from modeling_dca import (
    DCAConfig,
    DCAForCausalLM,
    GeneralizedResidual,
)
from tests.training.tiny import IMAGE_RUN, TEXT_RUN, assert_same_weights, call, failure, refusal, weights, write_images
from training import altered, causal_lm, compare, image_classification
from training.results.depth_weights import losses_without, measure_depth_weights
from training.run.trainer import RunTrainer
from training.studies import running, study
from training.variants.decay import DecayOfB
from training.variants.entries import ChosenResidual
from training.variants.gates import BiasInsideGate, DeadGate, RawGate
from training.variants.registry import VARIANTS


pytestmark = pytest.mark.usefixtures("offline")

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2}
BATCH = torch.arange(24).reshape(3, 8)
RawGateForCausalLM, RandomGateForCausalLM, LastFourForCausalLM, InputAndLastThreeForCausalLM = (
    VARIANTS[name].model(DCAForCausalLM) for name in ("raw_gate", "random_gate", "last_4", "input_and_last_3")
)
RUN = ("--output_dir=run", "--max_steps=3", "--save_strategy=no")


def randomize(model):
    """As after training."""
    for name, parameter in model.named_parameters():
        if name.endswith(("residual.delta", "residual.gate")):
            torch.nn.init.normal_(parameter, std=0.5)


def model_of(model_class, seed=0, **fields):
    torch.manual_seed(seed)
    return model_class(DCAConfig(**SIZES, **fields))


def residuals_of(model):
    return [*(layer.residual for layer in model.model.layers), model.model.residual]


# Gates of other forms


@pytest.mark.parametrize("scheme", ["grn_v3", "dca"])
@pytest.mark.parametrize("gate_class", [DeadGate, RawGate, BiasInsideGate])
def test_altered_gates_against_a_computation_by_hand(gate_class, scheme):
    torch.manual_seed(0)
    residual = gate_class(DCAConfig(**SIZES, residual_scheme=scheme), num_blocks=2)
    for parameter in residual.parameters():
        torch.nn.init.normal_(parameter)
    stack = [5 * torch.randn(2, 3, 16) for _ in range(3)]
    *outputs, kept = residual(*stack)
    assert kept == tuple(stack) and len(outputs) == len(residual.gate)
    for output, result in enumerate(outputs):
        expected = torch.zeros_like(result)
        for i, entry in enumerate(stack):
            b = 1 + residual.delta[output, i]
            seen = entry if gate_class is RawGate else entry / (entry.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            pre_activation = (residual.gate[output] * seen).sum(-1, keepdim=True)
            if gate_class is BiasInsideGate:
                weight = torch.relu(b + pre_activation)
            else:
                weight = b + torch.relu(pre_activation)
            expected = expected + weight * entry
            added = (weight - b).mean(-1)
            torch.testing.assert_close(residual.gates(entry, i)[..., output], added, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["no_gate", "three_norms"])
def test_parts_of_dca(name):
    """Of both, the model starts as the standard transformer; of one, `b` learns, of the other nothing of the residuals."""
    torch.manual_seed(0)
    model = VARIANTS[name].model(DCAForCausalLM)(DCAConfig(**SIZES))
    names = {each.rpartition(".")[2] for each, parameter in model.named_parameters() if parameter.requires_grad}
    assert "gate" not in names and ("delta" in names) == (name == "no_gate")
    plain = DCAForCausalLM(DCAConfig(**SIZES, residual_scheme="standard"))
    plain.load_state_dict(model.state_dict(), strict=False)
    for own, norms in zip(plain.model.layers, model.model.layers):
        own.load_state_dict(norms.state_dict(), strict=False)
    norms = [each for each, _ in model.named_parameters() if "norm" in each and "layers.0" in each]
    assert len(norms) == 4  # of queries, keys and values, and of the feed-forward module
    input_ids = torch.randint(0, SIZES["vocab_size"], (2, 8))
    torch.testing.assert_close(model(input_ids).logits, plain(input_ids).logits, rtol=1e-4, atol=1e-5)
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("gate_class", [DeadGate, RawGate, BiasInsideGate])
def test_gates_at_their_start(gate_class):
    """All are the plain sum, and all but the dead one learn."""
    torch.manual_seed(0)
    residual = gate_class(DCAConfig(**SIZES), num_blocks=2)
    stack = [torch.randn(2, 3, 16) for _ in range(3)]
    *outputs, _ = residual(*stack)
    for output in outputs:
        torch.testing.assert_close(output, sum(stack))
    sum(output.square().sum() for output in outputs).backward()
    assert (residual.gate.grad == 0).all() == (gate_class is DeadGate) and residual.delta.grad.abs().min() > 0


def test_altered_gates_are_those_of_all_blocks_and_of_the_output():
    model = model_of(RawGateForCausalLM)
    assert all(type(residual) is RawGate for residual in residuals_of(model))
    assert [tuple(residual.delta.shape) for residual in residuals_of(model)] == [
        tuple(residual.delta.shape) for residual in residuals_of(model_of(DCAForCausalLM))
    ]
    with pytest.raises(ValueError, match="'grn_v2', which has no gate to alter"):
        model_of(RawGateForCausalLM, residual_scheme="grn_v2")


# The random gate


def test_random_gate_is_random_everywhere_and_nothing_else_is():
    model, plain = (
        model_of(model_class, initializer_range=0.05) for model_class in (RandomGateForCausalLM, DCAForCausalLM)
    )
    gates = [residual.gate for residual in residuals_of(model)]
    assert [tuple(gate.shape) for gate in gates] == [(3, 16)] * 6 + [(1, 16)]
    values = torch.cat([gate.flatten() for gate in gates])
    assert len(values.unique()) == len(values) == 304
    # Six standard errors of the deviation, and of the mean.
    assert values.std().item() == pytest.approx(0.05, abs=6 * 0.05 / (2 * 304) ** 0.5)
    assert abs(values.mean().item()) < 6 * 0.05 / 304**0.5
    others = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert name.endswith("residual.gate") or torch.equal(parameter, others[name]), name
    assert all((residual.delta == 0).all() for residual in residuals_of(model))


def test_random_gate_is_not_drawn_anew(tmp_path):
    model = model_of(RandomGateForCausalLM)
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = RandomGateForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(loaded(BATCH).logits, model.eval()(BATCH).logits)


# Some of the outputs

# What the six blocks and the output see.
SEEN = {
    LastFourForCausalLM: [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]],
    InputAndLastThreeForCausalLM: [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4, 5], [0, 4, 5, 6]],
}


def observe(model, batch):
    """What the embedding and the blocks returned, and what was formed from it for each block and the model's output."""
    outputs, formed = [], []
    hooks = [model.model.embed_tokens.register_forward_hook(lambda module, args, result: outputs.append(result))]
    for layer in model.model.layers:
        hooks.append(layer.register_forward_hook(lambda module, args, results: outputs.append(results[-1])))
    for residual in residuals_of(model):
        hooks.append(residual.register_forward_hook(lambda module, args, results: formed.append(results[:-1])))
    with torch.no_grad():
        model.eval()(batch)
    for hook in hooks:
        hook.remove()
    return outputs, formed


@pytest.mark.parametrize("scheme", ["dca", "grn_v3", "grn_v1"])
@pytest.mark.parametrize("model_class", SEEN)
def test_chosen_outputs_by_hand(model_class, scheme):
    model = model_of(model_class, residual_scheme=scheme)
    randomize(model)
    outputs, formed = observe(model, BATCH)
    assert len(outputs) == len(formed) == 7
    for residual, inputs, seen in zip(residuals_of(model), formed, SEEN[model_class]):
        assert residual.spans() == [(i, i) for i in seen]
        assert residual.delta.shape[1] == len(seen) and len(inputs) == residual.delta.shape[0]
        for index, found in enumerate(inputs):
            expected = 0
            for position, i in enumerate(seen):
                b = 1 + residual.delta[index, position]
                seen_by_gate = outputs[i] / (outputs[i].square().mean(-1, keepdim=True) + 1e-6).sqrt()
                gate = 0 if residual.gate is None else (seen_by_gate @ residual.gate[index]).relu()[..., None]
                expected = expected + (b + gate) * outputs[i]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_class", SEEN)
def test_output_that_is_left_out_has_no_gradient(model_class):
    model = model_of(model_class)
    randomize(model)
    for count, (residual, seen) in enumerate(zip(residuals_of(model), SEEN[model_class]), start=1):
        # (All of them are passed on.)
        stack = [torch.randn(2, 3, 16, requires_grad=True) for _ in range(count)]
        *inputs, passed = residual(*stack)
        assert len(passed) == len(stack) and all(each is entry for each, entry in zip(passed, stack))
        gradients = torch.autograd.grad(sum(each.sum() for each in inputs), stack, allow_unused=True)
        assert [i for i, gradient in enumerate(gradients) if gradient is not None and gradient.any()] == seen


@pytest.mark.parametrize("model_class", SEEN)
def test_gradients_of_chosen_outputs_are_those_of_the_reference(model_class):
    """The faster implementations pass gradients from block to block."""
    gradients = []
    for implementation in ("auto", "eager"):
        model = model_of(model_class, grn_implementation=implementation)
        randomize(model)
        model(BATCH, labels=BATCH).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_chosen_of_merged_outputs():
    whole = GeneralizedResidual(DCAConfig(**SIZES, last_k=3), num_blocks=6)
    assert whole.spans() == [(0, 0), (1, 3), (4, 4), (5, 5), (6, 6)]
    assert ChosenResidual(whole, first=0, last=4).spans() == [(1, 3), (4, 4), (5, 5), (6, 6)]
    assert ChosenResidual(whole, first=1, last=3).spans() == [(0, 0), (4, 4), (5, 5), (6, 6)]
    assert ChosenResidual(whole, first=1, last=3).delta.shape == (3, 4, 16)


@pytest.mark.parametrize("model_class", SEEN)
def test_chosen_outputs_are_saved_and_loaded(model_class, tmp_path):
    model = model_of(model_class)
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(BATCH).logits, model.eval()(BATCH).logits)


@pytest.mark.parametrize("model_class", SEEN)
def test_depth_weights_of_chosen_outputs(model_class):
    model = model_of(model_class)
    randomize(model)
    found = measure_depth_weights(model, [{"input_ids": BATCH}])
    outputs, _ = observe(model, BATCH)
    for each in found:
        residual, index = model.model.layers[each["block"] - 1].residual, "qkv".index(each["input"])
        seen = SEEN[model_class][each["block"] - 1]
        assert each["outputs"] == [(i, i) for i in seen] and len(each["b"]) == len(seen)
        normed = [outputs[i] / (outputs[i].square().mean(-1, keepdim=True) + 1e-6).sqrt() for i in seen]
        gates = torch.stack([(entry @ residual.gate[index]).relu().mean() for entry in normed])
        torch.testing.assert_close(torch.tensor(each["gate"]), gates.detach(), rtol=1e-4, atol=1e-6)
        whole = 1 + residual.delta[index].mean(-1) + gates
        torch.testing.assert_close(torch.tensor(each["weight"]), whole.detach(), rtol=1e-4, atol=1e-6)
        sizes = torch.stack([outputs[i].square().mean().sqrt() for i in seen])
        torch.testing.assert_close(torch.tensor(each["size"]), sizes, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("model_class", SEEN)
def test_loss_without_an_output_is_lost_by_those_who_see_it(model_class):
    model = model_of(model_class, residual_scheme="grn_v2").eval()
    randomize(model)
    _, rows = losses_without(model, range(7), lambda: model(BATCH, labels=BATCH).loss.item())
    names = [*range(1, 7), "output"]
    for output in range(7):
        found = {row["block"]: row["loss"] for row in rows if row["without"] == output and row["block"] != "all"}
        assert list(found) == [name for name, seen in zip(names, SEEN[model_class]) if output in seen]
        for name, loss in found.items():
            place = names.index(name)
            delta = residuals_of(model)[place].delta
            before = delta.clone()
            delta[:, SEEN[model_class][place].index(output)] = -1  # b = 0
            assert loss == pytest.approx(model(BATCH, labels=BATCH).loss.item(), rel=1e-5)
            delta.copy_(before)


@torch.no_grad()
def test_whole_weight_with_the_bias_inside_of_the_gate():
    model = model_of(VARIANTS["bias_inside_gate"].model(DCAForCausalLM)).eval()
    randomize(model)
    found = measure_depth_weights(model, [{"input_ids": BATCH}])
    outputs, _ = observe(model, BATCH)
    for each in found:
        residual, index = model.model.layers[each["block"] - 1].residual, "qkv".index(each["input"])
        for i, weight in enumerate(each["weight"]):
            normed = outputs[i] / (outputs[i].square().mean(-1, keepdim=True) + 1e-6).sqrt()
            whole = (1 + residual.delta[index, i] + (normed @ residual.gate[index])[..., None]).relu()
            assert weight == pytest.approx(whole.mean().item(), rel=1e-4)


# The decay of b


class Residual(torch.nn.Module):
    """Parameters of the names that the callback goes by, and others."""

    def __init__(self):
        super().__init__()
        self.residual = torch.nn.Module()
        for name in ("delta", "gate"):
            setattr(self.residual, name, torch.nn.Parameter(torch.linspace(-0.8, 0.8, 5)))


def steps_of_adamw(weight_decay, callback=None, learning_rates=(0.1, 0.05, 0.2)):
    torch.manual_seed(0)
    model = Residual()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay)
    arguments = type("Arguments", (), {"weight_decay": weight_decay})
    for learning_rate in learning_rates:
        optimizer.param_groups[0]["lr"] = learning_rate
        for parameter in model.parameters():
            parameter.grad = torch.randn(5)
        if callback is not None:
            callback.on_pre_optimizer_step(arguments, None, None, model=model)
        optimizer.step()
        if callback is not None:
            callback.on_optimizer_step(arguments, None, None, optimizer=optimizer)
    return model.residual


def test_no_decay_of_b_is_adamw_without_it():
    found = steps_of_adamw(0.3, DecayOfB(to_zero=False))
    torch.testing.assert_close(found.delta, steps_of_adamw(0).delta, rtol=1e-6, atol=1e-6)
    ordinary = steps_of_adamw(0.3)
    assert torch.equal(found.gate, ordinary.gate) and not torch.allclose(found.delta, ordinary.delta, atol=1e-2)


def test_decay_of_b_to_0_is_adamw_of_b():
    """What AdamW does to a parameter that is `b`, and not `delta`: its steps do not depend on the values."""
    found = steps_of_adamw(0.3, DecayOfB(to_zero=True))
    b, average, square = 1 + torch.linspace(-0.8, 0.8, 5), 0, 0
    torch.manual_seed(0)
    for step, learning_rate in enumerate((0.1, 0.05, 0.2), start=1):
        gradient, _ = torch.randn(5), torch.randn(5)
        b = b - learning_rate * 0.3 * b
        average, square = 0.9 * average + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        b = b - learning_rate * (average / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(1 + found.delta, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.gate, steps_of_adamw(0.3).gate)


@pytest.mark.parametrize(
    ("alteration", "b"),
    [
        (None, lambda kept: 1 + 0.5 * kept),
        ("decay_b_to_0", lambda kept: 1.5 * kept),
        ("no_decay_of_b", lambda kept: 1.5),
    ],
    ids=["decay_to_1", "decay_to_0", "no_decay"],
)
def test_decay_of_b_in_a_run(room, monkeypatch, alteration, b):
    """Without gradients, all that is left of a step is the decay."""
    begun, training_step = {}, RunTrainer.training_step

    def step_without_gradients(self, model, *args, **kwargs):
        if not begun:
            for name, parameter in model.named_parameters():
                if name.endswith("residual.delta"):
                    torch.nn.init.constant_(parameter, 0.5)
            begun.update({name: value.clone() for name, value in model.state_dict().items()})
        loss = training_step(self, model, *args, **kwargs)
        for parameter in model.parameters():
            parameter.grad.zero_()
        return loss

    monkeypatch.setattr(RunTrainer, "training_step", step_without_gradients)
    choice = [] if alteration is None else [f"--alteration={alteration}"]
    call(altered.main, TEXT_RUN, *RUN, "--learning_rate=0.5", "--weight_decay=0.2", *choice)
    history = json.loads(Path("run/trainer_state.json").read_text())["log_history"]
    learning_rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert len(learning_rates) == 3 and len(set(learning_rates)) > 1
    kept = 1.0
    for learning_rate in learning_rates:
        kept *= 1 - 0.2 * learning_rate
    assert kept < 0.95
    trained = weights(Path("run"))
    for name, value in trained.items():
        if name.endswith("residual.delta"):
            torch.testing.assert_close(1 + value, torch.full_like(value, b(kept)), rtol=1e-6, atol=1e-6)
        elif name.endswith("proj.weight"):
            torch.testing.assert_close(value, kept * begun[name], rtol=1e-5, atol=1e-7)
    assert len([name for name in trained if name.endswith("proj.weight")]) == 2 * 6


# A run that names its variant


def test_variant_of_a_run_is_the_alteration_of_that_name(room):
    call(altered.main, TEXT_RUN, *RUN, "--alteration=dead_gate")
    call(causal_lm.main, TEXT_RUN, *RUN, "--output_dir=named", "--variant=dead_gate")
    assert_same_weights(room / "run", room / "named")
    assert not any(value.any() for name, value in weights(room / "named").items() if name.endswith("residual.gate"))
    config = json.loads((room / "named" / "config.json").read_text())
    assert config["architectures"] == ["DeadGateForCausalLM"] and config["auto_map"].keys() == {"AutoConfig"}
    assert "was altered (`dead_gate`" in (room / "named" / "README.md").read_text()


def test_variant_is_named_in_the_file_of_a_run_of_images(room):
    write_images(room / "images")
    content = yaml.safe_load(Path(IMAGE_RUN).read_text())
    content["training"]["variant"] = "last_4"
    Path(IMAGE_RUN).write_text(yaml.safe_dump(content))
    call(image_classification.main, IMAGE_RUN, *RUN, "--num_hidden_layers=5")
    assert weights(room / "run")["model.residual.delta"].shape == (1, 4, 16)
    config = json.loads((room / "run" / "config.json").read_text())
    assert config["architectures"] == ["LastFourForImageClassification"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variant=last_5"], ["`variant` is 'last_5'", "did you mean 'last_4'?", *VARIANTS]),
        (["--variant=last_4", "--residual_scheme=standard"], ["`variant` is 'last_4'", "`residual_scheme`"]),
        (["--variant=raw_gate", "--residual_scheme=grn_v2"], ["'grn_v2', which has no gate to alter"]),
        (["--variant=last_4", "--baseline=standard"], ["`variant` is 'last_4'", "leave `baseline` out"]),
        (["--variant=last_4", "--push_to_hub"], ["`variant` is 'last_4'", "leave `push_to_hub` out"]),
    ],
)
def test_refusals_of_variants(room, capsys, arguments, words):
    line = refusal(capsys, causal_lm.main, TEXT_RUN, *arguments)
    assert not [word for word in words if word not in line], line


def test_two_names_of_two_variants_are_refused(room, capsys):
    line = refusal(capsys, altered.main, TEXT_RUN, "--variant=last_4", "--alteration=raw_gate")
    assert "'raw_gate'" in line and "'last_4'" in line and "leave one of them out" in line


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("--variant=last_4", "--variant=input_and_last_3"),
        ("--variant=dead_gate", "--residual_scheme=dca"),
        ("--residual_scheme=dca", "--variant=dead_gate"),
    ],
)
def test_run_is_not_resumed_as_another_variant(room, capsys, before, after):
    """Their checkpoints have weights of the same names and shapes."""
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_steps=2", "--residual_scheme=dca", before)
    line = refusal(
        capsys,
        causal_lm.main,
        TEXT_RUN,
        "--output_dir=run",
        "--residual_scheme=dca",
        after,
        "--resume_from_checkpoint",
    )
    assert "`variant`" in line and "resume it with that" in line


def test_run_is_resumed_by_either_name_of_its_variant(room):
    call(altered.main, TEXT_RUN, "--output_dir=run", "--max_steps=2", "--alteration=dead_gate")
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--variant=dead_gate", "--resume_from_checkpoint")
    assert not any(value.any() for name, value in weights(room / "run").items() if name.endswith("residual.gate"))


# The command


def test_without_alteration_it_is_causal_lm(room):
    for main, folder in ((altered.main, "altered"), (causal_lm.main, "causal_lm")):
        call(main, TEXT_RUN, *RUN, f"--output_dir={folder}")
    assert_same_weights(room / "altered", room / "causal_lm")
    for file in ("model.safetensors", "config.json", "tokenizer.json", "eval_results.json", "depth_weights.json"):
        first, second = ((room / folder / file).read_bytes() for folder in ("altered", "causal_lm"))
        if file == "eval_results.json":  # without the times
            first, second = (
                {key: value for key, value in json.loads(each).items() if not re.search("runtime|per_second", key)}
                for each in (first, second)
            )
        assert first == second, file
    records = [yaml.safe_load((room / folder / "run.yaml").read_text()) for folder in ("altered", "causal_lm")]
    for record in records:
        del record["training"]["output_dir"]
    assert records[0] == records[1]
    gates = [value for name, value in weights(room / "altered").items() if name.endswith("residual.gate")]
    assert len(gates) == 3 and all(gate.any() for gate in gates)


def test_dead_gate_stays_shut_in_a_run(room):
    """GRN-v3 is then GRN-v2."""
    call(altered.main, TEXT_RUN, *RUN, "--residual_scheme=grn_v3", "--alteration=dead_gate")
    options = ("--output_dir=v2", "--residual_scheme=grn_v2", "--grn_implementation=eager")
    call(causal_lm.main, TEXT_RUN, *RUN, *options)
    found, expected = weights(room / "run"), weights(room / "v2")
    gates = {name for name in found if name.endswith("residual.gate")}
    assert len(gates) == 3 and not any(found[name].any() for name in gates)
    torch.testing.assert_close({name: found[name] for name in found.keys() - gates}, expected, rtol=1e-5, atol=1e-6)
    assert any(value.any() for name, value in found.items() if name.endswith("residual.delta"))
    losses = [json.loads((room / each / "eval_results.json").read_text())["eval_loss"] for each in ("run", "v2")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_random_gate_in_a_run(room):
    call(altered.main, TEXT_RUN, *RUN, "--alteration=random_gate", "--learning_rate=1e-6")
    found = weights(room / "run")
    gates = torch.cat([value.flatten() for name, value in found.items() if name.endswith("residual.gate")])
    assert len(gates) == (3 + 3 + 1) * 16 and 0.01 < gates.std() < 0.03


@pytest.mark.parametrize(
    ("alteration", "seen"),
    [("last_4", [2, 3, 4, 5]), ("input_and_last_3", [0, 3, 4, 5])],
    ids=lambda value: str(value),
)
def test_chosen_outputs_in_a_run(room, alteration, seen):
    model = ("--num_hidden_layers=6", "--residual_scheme=grn_v3")
    call(altered.main, TEXT_RUN, *RUN, *model, f"--alteration={alteration}")
    found = weights(room / "run")
    assert found["model.layers.5.residual.delta"].shape == found["model.residual.delta"].shape == (1, 4, 16)
    assert all(value.any() for name, value in found.items() if name.endswith("residual.delta"))
    last = json.loads((room / "run" / "depth_weights.json").read_text())[-1]
    assert last["outputs"] == [[i, i] for i in seen] and len(last["gate"]) == len(last["b"]) == 4
    # Nothing says that this is the model of the code that is saved with others.
    config = json.loads((room / "run" / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig"}
    card = (room / "run" / "README.md").read_text()
    assert f"not for use: one part of it, or of its training, was altered (`{alteration}`" in card
    assert "from_pretrained" not in card and (room / "run" / "depth_weights.png").exists()
    assert yaml.safe_load((room / "run" / "run.yaml").read_text())["training"]["alteration"] == alteration


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--alteration=random_gates"],
            ["`alteration` is 'random_gates'", "did you mean 'random_gate'?", *VARIANTS],
        ),
        (["--alteration=x"], ["`alteration` is 'x'; Known: dead_gate, "]),
        (["--alteration=last_4", "--residual_scheme=standard"], ["'last_4'", "'standard'", "`residual_scheme`"]),
        (["--alteration=last_4", "--baseline=standard"], ["'last_4'", "leave `baseline` out"]),
        (["--alteration=no_decay_of_b", "--baseline=grn_v1"], ["'no_decay_of_b'", "leave `baseline` out"]),
        (["--alteration=last_4", "--push_to_hub"], ["'last_4'", "leave `push_to_hub` out"]),
    ],
)
def test_refusals(room, capsys, arguments, words):
    line = refusal(capsys, altered.main, TEXT_RUN, *arguments)
    assert not [word for word in words if word not in line], line


def test_checkpoint_to_start_from_is_refused(room, capsys):
    DCAForCausalLM(DCAConfig(**SIZES)).save_pretrained("trained")
    content = {"data": {"dataset": "text.jsonl"}}
    Path("retrofit.yaml").write_text(yaml.safe_dump(content))
    arguments = ("--initial_checkpoint=trained", "--alteration=random_gate")
    line = refusal(capsys, altered.main, "retrofit.yaml", *arguments)
    assert "'random_gate'" in line and "leave `initial_checkpoint` out" in line


def test_other_commands_know_no_alteration(room, capsys):
    assert "--alteration" in refusal(capsys, causal_lm.main, TEXT_RUN, "--alteration=last_4")


# A study


def write_study(**changes):
    content = {
        "command": "altered",
        "configuration": TEXT_RUN,
        "fields": {"max_steps": 2},
        "baseline": "DCA",
        "seeds": [0],
        "variants": {"DCA": {}, "dead gate": {"alteration": "dead_gate"}},
    }
    Path("study.yaml").write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))


def test_study_of_altered_models(room, monkeypatch):
    started = []

    def start(member, resume, log, environment):
        started.append((member.command, member.run.training.alteration))
        call(altered.main, *member.arguments)
        return type("Ended", (), {"returncode": 0, "poll": lambda self: 0})()

    monkeypatch.setattr(running, "start", start)
    write_study()
    call(compare.main, "study.yaml")
    assert started == [("altered", None), ("altered", "dead_gate")]
    folder = room / "runs" / "study"
    found = json.loads((folder / "comparison.json").read_text())
    assert [(run["variant"], run["eval_loss"]) for run in found["runs"]] == [
        (name, json.loads((folder / name / "seed-0" / "all_results.json").read_text())["eval_loss"])
        for name in ("DCA", "dead gate")
    ]
    command = found["runs"][1]["command"]
    assert command.startswith("python -m training.altered ") and "--alteration=dead_gate" in command
    for name, dead in (("DCA", False), ("dead gate", True)):
        gates = [value for key, value in weights(folder / name / "seed-0").items() if key.endswith("residual.gate")]
        assert len(gates) == 3 and any(gate.any() for gate in gates) != dead

    # The runs alone tell as much.
    call(compare.main, "runs/study/DCA/seed-0", "runs/study/dead gate/seed-0", "--output_dir=again")
    again = json.loads((room / "again" / "comparison.json").read_text())
    assert [(run["variant"], run["eval_loss"]) for run in again["runs"]] == [
        (run["variant"], run["eval_loss"]) for run in found["runs"]
    ]


def test_study_refuses_an_unknown_alteration(room, capsys):
    write_study(variants={"DCA": {}, "dead": {"alteration": "dead_gates"}})
    line = failure(capsys, compare.main, "study.yaml")
    assert "'dead'" in line and "did you mean 'dead_gate'?" in line and not Path("runs").exists()


def test_study_of_another_command_has_no_alteration(room):
    write_study(command="causal_lm")
    with pytest.raises(study.UserError, match="'dead gate'.*unknown field 'alteration'"):
        study.read_study(Path("study.yaml"))
