"""
Write the training text of training.benchmarks.gpu, as token ids in one file, on a machine with a network:

    python -m training.benchmarks.gpu_data [--file data/gpu/text.npz --vocab_size 4096 --packages torch transformers ...]

It is the source code of Python's standard library, a twentieth of whose files is held out, and of installed packages.
`--help` lists all arguments.
"""

import dataclasses
import importlib.util
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset

from training.support.errors import UserError, command
from training.support.parser import Parser
from training.text.blocks import PackedBlocks
from training.text.documents import standard_library
from training.text.fields import TextDataArguments
from training.text.tokenizer import train_tokenizer


BLOCK = 512


@dataclasses.dataclass
class GPUDataArguments:
    """What to write, and where."""

    file: str = dataclasses.field(
        default="data/gpu/text.npz", metadata={"help": "The output file, which ends in .npz and is replaced."}
    )
    vocab_size: int = dataclasses.field(default=4096, metadata={"help": "Vocabulary size."})
    most_tokens: int = dataclasses.field(
        default=16_000_000, metadata={"help": "The maximum number of training tokens."}
    )
    packages: list[str] = dataclasses.field(
        default_factory=lambda: ["transformers", "torch"],
        metadata={"help": "Installed packages whose source code is added to that of the standard library."},
    )

    def __post_init__(self):
        if not self.file.endswith(".npz"):
            raise UserError(f"`file` is {self.file!r}; the name must end in .npz.")
        if not 258 <= self.vocab_size <= 2**16:
            raise UserError(f"`vocab_size` is {self.vocab_size}; it must be from 258 to {2**16}.")
        if self.most_tokens < BLOCK:
            raise UserError(f"`most_tokens` is {self.most_tokens}; it must be at least {BLOCK}.")
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise UserError(f"`packages` names {package!r}, which is not installed: install it, or leave it out.")


def sources(packages: Iterable[str], known: set[str]) -> Iterator[str]:
    """The source code of packages, file by file, without `known` texts and duplicates."""
    for package in packages:
        for folder in importlib.util.find_spec(package).submodule_search_locations:
            for file in sorted(Path(folder).rglob("*.py")):
                text = file.read_text(encoding="utf-8", errors="replace")
                if text and text not in known:
                    known.add(text)
                    yield text


def write_tokens(file: Path, train: list[str], held_out: list[str], vocab_size: int, most_tokens: int) -> None:
    """Write the token ids of documents as the arrays `train` and `held_out`, with a tokenizer that is trained on `train`."""
    tokenizer = train_tokenizer(iter(train), vocab_size, BLOCK)
    arrays = {"vocab_size": np.array(vocab_size)}
    for name, texts in (("train", train), ("held_out", held_out)):
        packed = PackedBlocks(Dataset.from_dict({"text": texts}), "text", tokenizer, BLOCK, vocab_size)
        tokens = itertools.chain.from_iterable(packed.tokens_of_documents())
        arrays[name] = np.fromiter(itertools.islice(tokens, most_tokens), dtype=np.uint16)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"unfinished-{file.name}")
    np.savez_compressed(unfinished, **arrays)
    os.replace(unfinished, file)
    print({name: f"{len(arrays[name]):,} tokens" for name in ("train", "held_out")})


@command
def main():
    description = "Write the training text of training.benchmarks.gpu, as token ids in one file."
    parser = Parser(GPUDataArguments, "training.benchmarks.gpu_data", description)
    arguments = GPUDataArguments(**vars(parser.parse_args()))
    train, held_out = (list(part["text"]) for part in standard_library(TextDataArguments()))
    # About 3 bytes per token: files beyond this limit are not tokenized.
    room = 4 * arguments.most_tokens - sum(map(len, train))
    for text in sources(arguments.packages, {*train, *held_out}):
        room -= len(text)
        if room < 0:
            break
        train.append(text)
    write_tokens(Path(arguments.file), train, held_out, arguments.vocab_size, arguments.most_tokens)


if __name__ == "__main__":
    main()
