"""The training and evaluation of language models."""

import functools
import itertools
import platform
from pathlib import Path
from typing import Any

import evaluate
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_dca import DCAForCausalLM
from training.data.files import check_document
from training.data.splits import is_on_the_hub
from training.results.hub import public_name
from training.results.metrics import Perplexity, load_metrics, plain
from training.results.page import Example
from training.run.checks import check_batches, check_best_metric, check_hub
from training.run.fields import Run
from training.run.folder import make_output_folder
from training.run.task import Task
from training.run.training import check_before_data, run_models
from training.support.errors import UserError
from training.text.blocks import PackedBlocks
from training.text.document_losses import DocumentLosses
from training.text.documents import load_text, texts
from training.text.fields import CausalLMArguments, TextDataArguments
from training.text.stream import TextStream, check_lanes
from training.text.tokenizer import keep_tokenizer, load_tokenizer, plain_tokens, train_tokenizer


#: The most tokens that one character can have: the bytes of UTF-8.
LONGEST_CHARACTER = 4

#: The length of the text that a model generates at the end of a run, in tokens.
SAMPLE_TOKENS = 80


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of blocks; every token is a label, end-of-text tokens too."""
    input_ids = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def token_losses(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each token but the first of a block, `(batch, length - 1)`."""
    if isinstance(logits, tuple):  # some models of transformers return more than logits
        logits = logits[0]
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")


def next_tokens(logits: torch.Tensor | tuple) -> torch.Tensor:
    """The likeliest token after each but the last of a block, `(batch, length - 1)`."""
    return (logits[0] if isinstance(logits, tuple) else logits)[:, :-1].argmax(-1)


def next_token_loss(outputs, labels, num_items_in_batch=None, *, label_smoothing: float) -> torch.Tensor:
    """
    The next-token loss with label smoothing, a `compute_loss_func` of the Trainer. (The Trainer's own depends on the names of
    models.)

    Args:
        outputs: those of the model, with `logits` `(batch, length, vocab)`.
        labels: `(batch, length)`, the tokens themselves.
        num_items_in_batch: the number of tokens that an optimizer step predicts; by default the number in `labels`.
    """
    logits, labels = outputs.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
    items = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
    return cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing) / items


def evaluation_options(
    held_out: PackedBlocks,
    blocks: Dataset,
    named: list[evaluate.EvaluationModule],
    by_document: DocumentLosses | None = None,
) -> dict[str, Any]:
    """
    The arguments with which a [`~transformers.Trainer`] evaluates a language model, the same for any model.

    Args:
        named: metrics of the predicted tokens, see [`load_metrics`].
        by_document: receives the loss of each token.
    """
    of_losses, tokens_per_byte = evaluate.combine([Perplexity()]), held_out.tokens_per_byte()
    of_tokens = evaluate.combine(named)

    def losses_and_tokens(logits, labels):
        losses = token_losses(logits, labels)
        # Most metrics need only the sum of each block, not `(batch, length, vocab)`.
        needed = [losses.sum(-1)]
        if by_document:
            needed.append(losses)
        if named:
            needed.append(next_tokens(logits))
        return tuple(needed)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        losses, *others = prediction.predictions
        if by_document:
            by_document.update(others.pop(0))
        num_tokens = [held_out.block_size - 1] * len(losses)
        figures = of_losses.compute(predictions=losses, references=num_tokens, tokens_per_byte=tokens_per_byte)
        if named:
            references = prediction.label_ids[:, 1:].reshape(-1)
            figures |= of_tokens.compute(predictions=others.pop().reshape(-1), references=references)
        return plain(figures)

    return {
        "eval_dataset": blocks,
        "data_collator": collate,
        "compute_metrics": compute_metrics,
        "preprocess_logits_for_metrics": losses_and_tokens,
    }


def describe(data: TextDataArguments, train_documents, held_out_documents, held_out_blocks) -> str:
    """What a model card says about the text."""
    source = public_name(data.dataset) + (f" ({data.dataset_config})" if data.dataset_config is not None else "")
    if data.dataset == "stdlib":
        source = f"the source text of the standard library of Python {platform.python_version()}, split by file"
    documents = "a stream of documents" if data.streaming else f"{len(train_documents):,} documents"
    return (
        f"Trained on {source}: {documents}. Evaluated on {len(held_out_documents):,} documents that were held out "
        f"({len(held_out_blocks):,} blocks of {data.block_size} tokens)."
    )


def train_language_model(run: Run) -> None:
    """Train the model of a run, and its baseline, on its text."""
    data, config, folder = run.data, run.config, run.training.output_dir
    if config.position_embedding == "learned" and data.block_size > config.max_position_embeddings:
        raise UserError(
            f"`block_size` is {data.block_size}, but `max_position_embeddings` is {config.max_position_embeddings}, the number "
            "of learned positions: lower it."
        )
    if data.streaming and run.training.max_steps < 1:
        raise UserError(f"`max_steps` is {run.training.max_steps}; with `streaming` it must be at least 1.")
    if data.streaming and run.training.train_sampling_strategy != "random":
        raise UserError(
            f"`train_sampling_strategy` is {run.training.train_sampling_strategy!r}, but `shuffle_buffer` determines the order "
            "of a stream: leave it out, or `streaming`."
        )
    if data.streaming:
        check_lanes(data.stream_lanes, run.training.data_parallel_size)
    baseline, model_class, callbacks = check_before_data(run, DCAForCausalLM, data.block_size)
    named, figures = load_metrics(run.training.metrics, run.training.held_out_metrics, config.vocab_size)
    check_best_metric(run.training, figures)
    check_hub(run.training)

    with run.training.main_process_first(desc="preparing the data"):
        train_documents, held_out_documents = load_text(data)
        trained_tokenizer = data.tokenizer or run.initial_checkpoint
        if run.training.resume_from_checkpoint is not None and Path(folder, "tokenizer_config.json").exists():
            trained_tokenizer = folder  # the one that the run started with
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
            train_data = {"stream": TextStream(train_blocks, data.stream_lanes, data.shuffle_buffer, seed)}
        else:
            train_data = {"train_dataset": train_blocks.materialize()}
            check_batches(run.training, len(train_data["train_dataset"]))
    for each in filter(None, (config, baseline)):
        each.bos_token_id, each.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        each.pad_token_id = tokenizer.pad_token_id
    by_document = DocumentLosses(held_out) if run.training.document_losses else None
    evaluation = evaluation_options(held_out, held_out_blocks, named, by_document)
    smoothing = run.training.label_smoothing_factor
    loss = functools.partial(next_token_loss, label_smoothing=smoothing) if smoothing else None
    make_output_folder(run)
    if run.training.should_save and trained_tokenizer is None:
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
        functools.partial(sample_text, prompt=note["prompt"], seed=run.training.seed),
        **train_data,
        processing_class=tokenizer,
        compute_loss_func=loss,
        callbacks=[*callbacks, *filter(None, [by_document])],
        **evaluation,
    )


def sample_text(model_class: type[PreTrainedModel], folder: Path, prompt: str, seed: int) -> str:
    """The text that a language model generates from a prompt, including the prompt; the same at each call."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    model = model_class.from_pretrained(folder)
    room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    if room < 1:
        return prompt
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokens = model.generate(
            **inputs, max_new_tokens=min(SAMPLE_TOKENS, room), do_sample=True, temperature=0.8, top_p=0.9
        )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def text_loss(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """
    The mean loss of a batch, the same for all models. (Some models add further losses to their own, and for some the Trainer
    does not know how many labels count.)
    """
    logits = outputs["logits"]
    return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=labels[:, 1:].numel())


def longest_text(config: PreTrainedConfig) -> int | None:
    """The most tokens that a model takes, or `None` if its positions set no limit."""
    limited = getattr(config, "position_embedding", "learned") == "learned"
    limited = limited and getattr(config, "rope_parameters", None) is None
    return getattr(config, "max_position_embeddings", None) if limited else None


def text_options(
    data: TextDataArguments, config: PreTrainedConfig, checkpoint: str, metrics: list[str]
) -> dict[str, Any]:
    """The held-out text in blocks, and how to evaluate on it."""
    longest = longest_text(config)
    if longest is not None and data.block_size > longest:
        raise UserError(f"`block_size` is {data.block_size}, but {checkpoint!r} takes at most {longest} tokens.")
    tokenizer = load_tokenizer(data.tokenizer or checkpoint, config.vocab_size)
    _, documents = load_text(data, held_out_only=True)
    held_out = PackedBlocks(documents, data.text_column, tokenizer, data.block_size, config.vocab_size)
    named, _ = load_metrics(metrics, CausalLMArguments.held_out_metrics, config.vocab_size)
    return evaluation_options(held_out, held_out.materialize(), named) | {"compute_loss_func": text_loss}


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token. If several tokens form a character, each shows the character and its own number."""
    found, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        count = end - start
        if "\ufffd" in text and count < LONGEST_CHARACTER and end < len(ids):
            continue
        if str(tokenizer.convert_ids_to_tokens(ids[start])).startswith("\u2581") and not text.startswith(" "):
            text = f" {text}"  # SentencePiece leaves out a space at the start
        found += [text] if count == 1 else [f"{text} ({number}/{count})" for number in range(1, count + 1)]
        start = end
    return found


def text_example(text: str, data: TextDataArguments, config: PreTrainedConfig, checkpoint: str) -> Example:
    """
    A text as a language model takes it, with the token that its tokenizer puts first, if any.

    Raises:
        [`UserError`]: the text has no tokens, or more than the model takes, or the tokenizer cannot be loaded.
    """
    check_document(text, "text", "`text`")
    tokenizer = load_tokenizer(data.tokenizer or checkpoint, config.vocab_size)
    begin = [each for each in tokenizer("")["input_ids"][:1] if each == tokenizer.bos_token_id]
    (ids,) = plain_tokens(tokenizer, [text])
    if not ids:
        raise UserError("`text` has no tokens: give a longer one.")
    ids = begin + ids
    longest = longest_text(config)
    if longest is not None and len(ids) > longest:
        raise UserError(f"`text` has {len(ids):,} tokens, but {checkpoint!r} takes at most {longest:,}.")
    return Example({"input_ids": torch.tensor([ids])}, "token", pieces(tokenizer, ids))


LANGUAGE_MODELS = Task(
    "text-generation",
    DCAForCausalLM,
    TextDataArguments,
    CausalLMArguments,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    train_language_model,
    text_options,
    text_example,
)
