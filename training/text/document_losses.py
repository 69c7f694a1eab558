"""The loss of each held-out document, for confidence intervals over documents."""

import json
from pathlib import Path

import numpy as np
from transformers import TrainerCallback

from training.support.files import write_whole
from training.text.blocks import PackedBlocks


DOCUMENT_LOSSES = "document_losses.json"


class DocumentLosses(TrainerCallback):
    """
    Writes to the folder of a run, at each evaluation, the number of predicted tokens of each held-out document and their mean
    loss in nats.

    Args:
        held_out: the documents, which are identified by their column `path`, or by their number if there is none.
    """

    def __init__(self, held_out: PackedBlocks):
        lengths = [len(tokens) for tokens in held_out.tokens_of_documents()]
        self.ends, self.block_size = np.cumsum(lengths), held_out.block_size
        named = "path" in held_out.data.column_names
        self.names = held_out.data["path"][:] if named else list(range(len(lengths)))
        self.documents = []

    def update(self, losses: np.ndarray) -> None:
        """Takes the losses of all blocks, `(blocks, block_size - 1)`: those of all tokens but the first of each block."""
        positions = np.arange(len(losses) * self.block_size).reshape(-1, self.block_size)[:, 1:]
        document = np.searchsorted(self.ends, positions.ravel(), side="right")
        tokens = np.bincount(document, minlength=len(self.ends))
        sums = np.bincount(document, weights=losses.ravel().astype(np.float64), minlength=len(self.ends))
        # The end of the last document, or all of it, may be in no block.
        self.documents = [
            {"document": name, "tokens": int(count), "loss": float(total / count)}
            for name, count, total in zip(self.names, tokens, sums)
            if count
        ]

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_whole(Path(args.output_dir, DOCUMENT_LOSSES), json.dumps(self.documents, indent=1))
