"""
Train a DCA language model:

    python -m training.causal_lm configuration/demo/text.yaml [--field value ...]

`--help` lists all fields. Several processes: `accelerate launch -m training.causal_lm ...`.
"""

import dataclasses
import functools
import itertools
import platform
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from modeling_dca import DCAForCausalLM
from training.arguments import Run, RunArguments, parse_run
from training.data import is_on_the_hub
from training.errors import UserError, command
from training.metrics import Perplexity
from training.publish import public_name
from training.run import (
    check_batches,
    check_hub,
    check_model,
    check_optimizer,
    check_output_folder,
    check_trainer,
    config_of_baseline,
    make_output_folder,
    run_models,
)
from training.stream import TextStream, check_lanes
from training.text import PackedBlocks, TextDataArguments, load_text, texts
from training.tokenizer import keep_tokenizer, load_tokenizer, train_tokenizer


@dataclasses.dataclass
class CausalLMArguments(RunArguments):
    """The paper's recipe for language models (section 5), where a run does not say otherwise."""

    held_out_metrics: ClassVar = {"loss": False, "perplexity": False, "bits_per_byte": False}

    learning_rate: float = dataclasses.field(default=1.6e-3, metadata={"help": "The peak learning rate."})
    lr_scheduler_type: str = dataclasses.field(
        default="inverse_sqrt", metadata={"help": "The learning rate schedule."}
    )
    warmup_steps: float = dataclasses.field(
        default=1000, metadata={"help": "Steps to warm up, or below 1 their share."}
    )
    adam_beta2: float = dataclasses.field(default=0.98, metadata={"help": "Beta2 of AdamW."})
    weight_decay: float = dataclasses.field(default=0.1, metadata={"help": "Weight decay of AdamW."})


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of blocks; every token is a label, end-of-text tokens too."""
    input_ids = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def block_losses(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each block, `(batch,)`, all that the metrics need of `(batch, length, vocab)`."""
    if isinstance(logits, tuple):  # some models of transformers return more than logits
        logits = logits[0]
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none").sum(-1)


def next_token_loss(outputs, labels, num_items_in_batch=None, *, label_smoothing: float) -> torch.Tensor:
    """
    The loss of next-token prediction with smoothed labels; a `compute_loss_func` of the Trainer, whose own goes by the names
    of models.

    Args:
        outputs: of the model, with `logits` `(batch, length, vocab)`.
        labels: `(batch, length)`, the tokens themselves.
        num_items_in_batch: how many tokens an optimizer step predicts; by default, those of these.
    """
    logits, labels = outputs.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
    items = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
    return cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing) / items


def evaluation_options(held_out: PackedBlocks, blocks: Dataset) -> dict[str, Any]:
    """How a [`~transformers.Trainer`] evaluates a language model: the same for all of them, wherever they come from."""
    metric, tokens_per_byte = Perplexity(), held_out.tokens_per_byte()

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        losses = prediction.predictions
        num_tokens = [held_out.block_size - 1] * len(losses)
        return metric.compute(predictions=losses, references=num_tokens, tokens_per_byte=tokens_per_byte)

    return {
        "eval_dataset": blocks,
        "data_collator": collate,
        "compute_metrics": compute_metrics,
        "preprocess_logits_for_metrics": block_losses,
    }


def describe(data: TextDataArguments, train_documents, held_out_documents, held_out_blocks) -> str:
    """What a model card says of the text."""
    source = public_name(data.dataset) + (f" ({data.dataset_config})" if data.dataset_config is not None else "")
    if data.dataset == "stdlib":
        source = f"the source text of the standard library of Python {platform.python_version()}, split by file"
    documents = "a stream of documents" if data.streaming else f"{len(train_documents):,} documents"
    return (
        f"Trained on {source}: {documents}. Evaluated on {len(held_out_documents):,} documents that were held out "
        f"({len(held_out_blocks):,} blocks of {data.block_size} tokens)."
    )


def train_language_model(run: Run, model_class: type[DCAForCausalLM], **trainer_options) -> None:
    """Train the model of a run, and its baseline, on its text."""
    data, config, folder = run.data, run.config, run.training.output_dir
    if config.position_embedding == "learned" and data.block_size > config.max_position_embeddings:
        raise UserError(
            f"`block_size` is {data.block_size}, longer than the learned positions allow: `max_position_embeddings` is "
            f"{config.max_position_embeddings}."
        )
    if data.streaming and run.training.max_steps < 1:
        raise UserError(f"`max_steps` is {run.training.max_steps}; with `streaming` it must say when the run ends.")
    if data.streaming and run.training.train_sampling_strategy != "random":
        raise UserError(
            f"`train_sampling_strategy` is {run.training.train_sampling_strategy!r}, but `shuffle_buffer` says in what order a "
            "stream is trained on: leave it out, or `streaming`."
        )
    if data.streaming:
        check_lanes(data.stream_lanes, run.training.world_size)
    baseline = config_of_baseline(run)
    check_model(model_class, config, run.training.device)
    check_optimizer(run.training)
    check_trainer(run.training)
    check_output_folder(run.training)
    check_hub(run.training)

    with run.training.main_process_first(desc="preparing the data"):
        train_documents, held_out_documents = load_text(data)
        trained_tokenizer = data.tokenizer or run.initial_checkpoint
        if run.training.resume_from_checkpoint is not None and Path(folder, "tokenizer_config.json").exists():
            trained_tokenizer = folder  # the one that the run was begun with
        if trained_tokenizer is not None:
            tokenizer = load_tokenizer(trained_tokenizer, config.vocab_size)
        else:
            sample = itertools.islice(texts(train_documents, data.text_column), data.tokenizer_documents)
            tokenizer = train_tokenizer(sample, config.vocab_size, config.max_position_embeddings)
        options = (data.text_column, tokenizer, data.block_size, config.vocab_size)
        train_blocks = PackedBlocks(train_documents, *options)
        held_out = PackedBlocks(held_out_documents, *options)
        held_out_blocks = held_out.materialize()
        if data.streaming:
            train_blocks.check_length()
            seed = run.training.seed if run.training.data_seed is None else run.training.data_seed
            train_blocks = TextStream(train_blocks, data.stream_lanes, data.shuffle_buffer, seed)
        else:
            train_blocks = train_blocks.materialize()
            check_batches(run.training, len(train_blocks))
    for each in filter(None, (config, baseline)):
        each.bos_token_id, each.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        each.pad_token_id = tokenizer.pad_token_id
    evaluation = evaluation_options(held_out, held_out_blocks)
    smoothing = run.training.label_smoothing_factor
    loss = functools.partial(next_token_loss, label_smoothing=smoothing) if smoothing else None
    if run.training.should_save:
        make_output_folder(run)
        if trained_tokenizer is None:
            keep_tokenizer(tokenizer, Path(folder))

    note = {
        "task": "text-generation",
        "dataset": data.dataset if is_on_the_hub(data.dataset) else None,
        "dataset_name": "Python standard library" if data.dataset == "stdlib" else Path(data.dataset).name,
        "data": describe(data, train_documents, held_out_documents, held_out_blocks),
        "prompt": tokenizer.decode(held_out_blocks[0]["input_ids"][:8]),
    }
    run_models(
        run,
        model_class,
        baseline,
        note,
        train_dataset=train_blocks,
        processing_class=tokenizer,
        compute_loss_func=loss,
        **evaluation,
        **trainer_options,
    )


@command
def main():
    run = parse_run(
        sys.argv[1:],
        "training.causal_lm",
        "Train a DCA language model.",
        DCAForCausalLM,
        TextDataArguments,
        CausalLMArguments,
    )
    train_language_model(run, DCAForCausalLM)


if __name__ == "__main__":
    main()
