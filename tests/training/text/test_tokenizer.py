"""Tokenizers: one that is trained loses no text, one that exists is loaded if it fits."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from tests.training.tiny import documents
from training.support.errors import UserError
from training.text.tokenizer import END_OF_TEXT, PADDING, load_tokenizer, plain_tokens, train_tokenizer


pytestmark = pytest.mark.usefixtures("offline")
TEXTS = documents(60)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), 300, 64)


@pytest.fixture(params=["trained", "reloaded"])
def either(request, tokenizer, tmp_path):
    """A tokenizer as it was trained, and as it is loaded from where it was saved."""
    if request.param == "trained":
        return tokenizer
    tokenizer.save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces ",
        "\ttabs\t\tand\n\nnew\r\nlines\r\n\r",
        "null \x00 and other controls \x01\x1b\x7f",
        "emoji 🙂👩‍👩‍👧 and 日本語 und größe, never seen: ᚠᛇᚻ",
        "don 't , spaces before punctuation . n't 's",  # which some tokenizers clean up
        "e\u0301 is not \u00e9, \ufb01 is not fi",  # nor is anything normalized
        "def f(x):\n    return x  # code\n",
        "\ufeff\u200b\u2028\U0010ffff",
    ],
)
def test_any_text_comes_back(either, text):
    assert either.decode(either(text)["input_ids"]) == text


def test_special_tokens(either):
    assert either.bos_token == either.eos_token == END_OF_TEXT and either.pad_token == PADDING
    assert (either.eos_token_id, either.pad_token_id) == (0, 1)
    assert len(either) == 300 and either.model_max_length == 64
    assert max(either("".join(TEXTS))["input_ids"]) < 300
    # None is added to a text; one that is written out is one token, and left out of what is decoded if asked.
    ids = either(f"a{END_OF_TEXT}b")["input_ids"]
    assert ids.count(0) == 1 and len(ids) == 3
    assert either.decode(ids, skip_special_tokens=True) == "ab"


def test_tokenizer_learns_from_its_text(tokenizer):
    words = " deep cross attention layer"
    assert len(tokenizer(words)["input_ids"]) < 0.8 * len(tokenizer(words[::-1])["input_ids"])
    again = train_tokenizer(iter(TEXTS), 300, 64)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_smallest_vocabulary_is_the_bytes_and_two_tokens():
    tokenizer = train_tokenizer(iter(TEXTS), 258, 64)
    assert len(tokenizer) == 258
    assert len(tokenizer("größe")["input_ids"]) == len("größe".encode())
    with pytest.raises(UserError, match="`vocab_size` is 257, .* set it to 258 or more"):
        train_tokenizer(iter(TEXTS), 257, 64)


def test_tokenizer_is_loaded_from_a_path(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), 300)
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.eos_token_id == 0
    assert len(load_tokenizer(str(tmp_path), 301)) == 300
    with pytest.raises(UserError, match="`vocab_size` is 299, .* has 300 tokens: set it to 300 or more"):
        load_tokenizer(str(tmp_path), 299)


def test_tokenizer_whose_numbers_have_gaps_needs_the_greatest(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 9}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), 10).eos_token_id == 9
    with pytest.raises(UserError, match="`vocab_size` is 9, .* set it to 10 or more"):
        load_tokenizer(str(tmp_path), 9)


def test_tokenizer_of_another_family_names_what_models_of_this_one_take(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    other = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", model_input_names=names)
    assert "token_type_ids" in other("a")
    other.save_pretrained(tmp_path / "other")
    load_tokenizer(str(tmp_path / "other"), 10).save_pretrained(tmp_path / "run")
    assert set(AutoTokenizer.from_pretrained(tmp_path / "run")("a")) == {"input_ids", "attention_mask"}


# Special tokens that are written out


def word_level(eos):
    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, eos: 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos, unk_token="?")


def unigram(eos):
    pieces = [("?", 0.0), (eos, 0.0), *((piece, -3.0) for piece in "</s>a")]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)), eos_token=eos, unk_token="?"
    )


def byte_level(eos):
    tokenizer = train_tokenizer(iter(TEXTS), 300, 64)
    tokenizer.add_special_tokens({"eos_token": eos})
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, word_level, unigram, lambda eos: ByT5Tokenizer(eos_token=eos)])
def test_no_text_becomes_a_special_token(make):
    tokenizer = make("</s>")
    texts = ["a</s>a", "</s>", "a </s> a </s></s>", "a", ""]
    encoded = plain_tokens(tokenizer, texts)
    assert not [ids for ids in encoded if tokenizer.eos_token_id in ids]
    # What has none in it is read as ever.
    assert encoded[3:] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[3:]]
    if make not in (word_level, unigram):  # which do not know all of it
        assert [tokenizer.decode(ids) for ids in encoded] == texts


def test_text_that_can_only_be_read_as_a_special_token_is_refused():
    with pytest.raises(UserError, match="has 'b' in its text, which the tokenizer can only read as a special token"):
        plain_tokens(word_level("b"), ["a b a"])


def test_tokenizer_that_cannot_be_loaded(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), str(tmp_path / "nowhere"), "user/nowhere"):
        with pytest.raises(UserError, match="`tokenizer` is") as error:
            load_tokenizer(name, 300)
        assert name in str(error.value)


def test_tokenizer_must_know_an_end_of_text(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path), 300)
