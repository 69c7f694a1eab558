"""Tokenizers of language models: a byte-level BPE that is trained on the run's text, or an existing one."""

import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from training.run.checkpoints import UNFINISHED, move_finished, told_if_not_written
from training.support.errors import UserError, innermost_message


END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
#: What the models take from a tokenizer: no `token_type_ids`, which BERT's tokenizers return.
INPUT_NAMES = ["input_ids", "attention_mask"]


def train_tokenizer(texts: Iterator[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer, which can encode any text without loss.

    Args:
        texts: the documents to train on.
        vocab_size: the number of tokens: the 256 bytes, two special tokens, and merges for the rest.
        model_max_length: the longest sequence of the model, in tokens.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 2
    if vocab_size < smallest:
        raise UserError(
            f"`vocab_size` is {vocab_size}, but a byte-level tokenizer has at least {smallest} tokens: "
            f"set it to {smallest} or more."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=model_max_length,
        model_input_names=INPUT_NAMES,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name_or_path: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer from a local path or the Hub, and set its `model_input_names` to those of the models.

    Raises:
        [`UserError`]: there is none, it has no end-of-text token, or it has more tokens than `vocab_size`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, model_input_names=INPUT_NAMES)
    except (OSError, ValueError) as error:
        where = "folder" if Path(name_or_path).exists() else "local folder or Hub id"
        raise UserError(
            f"`tokenizer` is {name_or_path!r}, a {where} without a tokenizer: {innermost_message(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer {name_or_path!r} has no end-of-text token (`eos_token`) to separate documents: choose another."
        )
    # (Some ids may have no token.)
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if size > vocab_size:
        raise UserError(
            f"`vocab_size` is {vocab_size}, but the tokenizer {name_or_path!r} has {size} tokens: set it to {size} or more."
        )
    return tokenizer


def plain_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """
    The token ids of plain texts: the names of special tokens are read as text.

    Raises:
        [`UserError`]: the tokenizer always reads such a name as a special token.
    """
    encode = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=True, verbose=False)
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    special.pop(tokenizer.unk_token_id, None)
    encoded = encode(texts)["input_ids"]
    for index, ids in enumerate(encoded):
        if special.keys().isdisjoint(ids):
            continue
        # Some tokenizers find it nevertheless: then its first character is encoded apart from the others.
        cut = re.compile("|".join(f"(?<={re.escape(each[0])})(?={re.escape(each[1:])})" for each in special.values()))
        pieces = cut.split(texts[index])
        encoded[index] = ids = list(itertools.chain.from_iterable(encode(pieces)["input_ids"]))
        met = next((special[each] for each in ids if each in special), None)
        if met is not None:
            raise UserError(
                f"A document has {met!r} in its text, which the tokenizer can only read as a special token: remove it."
            )
    return encoded


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer to the folder of a run, so that a resumed run need not train it again."""
    unfinished = folder / UNFINISHED / "tokenizer"
    with told_if_not_written("The tokenizer", folder):
        tokenizer.save_pretrained(unfinished)
        move_finished(unfinished, folder)
