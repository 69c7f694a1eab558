"""
Choose the form of the gate of generalized residuals by measurement: many small language models, trained side by side.

    python -m training.gate_trial data FILE.npz [--vocab_size 1024]
    python -m training.gate_trial train FILE.npz OUTPUT_DIR [--widths 128 64] [--variants NAME ...] [--minutes 5]
    python -m training.gate_trial report OUTPUT_DIR

All learning rates and seeds of a variant are one batch of models, of parameters `(runs, ...)`: a GPU trains dozens of them in
the time of one. The model is [`~modeling_dca.DCAForCausalLM`] (parameters have its names, and a slice of them loads into it), but for
how a block's inputs are formed from its stack, which is what the variants differ in.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from modeling_dca import DCAConfig, DCAForCausalLM
from training.results.figures import WIDTH, plt, styles_of
from training.studies.differences import differences
from training.studies.report import differences_note, make_differences_table, write_record
from training.support.errors import UserError
from training.support.files import read_json
from training.text.blocks import PackedBlocks
from training.text.documents import load_text, texts
from training.text.fields import TextDataArguments
from training.text.tokenizer import train_tokenizer


LAYERS, HEAD_DIM, BLOCK, BATCH = 6, 32, 128, 16
STEPS, WARMUP, COOLDOWN = 3000, 500, 900
BETAS, WEIGHT_DECAY, EPSILON, MAX_NORM = (0.9, 0.98), 0.1, 1e-8, 1.0
RATES = {128: (0.0015, 0.003, 0.006), 64: (0.003, 0.006, 0.012)}
SEEDS = (1, 2, 3)
EVAL_STEPS, EVAL_BLOCKS, NORM_EPS = 250, 256, 1e-6

#: What the figure shows, and how it calls it: the first is compared with, the second is what is built.
DRAWN = {
    "standard": "transformer",
    "normalised, rms": "DCA",
    "b alone": "DCA without gates",
}

Parameters = dict[str, Tensor]


class Variant(NamedTuple):
    """What a block's inputs are, given its stack."""

    separate_norms: bool = True  # queries, keys and values have a norm each, as in DCA
    weights: bool = True  # `b` is learned; otherwise the stack is summed
    gate: Callable[[Tensor], Tensor] | None = None  # what of an entry the gate sees
    bias_inside: bool = False
    gate_rate: float = 1.0


def raw(entry: Tensor) -> Tensor:
    return entry


def rms(entry: Tensor) -> Tensor:
    return entry * torch.rsqrt(entry.square().mean(-1, keepdim=True) + NORM_EPS)


def layer_norm(entry: Tensor) -> Tensor:
    return rms(entry - entry.mean(-1, keepdim=True))


def centred_rms(entry: Tensor) -> Tensor:
    """As if the mean had been taken from `w`, and not from the entry: the size is still that of the whole entry."""
    scale = torch.rsqrt(entry.square().mean(-1, keepdim=True) + NORM_EPS)
    return (entry - entry.mean(-1, keepdim=True)) * scale


#: In the order of what they are worth, where the time is short.
VARIANTS = {
    "standard": Variant(separate_norms=False, weights=False),
    "normalised, rms": Variant(gate=rms),
    "bias inside": Variant(gate=layer_norm, bias_inside=True),
    "literal": Variant(gate=raw),
    "b alone": Variant(),
    "two more norms": Variant(weights=False),
    "normalised, layer norm": Variant(gate=layer_norm),
    "normalised, rms, w centred": Variant(gate=centred_rms),
    "normalised, rms, slow gates": Variant(gate=rms, gate_rate=0.125),
}


def norm(hidden_states: Tensor, weight: Tensor) -> Tensor:
    return rms(hidden_states) * weight[:, None]


def linear(hidden_states: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(hidden_states, weight.mT)


def combined(stack: list[Tensor], residual: str, p: Parameters, variant: Variant, outputs: int) -> list[Tensor]:
    """The inputs that are formed from a stack of entries `(runs, tokens, width)`."""
    if not variant.weights:
        return [sum(stack)] * outputs
    b, gate = 1 + p[f"{residual}.delta"], p.get(f"{residual}.gate")
    seen = [variant.gate(entry) for entry in stack] if variant.gate else stack
    inputs = []
    for output in range(outputs):
        total = 0.0
        for i, entry in enumerate(stack):
            weight = b[:, None, output, i]
            if variant.gate:
                pre_activation = (seen[i] * gate[:, None, output]).sum(-1, keepdim=True)
                if variant.bias_inside:
                    weight = (weight + pre_activation).clamp(min=0)
                else:
                    weight = weight + pre_activation.clamp(min=0)  # clamp: open at exactly 0
            total = total + weight * entry
        inputs.append(total)
    return inputs


def rotary(device) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, device=device) / HEAD_DIM)
    angles = torch.arange(BLOCK, device=device)[:, None] * frequencies
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat((-second, first), -1) * sin


def attention(inputs: list[Tensor], layer: str, p: Parameters, position: tuple[Tensor, Tensor]) -> Tensor:
    runs, tokens, width = inputs[0].shape
    heads = [
        linear(states, p[f"{layer}.self_attn.{name}_proj.weight"])
        .view(runs * tokens // BLOCK, BLOCK, width // HEAD_DIM, HEAD_DIM)
        .transpose(1, 2)
        for name, states in zip("qkv", inputs)
    ]
    query, key = (rotate(states, *position) for states in heads[:2])
    mixed = scaled_dot_product_attention(query, key, heads[2], is_causal=True)
    mixed = mixed.transpose(1, 2).reshape(runs, tokens, width)
    return linear(mixed, p[f"{layer}.self_attn.o_proj.weight"])


def logits_of(p: Parameters, input_ids: Tensor, variant: Variant, position: tuple[Tensor, Tensor]) -> Tensor:
    """Logits `(runs, blocks, BLOCK, vocabulary)` of blocks of tokens `(runs, blocks, BLOCK)`."""
    runs, vocabulary, width = p["model.embed_tokens.weight"].shape
    offset = torch.arange(runs, device=input_ids.device)[:, None, None] * vocabulary
    embedding = p["model.embed_tokens.weight"].reshape(-1, width)
    stack = [torch.nn.functional.embedding(input_ids + offset, embedding).view(runs, -1, width)]
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        inputs = combined(stack, f"{layer}.residual", p, variant, 3)
        names = ("input", "key", "value") if variant.separate_norms else ("input",) * 3
        normed = [norm(states, p[f"{layer}.{name}_layernorm.weight"]) for name, states in zip(names, inputs)]
        output = attention(normed, layer, p, position)
        hidden_states = norm(inputs[0] + output, p[f"{layer}.post_attention_layernorm.weight"])
        hidden_states = gelu(linear(hidden_states, p[f"{layer}.mlp.up_proj.weight"]))
        stack.append(output + linear(hidden_states, p[f"{layer}.mlp.down_proj.weight"]))
    (hidden_states,) = combined(stack, "model.residual", p, variant, 1)
    logits = linear(norm(hidden_states, p["model.norm.weight"]), p["lm_head.weight"])
    return logits.view(*input_ids.shape, vocabulary)


def losses_of(p: Parameters, input_ids: Tensor, variant: Variant, position: tuple[Tensor, Tensor]) -> Tensor:
    """Mean next-token loss of each run, `(runs,)`, in nats."""
    logits = logits_of(p, input_ids, variant, position)[..., :-1, :]
    losses = cross_entropy(logits.flatten(0, 2), input_ids[..., 1:].flatten(), reduction="none")
    return losses.view(len(input_ids), -1).mean(1)


def initial_parameters(width: int, vocab_size: int, variant: Variant, seeds: list[int], device) -> Parameters:
    """The parameters of a model of each seed, `(runs, ...)`. A seed's backbone is the same in all variants."""
    config = DCAConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // HEAD_DIM,
        residual_scheme="dca",
    )
    states = []
    for seed in seeds:
        torch.manual_seed(seed)
        states.append(DCAForCausalLM(config).state_dict())
    left_out = [] if variant.separate_norms else ["key_layernorm", "value_layernorm"]
    left_out += [] if variant.weights else ["residual.delta"]
    left_out += [] if variant.gate else ["residual.gate"]
    return {
        name: torch.stack([state[name] for state in states]).to(device)
        for name in states[0]
        if not any(part in name for part in left_out)
    }


def learning_rate_factor(step: int) -> float:
    """Warm-up, then constant, then a linear cool-down to zero; `step` counts from 0."""
    return min((step + 1) / WARMUP, 1.0, (STEPS - step) / COOLDOWN)


class Optimizer:
    """
    AdamW with gradients clipped to a norm of 1, of each run for itself: one run's rate and norm are not another's.

    Args:
        p: the parameters at the start. They are kept side by side in one tensor, `flat`, `(runs, parameters of a run)`.
        rates: the learning rate of each run, `(runs,)`.
    """

    def __init__(self, p: Parameters, rates: Tensor, gate_rate: float):
        self.shapes = {name: value.shape for name, value in p.items()}
        self.sizes = [value[0].numel() for value in p.values()]
        self.flat = torch.cat([value.flatten(1) for value in p.values()], dim=1)
        like = {"device": self.flat.device, "dtype": self.flat.dtype}
        scale = [gate_rate if name.endswith("residual.gate") else 1.0 for name in p]
        decay = [0.0 if "norm" in name else WEIGHT_DECAY for name in p]
        self.scale, self.decay = (
            torch.cat([torch.full((size,), value, **like) for size, value in zip(self.sizes, values)])
            for values in (scale, decay)
        )
        self.rates = rates[:, None]
        self.first, self.second = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.steps = 0

    def parameters(self, flat: Tensor) -> Parameters:
        """The parameters by name, as views."""
        parts = flat.split(self.sizes, dim=1)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    @torch.no_grad()
    def step(self, grad: Tensor, factor: float) -> None:
        self.steps += 1
        grad = grad * (MAX_NORM / (grad.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
        self.first.lerp_(grad, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
        corrections = [1 - beta**self.steps for beta in BETAS]
        update = self.first / ((self.second / corrections[1]).sqrt_().add_(EPSILON)) / corrections[0]
        rate = self.rates * self.scale * factor
        self.flat.mul_(1 - rate * self.decay).sub_(rate * update)


def batches(blocks: np.ndarray, seeds: list[int], device) -> Iterator[Tensor]:
    """The blocks of each step, `(runs, BATCH, BLOCK)`: a seed's own order, the same for all variants and rates."""
    orders = {seed: np.random.default_rng(seed).permutation(len(blocks)) for seed in seeds}
    data = torch.from_numpy(blocks).to(device)
    order = torch.stack([torch.from_numpy(orders[seed]) for seed in seeds]).to(device)
    for step in range(STEPS):
        yield data[order[:, step * BATCH : (step + 1) * BATCH]].long()


@torch.no_grad()
def evaluate(losses, flat: Tensor, blocks: Tensor, at_once: int = 32) -> list[float]:
    """Mean held-out loss of each run."""
    runs, total = len(flat), 0.0
    for part in blocks.split(at_once):
        total = total + losses(flat, part.long().expand(runs, *part.shape)) * len(part)
    return (total / len(blocks)).tolist()


def train(name: str, width: int, data, device: str, compiled: bool) -> dict:
    """Train all rates and seeds of a variant."""
    variant = VARIANTS[name]
    rates, seeds = zip(*((rate, seed) for rate in RATES[width] for seed in SEEDS))
    initial = initial_parameters(width, int(data["vocab_size"]), variant, list(seeds), device)
    position = rotary(device)
    optimizer = Optimizer(initial, torch.tensor(rates, device=device), variant.gate_rate)
    flat = optimizer.flat.requires_grad_()

    def losses(flat, input_ids):
        return losses_of(optimizer.parameters(flat), input_ids, variant, position)

    if compiled:
        losses = torch.compile(losses, dynamic=False)
    held_out = torch.from_numpy(data["held_out"]).to(device)
    held_out = held_out[: len(held_out) // 32 * 32]  # one shape, one graph
    sample = held_out[:: len(held_out) // EVAL_BLOCKS][:EVAL_BLOCKS]
    curve, started = [], time.perf_counter()
    for step, input_ids in enumerate(batches(data["train"], list(seeds), device)):
        (grad,) = torch.autograd.grad(losses(flat, input_ids).sum(), flat)
        optimizer.step(grad, learning_rate_factor(step))
        if (step + 1) % EVAL_STEPS == 0:
            curve.append([step + 1, evaluate(losses, flat, sample)])
    final = evaluate(losses, flat, held_out)
    runs = [
        {"rate": rate, "seed": seed, "loss": final[i], "curve": [[at, values[i]] for at, values in curve]}
        for i, (rate, seed) in enumerate(zip(rates, seeds))
    ]
    gates = {
        key: value.detach().square().mean((-1, -2)).sqrt().tolist()
        for key, value in optimizer.parameters(flat).items()
        if key.endswith("residual.gate")
    }
    device_name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    return {
        "variant": name, "width": width, "device": device_name, "torch": torch.__version__, "steps": STEPS,
        "seconds": time.perf_counter() - started, "held_out_blocks": len(held_out), "runs": runs, "gate_size": gates,
    }  # fmt: skip


def write_data(file: Path, vocab_size: int) -> None:
    """The standard library's source text as blocks of token ids: all but 5 % of its files to train on, those held out."""
    arguments = TextDataArguments(block_size=BLOCK)
    documents = dict(zip(("train", "held_out"), load_text(arguments, 0)))
    tokenizer = train_tokenizer(texts(documents["train"], "text"), vocab_size, BLOCK)
    blocks = {
        part: np.array(
            [block["input_ids"] for block in PackedBlocks(data, "text", tokenizer, BLOCK, vocab_size)], dtype=np.int16
        )
        for part, data in documents.items()
    }
    np.savez(file, vocab_size=vocab_size, held_out_documents=len(documents["held_out"]), **blocks)
    print({part: value.shape for part, value in blocks.items()}, len(documents["held_out"]), "documents held out")


def read_results(folder: Path) -> dict[int, dict]:
    """
    The held-out losses by width, from the largest on, variant, learning rate and seed.

    Raises:
        [`UserError`]: the folder holds no results.
    """
    results = [read_json(file, "width", "variant", "runs") for file in sorted(folder.glob("*-*.json"))]
    if not results:
        raise UserError(f"{str(folder)!r} holds no results: name the OUTPUT_DIR of an earlier `train`.")
    losses = {width: {} for width in sorted({result["width"] for result in results}, reverse=True)}
    for result in results:
        of_variant = losses[result["width"]].setdefault(result["variant"], {})
        for run in result["runs"]:
            of_variant.setdefault(run["rate"], {})[run["seed"]] = run["loss"]
    return losses


def best_rates(losses: dict[str, dict]) -> dict[str, float]:
    """The learning rate with the least mean loss of each variant."""
    return {name: min(of, key=lambda rate: np.mean(list(of[rate].values()))) for name, of in losses.items()}


def compare(folder: Path) -> dict[str, Any]:
    """The differences to the transformer, each variant at its best rate, as `training.compare` tells them of a study."""
    groups = {}
    for width, means in read_results(folder).items():
        rates = best_rates(means)
        groups[f"{LAYERS} x {width}"] = [
            {"variant": name, "seed": seed, "eval_loss": loss}
            for name in VARIANTS
            if name in means
            for seed, loss in means[name][rates[name]].items()
        ]
    return {
        "title": "The form of the gate",
        "baseline": "standard",
        "differences": differences(groups, "standard", "eval_loss"),
    }


def report(folder: Path) -> str:
    """
    Held-out loss by width, variant and rate: the mean over the seeds, their spread, and the difference at the best rate; and how
    sure the differences are, which are left in the folder, too.
    """
    lines = []
    for width, means in read_results(folder).items():
        best = best_rates(means)
        rates = sorted({rate for of in means.values() for rate in of})
        lines += [f"## {LAYERS} layers x {width}", ""]
        lines += ["| variant | " + " | ".join(map(str, rates)) + " | best against the transformer's best |"]
        lines += ["| --- |" + " --- |" * (len(rates) + 1)]
        for name in (name for name in VARIANTS if name in means):
            cells = []
            for rate in rates:
                losses = list(means[name].get(rate, {}).values())
                cells.append(f"{np.mean(losses):.3f} ± {np.std(losses, ddof=1):.3f}" if losses else "")
            difference = ""
            if "standard" in means:
                ours, theirs = means[name][best[name]], means["standard"][best["standard"]]
                pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
                difference = f"{np.mean(pairs):+.3f} ({', '.join(f'{pair:+.3f}' for pair in pairs)})"
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {difference} |")
        lines.append("")
    compared = compare(folder)
    write_record(compared, folder)
    cells = compared["differences"]
    lines += ["## How sure the differences are", "", make_differences_table(cells), ""]
    lines += [differences_note(cells, compared["baseline"], "held-out loss (nats per token)"), ""]
    return "\n".join(lines)


def draw(folder: Path, file: Path, dark: bool) -> None:
    """
    Draw the losses of the transformer, of DCA and of DCA without gates by learning rate, a panel for each width.

    Args:
        folder: of the results.
        file: where to save the picture.
        dark: whether it stands on a dark page.

    Raises:
        [`UserError`]: the folder lacks results of these variants, or the file cannot be written.
    """
    losses = read_results(folder)
    for width, means in losses.items():
        missing = [name for name in DRAWN if name not in means]
        if missing:
            raise UserError(
                f"{str(folder)!r} holds no results of {missing[0]!r} at a width of {width}: train it first."
            )
    base, ours = list(DRAWN)[:2]
    ink, page = ("#e6edf3", "#0d1117") if dark else ("black", "white")
    styles = styles_of(DRAWN.values())
    styles["transformer"]["color"] = ink
    gains = []
    with plt.rc_context(
        {"text.color": ink, "figure.facecolor": page, "axes.facecolor": page, "legend.facecolor": page}
        | dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), ink)
    ):
        figure, panels = plt.subplots(1, len(losses), figsize=(WIDTH, 4.6), squeeze=False, layout="constrained")
        for axes, (width, means) in zip(panels[0], losses.items()):
            for name, label in DRAWN.items():
                rates = sorted(means[name])
                points = [list(means[name][rate].values()) for rate in rates]
                axes.plot(rates, [np.mean(each) for each in points], label=label, **styles[label])
                alone = styles[label] | {"linestyle": "", "markersize": 3, "alpha": 0.6}
                for rate, each in zip(rates, points):
                    axes.plot([rate] * len(each), each, **alone)
            rates = best_rates(means)
            apart = [means[ours][rates[ours]][seed] - loss for seed, loss in means[base][rates[base]].items()]
            gains.append(f"{np.mean(apart):+.3f}")
            axes.set_title(
                f"{LAYERS} layers x {width}: DCA {gains[-1]} nats, each at its best of {len(means[base])} rates",
                fontsize=10,
            )
            axes.set_xscale("log")
            axes.set_xticks(rates := sorted(means[base]), [f"{rate:g}" for rate in rates])
            axes.minorticks_off()
            axes.set_xlabel("learning rate")
            axes.grid(alpha=0.3)
        panels[0, 0].set_ylabel("held-out loss (nats per token)")
        panels[0, 0].legend()
        seeds = {len(of_seed) for means in losses.values() for name in DRAWN for of_seed in means[name].values()}
        figure.suptitle(
            f"Small language models, {min(seeds)} seeds (small marks): DCA against the transformer\n"
            "It is the trial on which the form of the gate was chosen; it is not the paper's scale",
            fontsize=11,
        )
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, dpi=150, metadata={"Title": "; ".join(axes.get_title() for axes in panels[0])})
        except (OSError, ValueError) as error:  # (a ValueError where the name ends as no picture's does)
            raise UserError(f"The figure cannot be written to {str(file)!r}: {error}.") from error
        finally:
            plt.close(figure)


def train_all(file: Path, folder: Path, widths: list[int], variants: list[str], device: str, compiled: bool) -> None:
    """Train the variants in each of the widths, and write what came of each into the folder."""
    torch.set_float32_matmul_precision("high")
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(file) as content:
        data = {name: content[name] for name in content.files}
    for width in widths:
        for name in variants:
            result = train(name, width, data, device, compiled)
            result_file = folder / f"{width}-{'-'.join(name.replace(',', '').split())}.json"
            result_file.write_text(json.dumps(result, indent=1))
            print(
                f"{width} {name}: {result['seconds']:.0f} s",
                [round(run["loss"], 4) for run in result["runs"]],
                flush=True,
            )
