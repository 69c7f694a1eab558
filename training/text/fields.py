"""The fields of a run on text."""

import dataclasses
from typing import ClassVar

from modeling_dca.configuration_dca import nearest_name
from training.data.splits import DataArguments
from training.run.fields import RunArguments
from training.variants.registry import VARIANTS


@dataclasses.dataclass
class TextDataArguments(DataArguments):
    """The text of a run."""

    dataset: str = dataclasses.field(
        default="stdlib",
        metadata={
            "help": "'stdlib' (the source text of Python's standard library), a local file, pattern or folder (text, "
            "JSON lines, parquet, CSV; in UTF-8), or the id of a data set on the Hub."
        },
    )
    text_column: str = dataclasses.field(
        default="text", metadata={"help": "The column with the text, or with lists of token ids."}
    )
    streaming: bool = dataclasses.field(
        default=False, metadata={"help": "Stream the training data: read it during training, not before."}
    )
    stream_lanes: int = dataclasses.field(
        default=16,
        metadata={
            "help": "The number of parts in which a stream is read side by side: a multiple of the number of processes, "
            "and best a divisor of the number of files. The order of the data depends on it."
        },
    )
    shuffle_buffer: int = dataclasses.field(
        default=1000,
        metadata={
            "help": "How many documents each lane of a stream shuffles at a time; with 1, they keep their order."
        },
    )
    block_size: int = dataclasses.field(
        default=128, metadata={"help": "The length of the training sequences, in tokens."}
    )
    max_eval_documents: int | None = dataclasses.field(
        default=None, metadata={"help": "The largest number of documents to evaluate on."}
    )
    max_eval_overlap: float | None = dataclasses.field(
        default=None,
        metadata={
            "help": "The largest share of a document to evaluate on, in runs of 13 words or signs, that the training documents may "
            "have, too; what has more is left out."
        },
    )
    tokenizer: str | None = dataclasses.field(
        default=None,
        metadata={"help": "The path or Hub id of a tokenizer; if none, one is trained with `vocab_size` tokens."},
    )
    tokenizer_documents: int = dataclasses.field(
        default=100_000, metadata={"help": "The largest number of documents to train a tokenizer on."}
    )


@dataclasses.dataclass
class CausalLMArguments(RunArguments):
    """The paper's recipe for language models (section 5), where a run does not say otherwise."""

    held_out_metrics: ClassVar = {"loss": False, "perplexity": False, "bits_per_byte": False}

    learning_rate: float = dataclasses.field(default=1.6e-3, metadata={"help": "The peak learning rate."})
    lr_scheduler_type: str = dataclasses.field(
        default="inverse_sqrt", metadata={"help": "The learning rate schedule."}
    )
    warmup_steps: float = dataclasses.field(
        default=1000, metadata={"help": "The number of warm-up steps; below 1, their share of all steps."}
    )
    adam_beta2: float = dataclasses.field(default=0.98, metadata={"help": "Beta2 of AdamW."})
    weight_decay: float = dataclasses.field(default=0.1, metadata={"help": "Weight decay of AdamW."})
    document_losses: bool = dataclasses.field(
        default=False,
        metadata={"help": "Leave the loss of each held-out document in `document_losses.json`, too."},
    )


@dataclasses.dataclass
class AlteredArguments(CausalLMArguments):
    """The fields of `training.altered`: those of a language model's run, and `alteration`, a second name of `variant`."""

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
