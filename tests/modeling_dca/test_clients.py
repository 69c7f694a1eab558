"""What other programs look for in a model: its class by name, a tokenizer's inputs, a command line, and no warning."""

import logging
import subprocess
import sys

import pytest
import torch
import transformers
from test_modeling_dca import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, pipeline
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotation

import modeling_dca
from modeling_dca import DCAConfig
from modeling_dca.__main__ import main
from modeling_dca.modeling_dca import CACHE_NAME


CLASSES = [
    name
    for name in modeling_dca.__all__
    if name.startswith("DCAFor") or name in ("DCAModel", "DCAVisionModel", "DCAVisionBackbone")
]


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_has_the_classes_by_name(name):
    """transformers' server, TRL and vLLM look up there what `architectures` in `config.json` says."""
    # (Not the `transformers` above, which this file may have from before transformers replaced its own module.)
    assert getattr(sys.modules["transformers"], name) is getattr(modeling_dca, name)


def test_programs_hold_the_classes_whenever_they_import_transformers():
    program = (
        "import transformers as first\n"
        "import modeling_dca\n"
        "import transformers as second\n"
        "print(first.DCAForCausalLM is second.DCAForCausalLM is modeling_dca.DCAForCausalLM, first is second)\n"
    )
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert completed.stdout.startswith("True"), completed.stderr[-2000:]


def test_registering_again_does_no_harm():
    modeling_dca.register()
    assert transformers.AutoModelForCausalLM._model_mapping[DCAConfig] is modeling_dca.DCAForCausalLM


def test_a_command_of_another_package_runs_where_the_models_are_known():
    # (Any will do: that of transformers needs more than transformers does.)
    command = [sys.executable, "-m", "modeling_dca", "pytest", "--version"]
    completed = subprocess.run(command, capture_output=True, text=True)
    assert completed.returncode == 0 and pytest.__version__ in completed.stdout, completed.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "usage: python -m modeling_dca COMMAND"),
        (["no-such", "-x"], "no installed package has a command 'no-such'; usage: "),
    ],
)
def test_a_command_that_there_is_not_is_refused(monkeypatch, arguments, words):
    monkeypatch.setattr(sys, "argv", ["modeling_dca", *arguments])
    with pytest.raises(SystemExit, match=words):
        main()


def test_a_pipeline_has_nothing_to_warn_of(tmp_path, byte_tokenizer, caplog, recwarn):
    """With the tokenizer that a run saves, and Llama beside it: the text of `generate`, and no warning that Llama has not."""
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "intermediate_size": 32}
    torch.manual_seed(0)
    both = {
        "llama": LlamaForCausalLM(LlamaConfig(**sizes, **special)),
        "dca": modeling_dca.DCAForCausalLM(DCAConfig(**sizes, **special)),
    }
    monitored, warnings = logging.getLogger("transformers"), {}
    monitored.addHandler(caplog.handler)
    try:
        for name, model in both.items():
            model.save_pretrained(tmp_path)
            byte_tokenizer.save_pretrained(tmp_path)
            caplog.clear()
            recwarn.clear()
            (found,) = pipeline("text-generation", str(tmp_path))("def f", max_new_tokens=5, do_sample=False)
            warnings[name] = {record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING}
            warnings[name] |= {str(warning.message) for warning in recwarn}
            inputs = byte_tokenizer("def f", return_tensors="pt")
            assert set(inputs) == {"input_ids", "attention_mask"}
            (ids,) = model.eval().generate(**inputs, max_new_tokens=5, do_sample=False)
            assert found["generated_text"] == byte_tokenizer.decode(ids, skip_special_tokens=True)
    finally:
        monitored.removeHandler(caplog.handler)
    assert warnings["dca"] <= warnings["llama"]


TEXTS = ["def f", "import torch"]
LABELS = {0: "contradiction", 1: "neutral", 2: "entailment"}


@torch.no_grad()
@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("feature-extraction", modeling_dca.DCAModel),
        ("text-classification", modeling_dca.DCAForSequenceClassification),
        ("zero-shot-classification", modeling_dca.DCAForSequenceClassification),
        ("token-classification", modeling_dca.DCAForTokenClassification),
    ],
)
def test_pipelines_of_the_heads(tmp_path, byte_tokenizer, task, head):
    """Texts of two lengths in a batch: each has what the model gives for it alone."""
    labels = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
    model = tiny_model(head, vocab_size=300, pad_token_id=1, **labels).eval()
    model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    run = pipeline(task, str(tmp_path), device="cpu", batch_size=2)

    def own(text):
        return model(**byte_tokenizer(text, return_tensors="pt"))

    def close(found, expected):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)

    if task == "feature-extraction":
        for text, found in zip(TEXTS, run(TEXTS)):
            expected = own(text).last_hidden_state[0]
            close(found[0][: len(expected)], expected)  # (the rest is padding)
    elif task == "text-classification":
        for text, found in zip(TEXTS, run(TEXTS, top_k=None)):
            scores = {each["label"]: each["score"] for each in found}
            close([scores[name] for name in LABELS.values()], own(text).logits[0].softmax(-1))
    elif task == "zero-shot-classification":
        found = run(TEXTS[0], ["code", "music"], hypothesis_template=" is {}.")
        scores = dict(zip(found["labels"], found["scores"]))
        entailed = torch.stack([own(f"{TEXTS[0]} is {label}.").logits[0, 2] for label in ("code", "music")])
        close([scores["code"], scores["music"]], entailed.softmax(-1))
    else:
        for text, found in zip(TEXTS, run(TEXTS, ignore_labels=[])):
            close([each["score"] for each in found], own(text).logits[0].softmax(-1).max(-1).values)
            assert [each["entity"] for each in found] == [LABELS[i] for i in own(text).logits[0].argmax(-1).tolist()]


def test_generation_takes_a_tokenizer(byte_tokenizer):
    """As transformers' server gives it, and who stops at a string must."""
    model = tiny_model(vocab_size=300).eval()
    inputs = byte_tokenizer("def f", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    for more in ({}, {"stop_strings": ["a text that does not come"]}):
        found = model.generate(**inputs, max_new_tokens=6, do_sample=False, tokenizer=byte_tokenizer, **more)
        assert torch.equal(found, plain)


def test_a_pipeline_of_vllm_is_refused_in_one_sentence():
    model = tiny_model()
    assert model.supports_pp_plan is False
    model.config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match="cannot be split into a pipeline.*--tensor-parallel-size"):
        model.supports_pp_plan  # noqa: B018


def test_cache_positions_are_taken_no_notice_of():
    """As in transformers' own models; Captum gives them to any model, after those that the cache has."""
    model, ids = tiny_model().eval(), torch.arange(2, 12).reshape(2, 5)
    expected = model(ids).logits
    assert torch.equal(model(ids, cache_position=torch.arange(5)).logits, expected)
    cache = {CACHE_NAME: transformers.DynamicCache()}
    model(ids[:, :3], **cache)
    found = model(ids[:, 3:], **cache, cache_position=torch.arange(3, 5)).logits
    torch.testing.assert_close(found, expected[:, 3:])


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_kernel_may_take_the_place_of_the_rotation(monkeypatch, factor):
    """As in Llama, whose own function serves as the kernel: it gets what is rotated, and nothing else."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}
    model = tiny_model(rope_parameters=rope, num_attention_heads=2, num_key_value_heads=1).eval()
    config, ids, calls = model.config, torch.arange(2, 12).reshape(2, 5), []
    expected = model(ids).logits

    def kernel(q, k, cos, sin, unsqueeze_dim=1):
        calls.append((q.shape, k.shape, cos.shape, sin.shape))
        return llama_rotation(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    monkeypatch.setattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", kernel)
    assert torch.equal(model(ids).logits, expected)
    width = int(config.head_dim * factor)
    assert calls == config.num_hidden_layers * [((2, 2, 5, width), (2, 1, 5, width), (1, 5, width), (1, 5, width))]


@pytest.fixture
def byte_tokenizer():
    alphabet = {"<|endoftext|>": 0, "<|pad|>": 1}
    for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 2):
        alphabet[letter] = index
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
