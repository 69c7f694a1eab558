"""
Converts a trained residual model to a DCA model that computes the same: `python -m training.retrofit SOURCE OUTPUT`.

The checkpoint is written, and verified, under another name beside OUTPUT, and renamed when it is complete.
"""

import argparse
import gc
import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_dca import DCAConfig, DCAForCausalLM, DCAForImageClassification
from modeling_dca.conversion_dca import FAMILIES, find_family, model_class_of
from training.results.card import write_conversion_card
from training.results.hub import loading_line, read_config
from training.support.errors import UserError, told


MODEL_CLASSES = {"AutoModelForCausalLM": DCAForCausalLM, "AutoModelForImageClassification": DCAForImageClassification}
TASKS = {"AutoModelForCausalLM": "text-generation", "AutoModelForImageClassification": "image-classification"}
PROCESSORS = {"AutoModelForCausalLM": AutoTokenizer, "AutoModelForImageClassification": AutoImageProcessor}
#: What the modules are called that DCA adds to a block.
ADDED = ("residual", "key_layernorm", "value_layernorm")
#: What the files of a checkpoint end in; --overwrite deletes nothing else.
CHECKPOINT_FILES = (".bin", ".jinja", ".json", ".md", ".model", ".py", ".safetensors", ".txt")
#: How much the logits may differ, as part of the largest: the order of sums in float32.
TOLERANCE = 2e-5


def find_source(source: str, loading: dict) -> tuple[PreTrainedConfig, str]:
    """
    The source's configuration, and the name of the Auto class that loads it.

    Raises:
        `UserError`, `ValueError`: it is not a whole language model or image classifier of a family that can become DCA.
    """
    fields, _ = PreTrainedConfig.get_config_dict(source, **loading)
    model_type, architectures = fields.get("model_type"), fields.get("architectures") or []
    if model_type not in transformers.CONFIG_MAPPING:
        raise UserError(f"{source!r} holds no model that transformers knows (`model_type` is {model_type!r}).")
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **loading)
    classifier = any(name.endswith("ForImageClassification") for name in architectures)
    guess = "AutoModelForImageClassification" if classifier else "AutoModelForCausalLM"
    auto_class = next((name for name, families in FAMILIES.items() if model_type in families), guess)
    find_family(config, auto_class)  # which refuses others, and says why
    expected = model_class_of(config, auto_class).__name__
    if architectures and expected not in architectures:
        raise UserError(
            f"{source!r} is a {architectures[0]}; of {model_type!r} models, only a {expected} can become DCA: what is "
            "converted are causal language models and image classifiers."
        )
    return config, auto_class


def load_processor(source: str, auto_class: str, loading: dict):
    """The source's tokenizer or image processor, or `None` where there is none."""
    try:
        return PROCESSORS[auto_class].from_pretrained(source, trust_remote_code=False, **loading)
    except (ImportError, OSError, ValueError):
        kind = "tokenizer" if auto_class == "AutoModelForCausalLM" else "image processor"
        print(f"warning: no {kind} is copied, as {source!r} has none that loads.", file=sys.stderr)
        return None


def check_output(output: Path, source: Path, beside: list[Path], overwrite: bool) -> None:
    """
    Raises:
        `UserError`: `output` exists and may not be replaced, or the source would be deleted with it or with what is
        left `beside` it.
    """
    folder = output.resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{output} is a file: name a folder.")
    if source.exists() and any(source.resolve().is_relative_to(place) for place in (folder, *beside)):
        raise UserError(f"{output} is or contains the source, or would replace it: name another folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output} is not empty: name another folder, or pass --overwrite to replace a checkpoint.")
    try:
        holds_model = "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        holds_model = False
    if not holds_model:
        raise UserError(
            f"{output} holds no checkpoint (config.json), so that it is not replaced: name another folder."
        )
    for path in folder.iterdir():
        if path.is_dir() or path.suffix not in CHECKPOINT_FILES:
            raise UserError(f"{output} also holds {path.name!r}, which is no part of a checkpoint: move that first.")


def recover(folder: Path, replaced: Path) -> None:
    """Puts the old checkpoint back where a conversion ended before the new one was in its place."""
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)


def discard(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def save(model: PreTrainedModel, processor, folder: Path, max_shard_size: str) -> None:
    folder.mkdir(parents=True)
    size, free = model.get_memory_footprint(), shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"The checkpoint needs {size / 1e9:.1f} GB of disk space, and only {free / 1e9:.1f} GB are free."
        )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if processor is not None:
        processor.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)  # safetensors leaves them to their owner alone


def make_inputs(config: PreTrainedConfig, tokenizer, text: str | None) -> tuple[dict[str, torch.Tensor], int]:
    """The inputs of both models, which are the text or random tokens or images, and how many tokens they generate."""
    generator = torch.Generator().manual_seed(0)
    if hasattr(config, "image_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(2, config.num_channels, height, width, generator=generator)}, 0
    new_tokens = min(16, config.max_position_embeddings // 2)
    length = config.max_position_embeddings - new_tokens
    if text is None:
        input_ids = torch.randint(config.vocab_size, (2, min(64, length)), generator=generator)
    else:
        input_ids = torch.tensor([tokenizer(text)["input_ids"][:length]], dtype=torch.long)
        if not input_ids.numel():
            raise UserError("`text` has no tokens: give a longer one.")
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}, new_tokens


@torch.no_grad()
def compute(model: PreTrainedModel, dtype: torch.dtype, inputs: dict, new_tokens: int) -> list[torch.Tensor]:
    """Logits, and greedy generations of a language model, in float32 from weights that are rounded to `dtype`."""
    if dtype != torch.float32:  # of which the weights may still be in their file
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    logits = model.eval()(**inputs).logits
    if not new_tokens:
        return [logits]
    return [logits, model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, num_beams=1)]


def compare(expected: list[torch.Tensor], computed: list[torch.Tensor], tolerance: float) -> float:
    """
    Compares what two models compute, prints how far the logits are apart, and returns that as part of the largest.

    Raises:
        `SystemExit`: they differ.
    """
    largest = expected[0].abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    difference = (computed[0] - expected[0]).abs().max()
    relative = (difference / largest).item()
    print(f"The logits differ by {difference.item():.1e} at most, {relative:.1e} of the largest logit.")
    if not relative <= tolerance:  # (NaN is neither.)
        raise SystemExit(f"error: The logits differ by more than {tolerance:.1e} of the largest; nothing was changed.")
    if not all(map(torch.equal, computed[1:], expected[1:])):
        raise SystemExit("error: The greedy generations differ, though the logits agree; nothing was changed.")
    return relative


def retrofit(arguments: argparse.Namespace) -> None:
    """
    Does what the command is told to, and prints what came of it.

    Raises:
        `UserError`: the source cannot be read or cannot become DCA, or the output may not or cannot be written.
        `SystemExit`: the verification failed.
    """
    source, output, text = arguments.source, arguments.output, arguments.text
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    overrides = {name: given[name] for name in ("last_k", "residual_scheme") if name in given}
    loading = {name: given[name] for name in ("revision",) if name in given}
    dtype = {name: given[name] for name in ("dtype",) if name in given}
    if text is not None and not arguments.verify:
        raise UserError("`text` is what the models are compared on: pass --verify, too.")
    DCAConfig(**overrides)  # refuses what does not fit before anything is read

    folder = output.resolve()
    unfinished, replaced = beside = [
        folder.with_name(f".{folder.name}.{state}") for state in ("unfinished", "replaced")
    ]
    with told(source):
        recover(folder, replaced)
        check_output(output, Path(source), beside, arguments.overwrite)
        discard(beside)
        config, auto_class = find_source(source, loading)
        processor = load_processor(source, auto_class, loading)
        if text is not None and not isinstance(processor, PreTrainedTokenizerBase):
            raise UserError(f"`text` is given, but {source!r} has no tokenizer: leave it out.")
        try:
            model = MODEL_CLASSES[auto_class].from_residual(source, **overrides, **loading, **dtype)
            save(model, processor, unfinished, arguments.max_shard_size)
            line = loading_line(read_config(unfinished), str(output))
            added = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[-2] in ADDED)
            total, written, dca_config = model.num_parameters(), model.dtype, model.config
            del model
            scaled = find_family(config, auto_class).rounds
            difference = None
            if arguments.verify:
                inputs = make_inputs(dca_config, processor, text)
                results = []
                for model_class, place, options in (
                    (getattr(transformers, auto_class), source, loading),
                    (MODEL_CLASSES[auto_class], unfinished, {}),
                ):
                    gc.collect()  # Modules refer to each other in circles, and one model at a time is enough.
                    model = model_class.from_pretrained(place, dtype=torch.float32, **options)
                    results.append(compute(model, written, *inputs))
                    del model
                # Weights that only move are exact in half precision, too. Those that a layer scale is multiplied into
                # are rounded, each by up to half of eps; the logits then differ by less than eps.
                difference = compare(
                    *results, tolerance=max(TOLERANCE, torch.finfo(written).eps) if scaled else TOLERANCE
                )
            note = {
                "task": TASKS[auto_class],
                "architecture": model_class_of(config, auto_class).__name__,
                "dtype": str(written).removeprefix("torch."),
                "exact": not scaled and (arguments.dtype in (None, "float32") or written == config.dtype),
                "difference": difference,
                "processor": processor is not None,
                "config": dca_config,
            }
            write_conversion_card(unfinished, source, arguments.revision, output, note, added)
            if folder.exists():
                folder.rename(replaced)
            unfinished.rename(folder)
        finally:
            recover(folder, replaced)
            discard(beside)

    print(f"The checkpoint is in {output}: {added:,} of its {total:,} parameters are new.")
    print(line)
    print("model.freeze_backbone()  # to train what is new alone; without it, all is trained")
