"""The models to compare, all of one shape, and the measures."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from modeling_dca import DCAConfig, DCAForCausalLM, GeneralizedResidual
from training.benchmarks.measure import compile_seconds, kept_bytes, peak_bytes
from training.support.timing import seconds
from training.variants.registry import VARIANTS


#: The model that all others are compared with.
BASELINE = "Llama"
#: The re-implementation on PyPI.
PUBLISHED = "deep-cross-attention"
PUBLISHED_NOTE = (
    f"{PUBLISHED} has feed-forward modules without a gate, made 6 x as wide as the model for as many parameters as "
    "those of the others (gated, 4 x as wide); `past_layers_k=2` is the first two and the last two outputs."
)
PUBLISHED_MISSING = f"{PUBLISHED} is not installed: `pip install {PUBLISHED}` to measure it, too."

#: Other residual schemes that can be measured, in plain PyTorch.
SCHEMES = [name for name, variant in VARIANTS.items() if variant.scheme is not None]
SCHEMES_NOTE = (
    "Residual schemes other than DCA are in plain PyTorch, without their own kernels: their eager cost is mostly the number of "
    "operations."
)

#: Width of a head.
HEAD_DIM = 64
# Long enough for the decoding to dominate the prompt.
PROMPT_TOKENS, NEW_TOKENS = 64, 64


class Candidate:
    """
    A model with its optimizer, and the operations to measure.

    Args:
        model: takes `input_ids`, `labels` and `use_cache` as the models of transformers do.
        input_ids: a batch for training and prefill, `(batch, sequence)`, on the model's device.
        compile: whether training and prefill run through `torch.compile`.
        options: those of `torch.compile`.
    """

    def __init__(self, model: nn.Module, input_ids: Tensor, compile: bool = False, **options):
        self.device = input_ids.device
        self.model = model.to(self.device)
        self.input_ids = input_ids
        self.prompt = input_ids.flatten().repeat(PROMPT_TOKENS)[None, :PROMPT_TOKENS]
        self.compiled = self.model
        if compile:
            # Only the published model may have graph breaks.
            self.compiled = torch.compile(model, fullgraph=not isinstance(model, PublishedModel), **options)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def loss(self, forward: Callable[..., Any]) -> Tensor:
        """The loss of the batch, by the model or its compiled version."""
        return forward(input_ids=self.input_ids, labels=self.input_ids, use_cache=False).loss

    def forward_and_backward(self) -> None:
        """Forward pass and backward pass, of which the gradients are thrown away."""
        self.loss(self.compiled).backward()
        self.optimizer.zero_grad()

    def training_step(self) -> None:
        """Forward pass, backward pass and a step of AdamW."""
        self.loss(self.compiled).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def prefill(self) -> None:
        """A forward pass with the logits of all tokens; without a cache, which the published model does not have."""
        self.compiled(input_ids=self.input_ids, use_cache=False)

    def decode(self, batch: int = 1, new_tokens: int = NEW_TOKENS) -> Tensor:
        """Greedy decoding of `batch` sequences, never compiled; returns the prompts and `new_tokens` new tokens."""
        prompt = self.prompt.expand(batch, -1)
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
        return self.model.generate(prompt, max_new_tokens=new_tokens, **options)


class Measure(NamedTuple):
    """A measure of a model."""

    help: str
    ratio_of: str  # the quantity to compare with Llama: "speed", "time" or "size"
    meter: Callable[[Candidate], float]

    @property
    def unit(self) -> str:
        """The unit of the meter; a speed is the inverse of its value."""
        return "bytes" if self.ratio_of == "size" else "seconds"


MEASURES = {
    "compile_time": Measure(
        "the first compiled training step less the second, with empty caches (only with --compile)",
        "time",
        lambda one: compile_seconds(one.training_step, one.device),
    ),
    "training_step": Measure(
        "forward and backward pass and a step of AdamW",
        "speed",
        lambda one: seconds(one.training_step, one.device),
    ),
    "prefill": Measure(
        "a forward pass without gradients, with the logits of all tokens",
        "speed",
        lambda one: seconds(one.prefill, one.device),
    ),
    "decoding": Measure(
        f"greedy, batch 1, with a cache, never compiled, {NEW_TOKENS} tokens after {PROMPT_TOKENS}",
        "speed",
        lambda one: seconds(one.decode, one.device),
    ),
    "kept_bytes": Measure(
        "what autograd keeps for the backward pass besides the parameters, never compiled",
        "size",
        lambda one: kept_bytes(lambda: one.loss(one.model), one.model.parameters()),
    ),
    "peak_memory": Measure(
        "of a training step, on top of weights and optimizer; allocated on a GPU, resident on the CPU",
        "size",
        lambda one: peak_bytes(one.training_step, one.device),
    ),
}


class PublishedModel(nn.Module):
    """`deep-cross-attention` from PyPI, called as the models of transformers are."""

    def __init__(self, vocab: int, hidden: int, layers: int):
        from deep_cross_attention import DCAGPT

        super().__init__()
        self.vocab = vocab
        shape = {"heads": hidden // HEAD_DIM, "dim_head": HEAD_DIM, "ff_expansion_factor": 6}
        self.model = DCAGPT(vocab, hidden, layers, past_layers_k=2, **shape)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool = False) -> CausalLMOutput:
        logits = self.model(input_ids)
        loss = None if labels is None else ForCausalLMLoss(logits, labels, self.vocab)
        return CausalLMOutput(loss=loss, logits=logits)


def build_models(
    vocab: int,
    hidden: int,
    layers: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    names: Sequence[str] | None = None,
    variants: Sequence[str] = (),
    grn_implementation: str = "auto",
) -> dict[str, nn.Module]:
    """
    The models, or those of `names`, on `device`, with random weights of type `dtype`.

    `variants` are other residual schemes, by their names in a run, with their default settings on the standard transformer.
    The published model is left out if it is not installed. The generalized residuals of DCA have random parameters, so that
    their gates open and close.
    """
    shape = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        # All models decode the same number of tokens, as no token ends a text.
        "eos_token_id": None,
    }
    llama = LlamaConfig(**shape)
    dca = {**shape, "gated_mlp": True, "norm_type": "rms_norm", "norm_eps": llama.rms_norm_eps}
    dca["grn_implementation"] = grn_implementation
    configs = {
        BASELINE: llama,
        "standard": DCAConfig(**dca, residual_scheme="standard"),
        "2-DCA": DCAConfig(**dca, last_k=2),
        "full DCA": DCAConfig(**dca),
    }
    names = [*configs, PUBLISHED] if names is None else names
    with torch.device(device):
        models = {
            name: AutoModelForCausalLM.from_config(config, dtype=dtype)
            for name, config in configs.items()
            if name in names
        }
        standard = {**dca, "residual_scheme": "standard"}
        for name in variants:
            model_class = VARIANTS[name].model(DCAForCausalLM)
            models[name] = model_class._from_config(DCAConfig(**standard), dtype=dtype)
    for model in models.values():
        for module in model.modules():
            if isinstance(module, GeneralizedResidual):
                for parameter in module.parameters():
                    nn.init.normal_(parameter, std=0.02)
    if PUBLISHED in names:
        with suppress(ModuleNotFoundError):
            models[PUBLISHED] = PublishedModel(vocab, hidden, layers).to(device, dtype)
    return models
