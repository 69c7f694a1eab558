"""Other residual schemes: against slow renderings of their equations in float64, at their start, and as runs of the commands."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import DynamicCache

from modeling_dca import DCAConfig, DCAForCausalLM
from modeling_dca.modeling_dca import CACHE_NAME
from tests.training.tiny import IMAGE_RUN, TEXT_RUN, assert_same_weights, call, refusal, weights, write_images
from training import causal_lm, depth_weights, evaluate, image_classification, publish
from training.run.trainer import RunTrainer
from training.support.errors import UserError
from training.variants.hyper_connections import ManifoldConnection, sinkhorn
from training.variants.registry import VARIANTS
from training.variants.scheme import Connection, set_connection_groups


pytestmark = pytest.mark.usefixtures("offline")

BLOCKS, WIDTH = 3, 16
BATCH = torch.arange(24).reshape(3, 8)
SCHEMES = [name for name, variant in VARIANTS.items() if variant.scheme is not None]
#: With settings that are not the defaults, too.
CASES = [
    *((name, {}) for name in SCHEMES),
    ("denseformer", {"dilation": 2}),
    ("denseformer", {"period": 2}),
    ("denseformer", {"dilation": 2, "period": 3}),
    ("laurel_lr", {"rank": 3}),
    ("laurel_pa", {"rank": 2, "k": 1}),
    ("laurel_pa", {"k": 5}),
    *(("hyper_connections", {"n": n}) for n in (1, 2)),
    *(("dynamic_hyper_connections", {"n": n}) for n in (1, 2, 10)),
    ("mhc", {"n": 2, "sinkhorn_rounds": 3}),
    *(("block_attention_residuals", {"groups": groups}) for groups in (1, 4, 6)),
    ("mudd", {"deep": True}),
]


def name_of(case):
    return case if isinstance(case, str) else ",".join(f"{name}={value}" for name, value in case.items())


def model_of(name, fields=(), seed=0, **config):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 30, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
    config = DCAConfig(**{**sizes, "residual_scheme": "standard", **config})
    if name is None:
        return DCAForCausalLM(config)
    config.variant, config.variant_fields = name, VARIANTS[name].settings(dict(fields))
    return VARIANTS[name].model(DCAForCausalLM)(config)


def connections(model):
    """The parameters of a scheme, by name."""
    return {
        f"{place}.{name}": parameter
        for place, module in model.named_modules()
        if isinstance(module, Connection)
        for name, parameter in module.named_parameters(recurse=False)
    }


@torch.no_grad()
def randomize(model, std=0.3):
    """As after a long training."""
    torch.manual_seed(1)
    for parameter in connections(model).values():
        parameter.add_(std * torch.randn_like(parameter))
    return model


# Slow renderings of the equations


class Modules:
    """The modules of the blocks, each with its norm: `attention(i, q, k, v)` and `mlp(i, x)`, of tensors `(batch, sequence, d)`."""

    def __init__(self, model):
        self.layers = model.model.layers
        self.settings = model.model.scheme
        self.output = model.model.residual.connection
        positions = torch.arange(BATCH.shape[1])[None]
        self.x_0 = model.model.embed_tokens(BATCH)
        self.position_embeddings = model.model.rotary_emb(self.x_0, positions)

    def attention(self, i, query, key=None, value=None):
        norm = self.layers[i].input_layernorm
        inputs = [norm(query if each is None else each) for each in (query, key, value)]
        return self.layers[i].self_attn(*inputs, position_embeddings=self.position_embeddings)[0]

    def mlp(self, i, x):
        return self.layers[i].mlp(self.layers[i].post_attention_layernorm(x))

    def block(self, i, x):
        x = x + self.attention(i, x)
        return x + self.mlp(i, x)

    def modules(self):
        """Each attention and each feed-forward module, and its connection."""
        for i, layer in enumerate(self.layers):
            yield (lambda x, i=i: self.attention(i, x)), getattr(layer, "attention_connection", None)
            yield (lambda x, i=i: self.mlp(i, x)), getattr(layer, "mlp_connection", None)


def normalized(x, axes=(-1,)):
    return x / (x.square().mean(axes, keepdim=True) + 1e-6).sqrt()


def denseformer(f):
    k, p = f.settings.dilation, f.settings.period
    after = [*(layer.average for layer in f.layers[1:]), f.output]
    streams, y = [f.x_0], f.x_0
    for i in range(1, BLOCKS + 1):
        streams.append(f.block(i - 1, y))
        y = streams[i]
        if i % p == 0:
            seen = [j for j in range(i + 1) if j % k == i % k]
            assert len(after[i - 1].a) == len(seen)
            y = sum(after[i - 1].a[position] * streams[j] for position, j in enumerate(seen))
    return y


def laurel_rw(f):
    x = f.x_0
    for module, connection in f.modules():
        a, b = 2 * connection.w.exp() / connection.w.exp().sum()
        x = a * module(x) + b * x
    return x


def laurel_lr(f):
    x = f.x_0
    for module, connection in f.modules():
        x = module(x) + torch.einsum("er,rd,bsd->bse", connection.B, connection.A, x) + x
    return x


def laurel_pa(f):
    streams = [f.x_0]
    for i, (module, connection) in enumerate(f.modules()):
        x = module(streams[i]) + streams[i]
        assert len(connection.g) == min(f.settings.k, i + 1)
        for j, g in enumerate(connection.g):
            x = x + g * torch.einsum("er,rd,bsd->bse", connection.B, connection.A, streams[i - j])
        streams.append(x)
    return streams[-1]


def hyper_connections(f):
    n = f.settings.n
    streams = [f.x_0] * n
    for module, c in f.modules():
        A_m, A_r, B = [c.A_m[i] for i in range(n)], [[c.A_r[i, j] for j in range(n)] for i in range(n)], list(c.B)
        if f.settings.__class__.__name__ == "DynamicHyperConnections":
            for i in range(n):
                row = normalized(streams[i])
                A_m[i] = c.s_a * torch.tanh(row @ c.W_m) + A_m[i]
                B[i] = c.s_b * torch.tanh(row @ c.W_b) + B[i]
                for j in range(n):
                    A_r[i][j] = c.s_a * torch.tanh(row @ c.W_r[:, j, None]) + A_r[i][j]
        output = module(sum(A_m[i] * streams[i] for i in range(n)))
        streams = [B[j] * output + sum(A_r[i][j] * streams[i] for i in range(n)) for j in range(n)]
    return sum(streams)


def mhc(f):
    n = f.settings.n
    streams = [f.x_0] * n
    for module, c in f.modules():
        v = normalized(torch.cat(streams, dim=-1))
        P = [1 / (1 + torch.exp(-(c.a_p * (v @ c.W_p[:, i, None]) + c.b_p[i]))) for i in range(n)]
        out = [2 / (1 + torch.exp(-(c.a_o * (v @ c.W_o[:, i, None]) + c.b_o[i]))) for i in range(n)]
        M = [[torch.exp(c.a_r * (v @ c.W_r[:, n * j + i, None]) + c.b_r[j, i]) for i in range(n)] for j in range(n)]
        for _ in range(f.settings.sinkhorn_rounds):
            M = [[M[j][i] / sum(M[j]) for i in range(n)] for j in range(n)]
            columns = [sum(M[j][i] for j in range(n)) for i in range(n)]
            M = [[M[j][i] / columns[i] for i in range(n)] for j in range(n)]
        output = module(sum(P[i] * streams[i] for i in range(n)))
        streams = [sum(M[j][i] * streams[i] for i in range(n)) + out[j] * output for j in range(n)]
    return sum(streams)


def over_depth(attention, entries):
    if not isinstance(attention, Connection):
        (entry,) = entries
        return entry
    scores = [torch.exp((attention.w * attention.g * normalized(entry)).sum(-1, keepdim=True)) for entry in entries]
    return sum(score * entry for score, entry in zip(scores, entries)) / sum(scores)


def attention_residuals(f):
    values = [f.x_0]
    attentions = [each for layer in f.layers for each in (layer.attention_over_depth, layer.mlp_over_depth)]
    for (module, _), attention in zip(f.modules(), attentions):
        values.append(module(over_depth(attention, values)))
    return over_depth(f.output, values)


def block_attention_residuals(f):
    count = 2 * BLOCKS
    groups = f.settings.groups or min(8, count)
    group_of = [layer * groups // count for layer in range(count)]
    attentions = [each for layer in f.layers for each in (layer.attention_over_depth, layer.mlp_over_depth)]
    outputs = []
    for layer, (module, _) in enumerate(f.modules()):
        sums = [sum(output for output, group in zip(outputs, group_of) if group == each) for each in range(groups)]
        entries = [f.x_0, *sums[: group_of[layer]]]
        if layer and group_of[layer - 1] == group_of[layer]:
            entries.append(sums[group_of[layer]])
        outputs.append(module(over_depth(attentions[layer], entries)))
    sums = [sum(output for output, group in zip(outputs, group_of) if group == each) for each in range(groups)]
    return over_depth(f.output, [f.x_0, *sums])


def mudd(f):
    streams, (q, k, v, r) = [f.x_0], 4 * [f.x_0]
    for i in range(1, BLOCKS + 1):
        x = r + f.attention(i - 1, q, k, v)
        streams.append(x + f.mlp(i - 1, x))
        dense, ways = (f.output, 1) if i == BLOCKS else (f.layers[i].dense, 4)
        assert dense.W_1.shape == (WIDTH, ways * (i + 1)) and dense.W_2.shape == (ways * (i + 1),) * 2
        z = normalized(streams[i]) @ dense.W_1
        A = (z * (1 + torch.erf(z / math.sqrt(2))) / 2) @ dense.W_2
        inputs = []
        for way in range(ways):
            if f.settings.deep:
                total = sum(
                    (A[..., way * (i + 1) + j, None] + dense.a[way, j]) * normalized(streams[j]) for j in range(i + 1)
                )
                inputs.append(streams[i] + dense.z[way] * normalized(total))
            else:
                inputs.append(
                    sum((A[..., way * (i + 1) + j, None] + dense.a[way, j]) * streams[j] for j in range(i + 1))
                )
        q, k, v, r = inputs if ways == 4 else 4 * inputs
    return r


def resformer(f):
    x, first = f.x_0, None
    for i, layer in enumerate(f.layers):
        normed = layer.input_layernorm(x)
        values = normed @ layer.self_attn.v_proj.weight.T
        first = values if i == 0 else first
        mixed = values if i == 0 else layer.mix.l[0] * first + layer.mix.l[1] * values
        x = x + layer.self_attn(normed, normed, mixed, position_embeddings=f.position_embeddings)[0]
        x = x + f.mlp(i, x)
    return x


def two_scalar_skip(f):
    x = f.x_0
    for i, layer in enumerate(f.layers):
        x = f.block(i, layer.skip.r * x + layer.skip.s * f.x_0)
    return x


REFERENCES = {name: globals()["hyper_connections" if name.endswith("hyper_connections") else name] for name in SCHEMES}


@torch.no_grad()
@pytest.mark.parametrize("name, fields", CASES, ids=name_of)
def test_scheme_is_a_slow_rendering_of_its_equations(name, fields):
    model = randomize(model_of(name, fields, initializer_range=0.2).double().eval())
    expected = model.model.norm(REFERENCES[name](Modules(model)))
    plain = model_of(None, initializer_range=0.2).double().eval().model(BATCH).last_hidden_state
    found = model.model(BATCH).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found - plain).square().mean().sqrt() > 0.02  # what is compared is not the standard transformer


def test_new_stream_is_the_row_of_the_mixing_matrix():
    """Published code has mHC's matrix transposed, or forgets it."""
    connection = ManifoldConnection(n=3, index=1, width=4, rounds=20)
    with torch.no_grad():
        # Row j takes the old stream j + 1.
        connection.b_r.copy_(20 * torch.eye(3)[[1, 2, 0]])
    old = torch.randn(2, 5, 3, 4)
    (new,) = connection((old,), torch.zeros_like)
    torch.testing.assert_close(new, old[:, :, [1, 2, 0]], rtol=1e-4, atol=1e-5)


def test_mixing_matrix_is_doubly_stochastic():
    torch.manual_seed(0)
    M = sinkhorn(torch.randn(7, 4, 4), 20)
    assert (M > 0).all()
    torch.testing.assert_close(M.sum(-1), torch.ones(7, 4), rtol=0, atol=1e-3)
    torch.testing.assert_close(M.sum(-2), torch.ones(7, 4), rtol=0, atol=1e-5)
    assert sinkhorn(torch.full((2, 2), 1e4), 20).isfinite().all()


# At their start


#: What does not start as the standard transformer, and by how much the logits differ at the least and at the most, as
#: a share of their size.
DIFFERENT = {
    "hyper_connections": (0.01, 1.0),
    "dynamic_hyper_connections": (0.01, 1.0),
    "mudd,deep": (0.001, 0.1),
    "resformer": (0.01, 1.0),
}


def difference_at_the_start(name, fields):
    # (The sum of n streams is n times as large: but for the epsilon, the norm of the output takes that away.)
    model, plain = (model_of(each, fields, norm_eps=1e-12).eval() for each in (name, None))
    with torch.no_grad():
        logits, expected = model(BATCH).logits, plain(BATCH).logits
    return ((logits - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name, fields", CASES, ids=name_of)
def test_start(name, fields):
    key = name + ",deep" * bool(fields.get("deep"))
    if key in DIFFERENT and fields.get("n") != 1:
        low, high = DIFFERENT[key]
        assert low < difference_at_the_start(name, fields) < high
    else:
        assert difference_at_the_start(name, fields) < 1e-5
    if name.endswith("hyper_connections"):
        assert difference_at_the_start(name, {**fields, "scale_output_init": False}) < 1e-5


@pytest.mark.parametrize("name", SCHEMES)
def test_backbone_is_that_of_the_standard_transformer_of_the_same_seed(name):
    model, plain = model_of(name), model_of(None)
    own = connections(model)
    assert own
    found = {key: value for key, value in model.state_dict().items() if key not in own}
    assert found.keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        scaled = name.endswith("hyper_connections") and key.endswith(("o_proj.weight", "down_proj.weight"))
        torch.testing.assert_close(found[key], 2.0 * value if scaled else value, rtol=0, atol=0)  # sqrt(4)


@pytest.mark.parametrize("name, fields", CASES, ids=name_of)
def test_gradients_reach_every_parameter_after_one_step(name, fields):
    model = model_of(name, fields, norm_eps=1e-2, initializer_range=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(BATCH, labels=BATCH).loss.backward()
        optimizer.step()
    without = {key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    # The columns of the last mixing matrix sum to 1, and the output is the sum of the streams: it is the same whatever
    # that matrix is, and what comes is rounding.
    dead = (
        {f"model.layers.{BLOCKS - 1}.mlp_connection.{each}" for each in ("W_r", "a_r", "b_r")}
        if name == "mhc"
        else set()
    )
    assert without <= dead


# What a model is expected to do


@torch.no_grad()
@pytest.mark.parametrize("name, fields", CASES, ids=name_of)
def test_generation_with_a_cache(name, fields):
    model = randomize(model_of(name, fields, initializer_range=0.2).eval())
    whole = model(BATCH[:, :7]).logits
    cache, parts = DynamicCache(config=model.config), []
    for piece in BATCH[:, :7].split([3, 1, 2, 1], dim=1):
        parts.append(model(piece, **{CACHE_NAME: cache}, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, fresh = (model.generate(BATCH[:1, :4], use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, fresh) and cached.shape == (1, 10)


@pytest.mark.parametrize("name", SCHEMES)
def test_gradient_checkpointing(name):
    gradients = []
    for checkpointing in (False, True):
        model = randomize(model_of(name)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        model(BATCH, labels=BATCH, use_cache=False).loss.backward()
        gradients.append({key: value.grad for key, value in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("name", SCHEMES)
def test_hidden_states_are_the_inputs_of_the_blocks_and_the_output(name):
    model = randomize(model_of(name)).eval()
    outputs = model.model(BATCH, output_hidden_states=True)
    assert len(outputs.hidden_states) == BLOCKS + 1
    assert all(each.shape == (3, 8, WIDTH) for each in outputs.hidden_states)
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


@pytest.mark.parametrize("name, fields", CASES, ids=name_of)
def test_bfloat16_and_autocast(name, fields):
    """Residual streams keep the type of the embeddings, whatever the type of the modules."""
    model = randomize(model_of(name, fields), std=0.1).eval()
    reference = model(BATCH, labels=BATCH).loss
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(BATCH, output_hidden_states=True).hidden_states
        loss = model(BATCH, labels=BATCH).loss
    assert all(each.dtype == torch.float32 for each in hidden)
    loss.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=0.02)
    half = model.to(torch.bfloat16)
    half(BATCH, labels=BATCH).loss.backward()
    assert half.model(BATCH).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize("name, fields", CASES, ids=name_of)
def test_saved_and_loaded(name, fields, tmp_path):
    model = randomize(model_of(name, fields)).eval()
    model.save_pretrained(tmp_path)
    loaded, told = VARIANTS[name].model(DCAForCausalLM).from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert loaded.model.scheme == model.model.scheme
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(BATCH).logits, model(BATCH).logits, rtol=0, atol=0)


# Parameters


def added_parameters(name, blocks, width, **fields):
    """What a scheme adds, by its formula."""
    modules, c = 2 * blocks, {**VARIANTS[name].settings(fields)}
    n = c.get("n")
    if name == "denseformer":
        return sum(i // c["dilation"] + 1 for i in range(c["period"], blocks + 1, c["period"]))
    if name == "mudd":
        hidden = [4 * (i + 1) for i in range(1, blocks)] + [blocks + 1]
        z = (4 * (blocks - 1) + 1) * width if c["deep"] else 0
        return sum(k * width + k**2 + k for k in hidden) + z
    return {
        "laurel_rw": lambda: 2 * modules,
        "laurel_lr": lambda: 2 * c["rank"] * width * modules,
        "laurel_pa": lambda: 2 * c["rank"] * width * modules + sum(min(c["k"], i + 1) for i in range(modules)),
        "hyper_connections": lambda: modules * (n + n * n + n),
        "dynamic_hyper_connections": lambda: modules * (2 * n + n * n + 2 * width + n * width + 2),
        "mhc": lambda: modules * (n * width * (2 * n + n * n) + 2 * n + n * n + 3),
        "attention_residuals": lambda: modules * 2 * width,
        "block_attention_residuals": lambda: modules * 2 * width,
        "resformer": lambda: 2 * (blocks - 1),
        "two_scalar_skip": lambda: 2 * blocks,
    }[name]()


@pytest.mark.parametrize("name, fields", CASES, ids=name_of)
def test_parameters_are_those_of_the_formulas(name, fields):
    found = sum(value.numel() for value in connections(model_of(name, fields)).values())
    assert found == added_parameters(name, BLOCKS, WIDTH, **fields)
    assert model_of(name, fields).num_parameters() == model_of(None).num_parameters() + found


def added_at_512(name, **fields):
    with torch.device("meta"):
        model = model_of(name, fields, hidden_size=512, num_hidden_layers=6)
        return sum(value.numel() for value in connections(model).values())


def test_parameters_are_the_papers():
    """What table 5 of the paper of DCA has them add to 6 blocks of 512, to its two decimals of a million."""
    assert round(added_at_512("laurel_pa") / 1e6, 2) == 0.10  # 49.75 after 49.65
    assert round(added_at_512("laurel_lr") / 1e6, 2) == 0.10
    assert round(added_at_512("denseformer") / 1e6, 2) == 0.00
    # 49.68 after 49.65, which the biases and norms of their transformer make 49,653,040: 22,000 to 32,000.
    assert 22_000 < added_at_512("dynamic_hyper_connections", n=2) < 32_000


# Learning rates and weight decays


def groups_of(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def optimizer_of(model, **options):
    ones = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": ones, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    set_connection_groups(optimizer, model)
    return groups_of(model, optimizer)


STATIC = ("a", "w", "g", "A_m", "A_r", "B", "b_p", "b_o", "b_r", "l", "r", "s", "z")


@pytest.mark.parametrize("name, fields", CASES, ids=name_of)
def test_no_decay_of_static_parts_and_the_learning_rates_of_the_papers(name, fields):
    model = model_of(name, fields)
    own, groups = connections(model), optimizer_of(model)
    assert len(groups) == len(list(model.named_parameters()))
    for key, (learning_rate, decay) in groups.items():
        last = key.rpartition(".")[2]
        if key not in own:
            assert (learning_rate, decay) == (0.02, 0.1 if model.get_parameter(key).ndim >= 2 else 0.0)
            continue
        static = last in STATIC and not (name == "laurel_lr" or name == "laurel_pa" and last == "B")
        static = static and not (name.endswith("attention_residuals") and last == "w")
        assert decay == (0.0 if static else 0.1), key
        assert learning_rate == pytest.approx(2e-4 if name == "two_scalar_skip" and last == "r" else 0.02), key


def test_learning_rates_and_decays_are_settings():
    fields = {"connection_learning_rate": 0.5, "static_weight_decay": 0.3, "dynamic_weight_decay": 0.4}
    model = model_of("dynamic_hyper_connections", fields)
    groups = optimizer_of(model)
    assert groups["model.layers.0.attention_connection.A_r"] == (0.01, 0.3)
    assert groups["model.layers.0.attention_connection.W_r"] == (0.01, 0.4)
    assert groups["model.layers.0.mlp.up_proj.weight"] == (0.02, 0.1)
    groups = optimizer_of(model_of("two_scalar_skip", {"connection_learning_rate": 10.0, "r_learning_rate": 0.5}))
    assert groups["model.layers.1.skip.r"] == (0.1, 0.0) and groups["model.layers.1.skip.s"] == (0.2, 0.0)


def test_decay_in_a_run(room, monkeypatch):
    """Without gradients, all that is left of a step is the decay."""
    begun, training_step = {}, RunTrainer.training_step

    def step_without_gradients(self, model, *args, **kwargs):
        begun.setdefault("weights", {name: value.clone() for name, value in model.state_dict().items()})
        loss = training_step(self, model, *args, **kwargs)
        for parameter in model.parameters():
            parameter.grad.zero_()
        begun["rates"] = [group["lr"] for group in self.optimizer.param_groups]
        return loss

    monkeypatch.setattr(RunTrainer, "training_step", step_without_gradients)
    options = ("--max_steps=3", "--save_strategy=no", "--output_dir=run", "--learning_rate=0.5", "--weight_decay=0.2")
    call(causal_lm.main, TEXT_RUN, *options, "--variant=laurel_pa", "--variant_fields={connection_learning_rate: 0.1}")
    history = json.loads(Path("run/trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    kept, of_connections = 1.0, 1.0
    for rate in rates:
        kept *= 1 - 0.2 * rate
        of_connections *= 1 - 0.2 * 0.1 * rate
    for name, value in weights(Path("run")).items():
        share = 1.0 if name.endswith("norm.weight") else kept
        if "connection" in name:
            share = 1.0 if name.endswith(".g") else of_connections
        torch.testing.assert_close(value, share * begun["weights"][name], rtol=1e-5, atol=1e-7)
    assert kept < 0.95 and len(set(begun["rates"])) == 2


def test_optimizer_without_such_groups_is_refused():
    model = model_of("resformer")
    others = torch.optim.AdamW(model.lm_head.parameters())
    with pytest.raises(UserError, match="`optim` is a AdamW, which does not support separate learning rates"):
        set_connection_groups(others, model)
    before = [dict(group) for group in others.param_groups]
    set_connection_groups(others, model_of(None))
    assert [dict(group) for group in others.param_groups] == before


# The commands


@pytest.mark.parametrize("name", SCHEMES)
def test_run_and_evaluation(room, name):
    fields = VARIANTS[name].settings({})
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_steps=2", "--save_strategy=no", f"--variant={name}")
    config = json.loads(Path("run/config.json").read_text())
    assert (config["variant"], config["variant_fields"], config["residual_scheme"]) == (name, fields, "standard")
    assert config["architectures"] == [VARIANTS[name].model(DCAForCausalLM).__name__]
    assert config["auto_map"].keys() == {"AutoConfig"}
    call(evaluate.main, "run", "--device=cpu", "--output=figures.json")
    figures, results = (json.loads(Path(file).read_text()) for file in ("figures.json", "run/all_results.json"))
    assert figures["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-6)
    assert figures["parameters"] > model_of(None, vocab_size=300, num_hidden_layers=2).num_parameters()
    card = Path("run/README.md").read_text()
    assert f"the residual scheme `{name}`" in card and "scheme is not DeepCrossAttention's" in card
    assert "from_pretrained" not in card and "residual scheme of DeepCrossAttention" not in card


@pytest.mark.parametrize(
    "name, fields", [("dynamic_hyper_connections", "{n: 2}"), ("two_scalar_skip", None), ("mudd", None)]
)
def test_run_is_resumed_as_if_it_had_not_been_stopped(room, name, fields):
    options = [TEXT_RUN, f"--variant={name}", *([f"--variant_fields={fields}"] if fields else [])]
    call(causal_lm.main, *options, "--output_dir=whole")
    call(causal_lm.main, *options, "--output_dir=run", "--max_steps=2")
    call(causal_lm.main, *options, "--output_dir=run", "--resume_from_checkpoint")
    assert_same_weights(room / "whole", room / "run")


def test_settings_stand_in_the_file_of_a_run(room, capsys):
    content = yaml.safe_load(Path(TEXT_RUN).read_text())
    content["training"] |= {"variant": "hyper_connections", "variant_fields": {"n": 2}, "max_steps": 2}
    Path(TEXT_RUN).write_text(yaml.safe_dump(content))
    call(causal_lm.main, TEXT_RUN, "--output_dir=run")
    assert weights(Path("run"))["model.layers.0.mlp_connection.A_r"].shape == (2, 2)
    assert yaml.safe_load(Path("run/run.yaml").read_text())["training"]["variant_fields"] == {"n": 2}
    others = ("--output_dir=run", "--variant_fields={n: 4}", "--max_steps=4", "--resume_from_checkpoint")
    line = refusal(capsys, causal_lm.main, TEXT_RUN, *others)
    assert "`variant_fields`" in line and "resume it with that" in line
    # What takes it for a model to be used tells that it is none.
    assert "a variant for a study ('hyper_connections')" in refusal(capsys, publish.main, "run", "me/model")
    assert "no generalized residuals" in refusal(capsys, depth_weights.main, "run", "--output_dir=weights")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variant=mch"], ["`variant` is 'mch'", "did you mean 'mhc'?"]),
        (["--variant=mhc", "--variant_fields={m: 4}"], ["unknown field 'm'", "Known:", "sinkhorn_rounds"]),
        (["--variant=mhc", "--variant_fields={n: 1}"], ["`n` of `variant_fields` is 1", "at least 2"]),
        (["--variant=mhc", "--variant_fields={n: 2.5}"], ["`n` of `variant_fields` is 2.5", "a whole number"]),
        (["--variant=mhc", "--variant_fields={n: many}"], ["`n` of `variant_fields` is 'many'", "a whole number"]),
        (["--variant=mhc", "--variant_fields={n: true}"], ["`n` of `variant_fields` is True", "a whole number"]),
        (["--variant=mhc", "--variant_fields=4"], ["`variant_fields` is 4", "must map settings to values"]),
        (["--variant=mhc", "--variant_fields={n: 4"], ["`variant_fields` is '{n: 4'", "must map settings to values"]),
        (["--variant_fields={n: 4}"], ["`variant` is not set"]),
        (["--variant=last_4", "--variant_fields={n: 4}"], ["has no fields"]),
        (["--variant=mhc", "--residual_scheme=dca"], ["`variant` is 'mhc'", "`residual_scheme` is 'dca'"]),
        (["--variant=mhc", "--last_k=2"], ["`last_k` is 2"]),
        (["--variant=mhc", "--parallel_blocks=true"], ["`parallel_blocks`", "leave it out"]),
        (["--variant=mhc", "--baseline=grn_v1"], ["`variant` is 'mhc'", "leave `baseline` out"]),
        (["--variant=mhc", "--push_to_hub"], ["`variant` is 'mhc'", "leave `push_to_hub` out"]),
        (["--variant=mudd", "--variant_fields={deep: 1}"], ["`deep` of `variant_fields` is 1", "true or false"]),
        (["--variant=mudd", "--variant_fields={dynamic_weight_decay: -1}"], ["is -1", "at least 0"]),
        (["--variant=mudd", "--variant_fields={connection_learning_rate: .inf}"], ["is inf", "finite"]),
        (["--variant=mudd", "--variant_fields={static_weight_decay: .nan}"], ["is nan", "finite"]),
        (["--variant=denseformer", "--variant_fields={period: 7}"], ["`period` is 7", "2 blocks"]),
        (["--variant=denseformer", "--variant_fields={dilation: 0}"], ["is 0", "at least 1"]),
        (["--variant=laurel_lr", "--variant_fields={k: 2}"], ["unknown field 'k'"]),
        (["--variant=block_attention_residuals", "--variant_fields={groups: 5}"], ["is 5", "4 layers"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_refusals(room, capsys, arguments, words):
    line = refusal(capsys, causal_lm.main, TEXT_RUN, *arguments)
    assert not [word for word in words if word not in line], line


def test_numbers_as_yaml_writes_them():
    """YAML 1.1 takes 1e-3 for a word."""
    settings = VARIANTS["mudd"].settings({"dynamic_weight_decay": "1e-3", "connection_learning_rate": 2})
    assert settings["dynamic_weight_decay"] == 0.001 and settings["connection_learning_rate"] == 2.0


def test_scheme_of_an_image_classifier(room):
    write_images(room / "images")
    call(image_classification.main, IMAGE_RUN, "--output_dir=run", "--max_steps=2", "--variant=mhc")
    assert "model.layers.1.mlp_connection.b_r" in weights(Path("run"))
    call(evaluate.main, "run", "--device=cpu")


def test_scheme_needs_the_standard_transformer():
    config = DCAConfig(vocab_size=30, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(ValueError, match="`residual_scheme` is 'dca'.*must be 'standard'"):
        VARIANTS["mhc"].model(DCAForCausalLM)(config)
