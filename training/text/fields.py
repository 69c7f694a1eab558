"""The fields of a run on text."""

import dataclasses
from typing import ClassVar

from modeling_dca.configuration_dca import nearest_name
from training.data.splits import DataArguments
from training.run.fields import RunArguments, with_default
from training.variants.registry import VARIANTS


@dataclasses.dataclass
class TextDataArguments(DataArguments):
    """The text of a run."""

    dataset: str = dataclasses.field(
        default="stdlib",
        metadata={
            "help": "'stdlib' (the source code of Python's standard library), a local file, pattern or folder (text, "
            "JSON lines, parquet or CSV, in UTF-8), or the id of a data set on the Hub."
        },
    )
    text_column: str = dataclasses.field(
        default="text", metadata={"help": "The column with the texts, or with lists of token ids."}
    )
    streaming: bool = dataclasses.field(
        default=False, metadata={"help": "Read the training data during the training, not before."}
    )
    stream_lanes: int = dataclasses.field(
        default=16,
        metadata={
            "help": "The number of parts of a stream that are read side by side: a multiple of the number of processes, and "
            "ideally a divisor of the number of files. The order of the data depends on it."
        },
    )
    shuffle_buffer: int = dataclasses.field(
        default=1000,
        metadata={
            "help": "The number of documents that each lane of a stream shuffles at a time; 1 keeps their order."
        },
    )
    block_size: int = dataclasses.field(
        default=128, metadata={"help": "The length of the training sequences, in tokens."}
    )
    max_eval_documents: int | None = dataclasses.field(
        default=None, metadata={"help": "The maximum number of documents to evaluate on."}
    )
    max_eval_overlap: float | None = dataclasses.field(
        default=None,
        metadata={
            "help": "The maximum share of a held-out document, in 13-grams of words and punctuation, that may also occur in the "
            "training documents; documents above it are left out."
        },
    )
    tokenizer: str | None = dataclasses.field(
        default=None,
        metadata={"help": "The path or Hub id of a tokenizer; by default one with `vocab_size` tokens is trained."},
    )
    tokenizer_documents: int = dataclasses.field(
        default=100_000, metadata={"help": "The maximum number of documents to train a tokenizer on."}
    )


@dataclasses.dataclass
class CausalLMArguments(RunArguments):
    """The training arguments of a language model. The defaults are the paper's recipe (section 5)."""

    held_out_metrics: ClassVar = {"loss": False, "perplexity": False, "bits_per_byte": False}

    learning_rate: float = with_default("learning_rate", 1.6e-3)
    lr_scheduler_type: str = with_default("lr_scheduler_type", "inverse_sqrt")
    warmup_steps: float = with_default("warmup_steps", 1000)
    adam_beta2: float = with_default("adam_beta2", 0.98)
    weight_decay: float = with_default("weight_decay", 0.1)
    document_losses: bool = dataclasses.field(
        default=False,
        metadata={"help": "Write the loss of each held-out document to `document_losses.json`."},
    )


@dataclasses.dataclass
class AlteredArguments(CausalLMArguments):
    """The fields of `training.altered`: those of a language model, and `alteration`, another name of `variant`."""

    alteration: str | None = dataclasses.field(
        default=None, metadata={"help": f"The `variant`: {', '.join(VARIANTS)}."}
    )

    def __post_init__(self):
        if self.alteration is not None and self.alteration not in VARIANTS:
            raise ValueError(f"`alteration` is {self.alteration!r}; {nearest_name(self.alteration, VARIANTS)}")
        if self.alteration is not None and self.variant not in (None, self.alteration):
            raise ValueError(
                f"`alteration` is {self.alteration!r}, but `variant` {self.variant!r}: leave one of them out."
            )
        self.variant = self.alteration or self.variant
        super().__post_init__()
