"""What a run will cost is what it costs, at sizes at which it can be measured."""

import re

import pytest
import torch
from torch import nn

from modeling_dca import DCAConfig, DCAForCausalLM, DCAModel, GeneralizedResidual
from tests.training.tiny import call, failure
from training.benchmarks import costs, plan
from training.benchmarks.costs import Layout
from training.benchmarks.devices import DEVICES, peak_flops_of
from training.benchmarks.measure import kept_bytes


SIZES = {
    "vocab_size": 90,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "max_position_embeddings": 64,
}
MODELS = {
    "full": {},
    "k = 2": {"last_k": 2},
    "k = 1, gated": {"last_k": 1, "gated_mlp": True},
    "GRN-v3, gated": {"residual_scheme": "grn_v3", "gated_mlp": True, "last_k": 2},
    "GRN-v1": {"residual_scheme": "grn_v1"},
    "standard, gated": {"residual_scheme": "standard", "gated_mlp": True},
    "tied, biases, wide": {
        "tie_word_embeddings": True,
        "mlp_bias": True,
        "attention_bias": True,
        "intermediate_size": 320,
    },
    "sandwich": {"norm_placement": "sandwich"},
    "after the modules": {"norm_placement": "post_module"},
    "parallel": {"parallel_blocks": True},
    "layer norms": {"norm_type": "layer_norm"},
}
LAYOUT = Layout(batch=2, seq=48, element=4)


def build(kind=DCAForCausalLM, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = kind(DCAConfig(**SIZES | options)).to(dtype).train()
    for module in model.modules():
        if isinstance(module, GeneralizedResidual):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.1)
    return model


def tokens():
    return torch.randint(90, (LAYOUT.batch, LAYOUT.seq))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_exactly(name):
    model = build(**MODELS[name])
    counts = costs.count_parameters(model.config)
    assert sum(counts.values()) == model.num_parameters()
    residuals = [module for module in model.modules() if isinstance(module, GeneralizedResidual)]
    assert counts["residuals"] == sum(parameter.numel() for module in residuals for parameter in module.parameters())


def measured(model):
    return kept_bytes(lambda: model(tokens(), labels=tokens(), use_cache=False).loss, model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_kept_bytes_are_within_five_percent(name, dtype):
    model = build(dtype=dtype, **MODELS[name])
    layout = Layout(batch=2, seq=48, element=dtype.itemsize)
    assert costs.kept_bytes(model.config, layout) == pytest.approx(measured(model), rel=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_kept_bytes_with_checkpointing_are_within_five_percent(name):
    model = build(**MODELS[name])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layout = Layout(batch=2, seq=48, element=4, checkpointing=True)
    assert costs.kept_bytes(model.config, layout) == pytest.approx(measured(model), rel=0.05)


@pytest.mark.parametrize("layers", [4, 8, 12])
@pytest.mark.parametrize("options", [{}, {"last_k": 2}, {"residual_scheme": "standard"}])
def test_checkpointed_tensors_are_counted_exactly(layers, options):
    model = build(DCAModel, num_hidden_layers=layers, **options)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    own, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(tokens(), use_cache=False)
    sizes = [size for address, size in kept.items() if address not in own]
    assert result and sizes.count(4 * LAYOUT.tokens * 64) == costs.checkpointed_tensors(model.config)


@pytest.mark.parametrize("options", [{}, {"last_k": 1}, {"last_k": 2}, {"residual_scheme": "standard"}])
@pytest.mark.parametrize("stages", [2, 3, 6])
def test_bytes_over_a_pipelines_cuts_are_counted_exactly(options, stages):
    model = build(**options)
    sent, passed = [], tokens()
    for index in range(stages - 1):
        passed = model.pipeline_stage(index, stages)(*(passed if isinstance(passed, tuple) else (passed,)))
        entries = passed if isinstance(passed, tuple) else (passed,)
        sent.append(sum(entry.numel() * entry.itemsize for entry in entries))
    assert costs.cut_bytes(model.config, Layout(batch=2, seq=48, element=4, pipeline=stages)) == sent


def test_the_stages_of_a_pipeline_keep_what_they_are_said_to():
    model = build(last_k=1)
    layout = Layout(batch=2, seq=48, element=4, pipeline=3)
    passed = (tokens(),)
    for index in range(3):
        stage, results = model.pipeline_stage(index, 3), []
        passed = tuple(each.detach().requires_grad_() if each.is_floating_point() else each for each in passed)

        def forward(stage=stage, passed=passed, results=results, index=index):
            results.append(stage(*passed))
            return model.loss_function(results[-1], tokens(), 90) if index == 2 else results[-1]

        kept = kept_bytes(forward, model.parameters())
        assert costs.kept_bytes(model.config, layout, index) == pytest.approx(kept, rel=0.05)
        passed = results[0]


# Llama 3's shapes of 1, 8 and 70 billion parameters.
SHAPES = {
    "1B": (16, 2048, 32, 8, 8192),
    "8B": (32, 4096, 32, 8, 14336),
    "70B": (80, 8192, 64, 8, 28672),
}


def of_shape(name, **options):
    layers, hidden, heads, kv_heads, intermediate = SHAPES[name]
    return DCAConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        gated_mlp=True,
        vocab_size=128,
        **options,
    )


@pytest.mark.parametrize(
    ("name", "full", "two"), [("1B", 5.3, 2.7), ("8B", 5.3, 1.6), ("70B", 6.3, 0.8)], ids=lambda value: str(value)
)
def test_the_table_of_the_page(name, full, two):
    """By hand: entries and outputs of all blocks, against 6 FLOPs for each weight of a projection."""
    layers, d, heads, kv_heads, intermediate = SHAPES[name]
    weights = layers * (2 * d * d + 2 * d * d * kv_heads // heads + 3 * d * intermediate)
    seconds = 6 * weights / (0.4 * 989e12)
    for config, percent, entries in (
        (of_shape(name), full, list(range(1, layers + 1))),
        (of_shape(name, last_k=2), two, [1, 2, 3] + [4] * (layers - 3)),
    ):
        moved = sum(2 * d * (n + 3) + 2 * d * (3 * n + 3) for n in entries)
        assert sum(costs.residual_bytes(config)) == moved
        assert costs.block_flops(config, 2048)["projections"] == 6 * weights
        assert round(100 * moved / 3.35e12 / seconds, 1) == percent
    assert re.search(rf"\| {name} .*\| {full} % \| {two} % \|", plan.PAGE.read_text(encoding="utf-8"))


def test_what_is_shared_out_is_divided():
    config = DCAConfig(**SIZES)
    alone = costs.memory(config, Layout(batch=1, seq=32))
    shared = costs.memory(config, Layout(batch=1, seq=32, sharding=4))
    for kind in ("weights", "gradients", "optimizer"):
        assert shared[kind] == alone[kind] / 4
    assert shared["activations"] == alone["activations"]
    tensor = costs.memory(config, Layout(batch=1, seq=32, tensor=4))
    counts = costs.count_parameters(config)
    whole = counts["norms"] + counts["residuals"]
    assert tensor["weights"] == 4 * (whole + (sum(counts.values()) - whole) / 4)
    by_sequence = costs.memory(config, Layout(batch=1, seq=32, tensor=4, by_sequence=True))
    assert by_sequence["activations"] < tensor["activations"] < alone["activations"]
    flops, bandwidth = 1e14, 1e12
    slow = [
        costs.slowdown(config, layout, flops, bandwidth)
        for layout in (Layout(1, 32), Layout(1, 32, tensor=4), Layout(1, 32, tensor=4, by_sequence=True))
    ]
    assert slow[1] == pytest.approx(4 * slow[0]) and slow[2] == pytest.approx(slow[0])
    assert costs.slowdown(DCAConfig(**SIZES, residual_scheme="standard"), Layout(1, 32), flops, bandwidth) == 0


def test_the_bytes_of_links():
    config = DCAConfig(**SIZES, gated_mlp=True)
    parameters = sum(costs.count_parameters(config).values())
    links = costs.link_bytes(config, Layout(batch=2, seq=48, sharding=4, replicas=2))
    assert links == {
        "sharding": 0.75 * 8 * parameters,
        "replicas": 0.5 * 8 * parameters / 4,
        "tensor": 0,
        "pipeline": 0,
    }
    entry = 2 * 2 * 48 * 64
    # Forward two all-reduces, backward those of q, k, v, gate and up: each twice 1/2 of the entry.
    assert costs.link_bytes(config, Layout(2, 48, tensor=2))["tensor"] == 6 * 7 * 2 * 0.5 * entry
    # Forward q, k, v and the feed-forward module's input gathered and two outputs scattered, and the same back.
    assert costs.link_bytes(config, Layout(2, 48, tensor=2, by_sequence=True))["tensor"] == 6 * 12 * 0.5 * entry
    assert costs.link_bytes(config, Layout(2, 48, pipeline=2))["pipeline"] == 2 * 4 * entry


def test_devices_are_stated_with_their_source():
    for name, device in DEVICES.items():
        assert peak_flops_of(name) > 1e13 and device.source and 0.1 < device.bandwidth < 10 < device.memory


def told(capsys, *arguments):
    call(plan.main, *arguments)
    return capsys.readouterr().out


def test_the_command_tells_all_of_it(capsys):
    text = told(
        capsys, "--layers=8", "--hidden=256", "--heads=8", "--last_k=2", "--devices=16", "--tensor=2", "--pipeline=2",
        "--by_sequence", "--vocab=1000", "--seq=512", "--device=H200",
    )  # fmt: skip
    config = DCAConfig(
        num_hidden_layers=8, hidden_size=256, num_attention_heads=8, last_k=2, gated_mlp=True, vocab_size=1000
    )
    assert "8 layers x 256, 2-DCA; 1 x 512 tokens on each of 16 NVIDIA H200" in text
    assert re.search(rf"\| all +\| {DCAForCausalLM(config).num_parameters():,} +\|", text)
    assert "With checkpointing 10 tensors" in text
    assert f"Cut 1: 4 tensors, {4 * 512 * 256 * 2:,} bytes per direction" in text
    for words in ("sharding", "tensor", "pipeline", "full DCA", "the residual sum", "fits", "slowdown", "141 GB"):
        assert words in text


def test_what_does_not_fit_is_said(capsys):
    shape = ("--layers=80", "--hidden=8192", "--heads=64", "--kv_heads=8", "--intermediate=28672", "--seq=8192")
    rows = [
        line.split("|")
        for line in told(capsys, *shape, "--devices=32").splitlines()
        if "with" in line and "B" not in line
    ]
    fits = {(row[1].strip(), row[2].strip()): row[4].strip() for row in rows if len(row) == 7}
    assert fits["full DCA", "without"] == "no" and fits["full DCA", "with"] == "yes"


def test_a_runs_file_is_planned(room, capsys):
    (room / "run.yaml").write_text(
        "model: {num_hidden_layers: 3, hidden_size: 32, num_attention_heads: 4, vocab_size: 70}\n"
        "data: {block_size: 40}\n"
        "training: {per_device_train_batch_size: 5, bf16: true, max_steps: 1}\n"
    )
    text = told(capsys, "run.yaml", "--devices=2")
    assert "3 layers x 32, full DCA; 5 x 40 tokens on each of 2" in text
    parameters = DCAForCausalLM(
        DCAConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=4, vocab_size=70)
    ).num_parameters()
    assert f"{parameters:,}" in text
    assert "3 layers x 32, 1-DCA; 2 x 40 tokens" in told(capsys, "run.yaml", "--last_k=1", "--batch=2")
    assert not (room / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--devices=6", "--tensor=4"],
            "`devices` is 6, which is not a multiple of `tensor` x `pipeline` x `replicas` = 4",
        ),
        (["--devices=0"], "`devices` is 0; it must be at least 1"),
        (["--devices=3", "--tensor=3"], "`tensor` is 3, which does not divide `num_attention_heads`, 8"),
        (["--layers=2", "--pipeline=4", "--devices=4"], "`pipeline` is 4, but the model has 2 blocks"),
        (["--device=H1000"], "`device` is 'H1000'; Known: NVIDIA A100"),
        (["--device=A100"], "`device` is 'A100'; it may be NVIDIA A100-SXM4-40GB or NVIDIA A100-SXM4-80GB or"),
        (["--utilization=0"], "`utilization` is 0.0; it must be above 0 and at most 1"),
        (["--hidden=100", "--heads=3"], "The model: .*hidden_size"),
        (["--residual_scheme=dcb"], "The model: .*`residual_scheme` is 'dcb'"),
        (["--seq=0"], "`seq` is 0; it must be at least 1"),
        (["nowhere.yaml"], "The configuration nowhere.yaml cannot be read"),
        (["--laiers=3"], "[Uu]nrecognized arguments: --laiers=3"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments, message, capsys):
    assert re.search(message, failure(capsys, plan.main, *arguments))
