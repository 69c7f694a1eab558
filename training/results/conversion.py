"""
Converts a trained residual model to a DCA model that computes the same: `python -m training.retrofit SOURCE OUTPUT`.

The checkpoint is written and verified under another name next to OUTPUT, and renamed when it is complete.
"""

import argparse
import gc
import shutil
import struct
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

from modeling_dca import (
    DCAConfig,
    DCAForCausalLM,
    DCAForImageClassification,
    DCAForQuestionAnswering,
    DCAForSequenceClassification,
    DCAForTokenClassification,
    DCAModel,
    DCAVisionModel,
)
from modeling_dca.conversion_dca import (
    FAMILIES,
    HEADS,
    LABEL_HEADS,
    classes_of,
    convert,
    find_family,
    find_gguf_file,
    load_source,
    model_class_of,
)
from training.results.card import write_conversion_card
from training.results.hub import loading_line, read_config
from training.support.errors import UserError, told
from training.support.files import DamagedFile, read_json


TEXT, VISION = "AutoModelForCausalLM", "AutoModelForImageClassification"
#: The class of the DCA model, by the kind of the source and the name of the head.
MODEL_CLASSES = {
    TEXT: {
        "causal_lm": DCAForCausalLM,
        "sequence_classification": DCAForSequenceClassification,
        "token_classification": DCAForTokenClassification,
        "question_answering": DCAForQuestionAnswering,
        "base": DCAModel,
    },
    VISION: {"image_classification": DCAForImageClassification, "base": DCAVisionModel},
}
#: The task of a model on the Hub.
TASKS = {
    DCAForCausalLM: "text-generation",
    DCAForSequenceClassification: "text-classification",
    DCAForTokenClassification: "token-classification",
    DCAForQuestionAnswering: "question-answering",
    DCAModel: "feature-extraction",
    DCAForImageClassification: "image-classification",
    DCAVisionModel: "image-feature-extraction",
}
PROCESSORS = {TEXT: AutoTokenizer, VISION: AutoImageProcessor}
#: The outputs to compare, if a model has them.
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
#: The names of the modules that DCA adds to a block.
ADDED = ("residual", "key_layernorm", "value_layernorm")
#: The suffixes of the files of a checkpoint; --overwrite deletes no others.
CHECKPOINT_FILES = (".bin", ".jinja", ".json", ".md", ".model", ".py", ".safetensors", ".txt")
#: The tolerance for logits, relative to the largest: that of another order of sums in float32.
TOLERANCE = 2e-5


def find_source(source: str, loading: dict) -> PreTrainedConfig:
    """
    The source's configuration.

    Raises:
        `UserError`, `ValueError`: it is not a model of a family that can become DCA.
    """
    files = sorted(path.name for path in Path(source).glob("*.gguf"))
    if files and "gguf_file" not in loading and not (Path(source) / "config.json").exists():
        raise UserError(f"{source!r} holds GGUF files: choose one of them with --gguf_file ({', '.join(files)}).")
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source, **loading)
    except (LookupError, struct.error) as error:  # of the reader of GGUF files
        if "gguf_file" not in loading:
            raise
        raise UserError(
            f"{loading['gguf_file']!r} in {source!r} is not a complete GGUF file of a model ({type(error).__name__}: {error})."
        ) from error
    if (model_type := fields.get("model_type")) not in transformers.CONFIG_MAPPING:
        raise UserError(f"{source!r} holds no model that transformers knows (`model_type` is {model_type!r}).")
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **loading)
    find_family(config, kind_of_source(config))  # raises an error with the reason if it cannot become DCA
    return config


def kind_of_source(config: PreTrainedConfig) -> str:
    """`TEXT` or `VISION`."""
    known = (kind for kind, families in FAMILIES.items() if config.model_type in families)
    return next(known, VISION if hasattr(config, "image_size") else TEXT)


def own_head(config: PreTrainedConfig) -> str | None:
    """The head of a source by its configuration; `None` if DCA does not have it."""
    model_classes, architectures = MODEL_CLASSES[kind_of_source(config)], config.architectures or ()
    if not architectures:  # as in GGUF files
        return next(iter(model_classes))
    for head, model_class in model_classes.items():
        known = {each.__name__ for each in classes_of(config, model_class._auto_class)}
        # (Classes in the code of a checkpoint have names that transformers does not know.)
        suffix = model_class._auto_class.removeprefix("AutoModel")
        if any(name in known or suffix and name.endswith(suffix) for name in architectures):
            return head
    return None


def choose_head(config: PreTrainedConfig, source: str, head: str | None, num_labels: int | None) -> type:
    """
    The class of the DCA model, with the requested `head`, or by default with that of the source.

    Raises:
        `UserError`: there is no such head, or `num_labels` is given and it has no labels.
    """
    model_classes = MODEL_CLASSES[kind_of_source(config)]
    labeled = [name for name, each in model_classes.items() if each._auto_class in LABEL_HEADS]
    if num_labels is not None and num_labels < 1:
        raise UserError(f"`num_labels` is {num_labels}; it must be at least 1.")
    chosen = head or own_head(config)
    if head is None and num_labels is not None and chosen not in labeled and len(labeled) == 1:
        chosen = labeled[0]
    if chosen is None:
        raise UserError(
            f"{source!r} is a {config.architectures[0]}, whose head DCA does not have: pass --head, one of "
            f"{', '.join(model_classes)}."
        )
    if chosen not in model_classes:
        raise UserError(
            f"`head` is {chosen!r}, but {source!r} is a {config.model_type!r} model: choose one of {', '.join(model_classes)}."
        )
    if num_labels is not None and chosen not in labeled:
        raise UserError(
            f"`num_labels` is {num_labels}, but the head {chosen!r} has no labels: "
            f"pass --head, one of {', '.join(labeled)}, or leave `num_labels` out."
        )
    return model_classes[chosen]


def load_processor(source: str, kind: str, loading: dict):
    """The source's tokenizer or image processor, or `None` if there is none."""
    try:
        return PROCESSORS[kind].from_pretrained(source, trust_remote_code=False, **loading)
    except (ImportError, LookupError, OSError, ValueError):
        name = "tokenizer" if kind == TEXT else "image processor"
        print(f"warning: {source!r} has no {name} that can be loaded, and none is copied.", file=sys.stderr)
        return None


def check_output(output: Path, source: Path, beside: list[Path], overwrite: bool) -> None:
    """
    Raises:
        `UserError`: `output` exists and may not be replaced, or the source would be deleted with it or with the folders
        `beside` it.
    """
    folder = output.resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{output} is a file: choose a folder.")
    if source.exists() and any(source.resolve().is_relative_to(place) for place in (folder, *beside)):
        raise UserError(f"{output} is or contains the source, or would replace it: choose another folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output} is not empty: choose another folder, or pass --overwrite to replace a checkpoint.")
    try:
        holds_model = "model_type" in read_json(folder / "config.json")
    except DamagedFile:
        holds_model = False
    if not holds_model:
        raise UserError(f"{output} holds no checkpoint (config.json), and is not replaced: choose another folder.")
    for path in folder.iterdir():
        if path.is_dir() or path.suffix not in CHECKPOINT_FILES:
            raise UserError(f"{output} also holds {path.name!r}, which is not part of a checkpoint: move it first.")


def recover(folder: Path, replaced: Path) -> None:
    """Restores the old checkpoint if a conversion ended before the new one had replaced it."""
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
            f"The checkpoint needs {size / 1e9:.1f} GB of disk space, but only {free / 1e9:.1f} GB are free."
        )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if processor is not None:
        processor.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)  # safetensors makes them readable by the owner only


def make_inputs(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], tokenizer, text: str | None
) -> tuple[dict[str, torch.Tensor], int]:
    """The inputs of both models (the text, random tokens or random images), and the number of tokens to generate."""
    generator = torch.Generator().manual_seed(0)
    if hasattr(config, "image_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(2, config.num_channels, height, width, generator=generator)}, 0
    new_tokens = min(16, config.max_position_embeddings // 2)
    length = config.max_position_embeddings - new_tokens
    if text is None:
        # (Without a padding token, sequence classifiers take one sequence at a time.)
        number = 1 if model_class is DCAForSequenceClassification else 2
        input_ids = torch.randint(config.vocab_size, (number, min(64, length)), generator=generator)
    else:
        input_ids = torch.tensor([tokenizer(text)["input_ids"][:length]], dtype=torch.long)
        if not input_ids.numel():
            raise UserError("`text` has no tokens: give a longer one.")
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return inputs, new_tokens if model_class is DCAForCausalLM else 0


@torch.no_grad()
def compute(model: PreTrainedModel, dtype: torch.dtype, inputs: dict, new_tokens: int) -> list[torch.Tensor]:
    """Logits, or the model's other outputs, and greedy generations, in float32 with weights rounded to `dtype`."""
    if dtype != torch.float32:  # (float32 weights may still be mapped from their file)
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    outputs = model.eval()(**inputs)
    logits = torch.cat([outputs[name].flatten() for name in OUTPUTS if name in outputs])
    if not new_tokens:
        return [logits]
    return [logits, model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, num_beams=1)]


def compare(expected: list[torch.Tensor], computed: list[torch.Tensor], tolerance: float) -> float:
    """
    Compares the results of two models, prints the largest difference of their logits, and returns it relative to the
    largest logit.

    Raises:
        `SystemExit`: the results differ.
    """
    largest = expected[0].abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    difference = (computed[0] - expected[0]).abs().max()
    relative = (difference / largest).item()
    print(f"The logits differ by at most {difference.item():.1e}, {relative:.1e} of the largest logit.")
    if not relative <= tolerance:  # (also true for NaN)
        raise SystemExit(f"error: The logits differ by more than {tolerance:.1e} of the largest; nothing was changed.")
    if not all(map(torch.equal, computed[1:], expected[1:])):
        raise SystemExit("error: The greedy generations differ, though the logits agree; nothing was changed.")
    return relative


def retrofit(arguments: argparse.Namespace) -> None:
    """
    Runs `training.retrofit`, and prints the result.

    Raises:
        `UserError`: the source cannot be read or cannot become DCA, or the output may not or cannot be written.
        `SystemExit`: the verification failed.
    """
    output, text = arguments.output, arguments.text
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    overrides = {name: given[name] for name in ("last_k", "residual_scheme") if name in given}
    labels = {name: given[name] for name in ("num_labels",) if name in given}
    loading = {name: given[name] for name in ("revision", "subfolder", "gguf_file") if name in given}
    weights = {name: given[name] for name in ("dtype", "variant") if name in given}
    if text is not None and not arguments.verify:
        raise UserError("`text` is for the comparison of the models: pass --verify, too.")
    DCAConfig(**overrides)  # checks the fields before anything is read

    folder = output.resolve()
    unfinished, replaced = beside = [
        folder.with_name(f".{folder.name}.{state}") for state in ("unfinished", "replaced")
    ]
    with told(arguments.source):
        source, loading = find_gguf_file(arguments.source, loading)
        recover(folder, replaced)
        check_output(output, Path(source), beside, arguments.overwrite)
        discard(beside)
        config = find_source(source, loading)
        kind, model_class = kind_of_source(config), choose_head(config, source, arguments.head, arguments.num_labels)
        processor = load_processor(source, kind, loading)
        if text is not None and not isinstance(processor, PreTrainedTokenizerBase):
            raise UserError(f"`text` is given, but {source!r} has no tokenizer: leave it out.")
        try:
            model, fresh = convert(model_class, source, **overrides, **labels, **loading, **weights)
            save(model, processor, unfinished, arguments.max_shard_size)
            head = HEADS[model_class._auto_class] if fresh else None
            new = [name for name, _ in model.named_parameters() if name.split(".")[-2] in (*ADDED, head)]
            added, total = sum(model.get_parameter(name).numel() for name in new), model.num_parameters()
            written, dca_config = model.dtype, model.config
            del model
            scaled = find_family(config, kind).rounds
            difference = None
            if arguments.verify:
                inputs = make_inputs(dca_config, model_class, processor, text)
                results = []
                for load in (
                    lambda: load_source(source, model_class, {**loading, **weights, "dtype": torch.float32})[0],
                    lambda: model_class.from_pretrained(unfinished, dtype=torch.float32),
                ):
                    gc.collect()  # Modules refer to each other in cycles, and memory may hold only one model.
                    model = load()
                    whole = not fresh and model_class._auto_class != "AutoModel"
                    results.append(compute(model if whole else model.base_model, written, *inputs))
                    del model
                # Weights that are only renamed are exact in half precision, too. Those that are multiplied by a layer
                # scale are rounded by up to eps / 2; the logits then differ by less than eps.
                difference = compare(
                    *results, tolerance=max(TOLERANCE, torch.finfo(written).eps) if scaled else TOLERANCE
                )
            note = {
                "task": TASKS[model_class],
                "auto_class": model_class._auto_class,
                "processor": processor and PROCESSORS[kind].__name__,
                "architecture": (config.architectures or [model_class_of(config, model_class._auto_class).__name__])[
                    0
                ],
                "dtype": str(written).removeprefix("torch."),
                "exact": not scaled and (arguments.dtype in (None, "float32") or written == config.dtype),
                "difference": difference,
                "head": head,
                "config": dca_config,
            }
            write_conversion_card(unfinished, source, loading, output, note, added)
            line = loading_line(read_config(unfinished), str(output))
            if folder.exists():
                folder.rename(replaced)
            unfinished.rename(folder)
        finally:
            recover(folder, replaced)
            discard(beside)

    print(f"The checkpoint is in {output}: {added:,} of its {total:,} parameters are new.")
    print(line)
    if dca_config.residual_scheme != "standard":
        also = f"; model.{head}.requires_grad_(True)" if head else ""
        print(f"model.freeze_backbone(){also}  # trains only the new parameters; without it, all are trained")
