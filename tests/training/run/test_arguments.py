"""What a run is asked for: the YAML file, the command line over it, and a sentence for whatever is wrong with them."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments

from modeling_dca import DCABaseConfig, DCAConfig, DCAForCausalLM, DCAForImageClassification, DCAVisionConfig
from tests.training.tiny import IMAGE_RUN, IMAGES, TEXT, TEXT_RUN, call, refusal
from training import causal_lm, image_classification
from training.images.fields import ImageClassificationArguments, ImageDataArguments
from training.run import fields
from training.run import parsing as arguments
from training.run.checks import check_optimizer
from training.support.errors import innermost_message
from training.text.fields import CausalLMArguments, TextDataArguments


ROOT = Path(__file__).parents[3]
COMMANDS = {
    "text": (causal_lm.main, TEXT_RUN, TEXT),
    "image": (image_classification.main, IMAGE_RUN, IMAGES),
}


def assert_names(line, *words):
    """The sentence names the field or file, its value, and what would be right."""
    assert not [word for word in words if word not in line], line
    assert len(line) < 1000


def parse(*argv):
    classes = (DCAForCausalLM, TextDataArguments, CausalLMArguments)
    return arguments.parse_run(list(map(str, argv)), "training.causal_lm", "A test.", *classes)


# Each field once in the YAML file and once on the command line: (command, section, field, value, words).
ACTIVATION_CHECKPOINTING = pytest.mark.skipif(
    not hasattr(TrainingArguments, "activation_checkpointing"), reason="it came with a later transformers"
)

WRONG_VALUES = [
    ("text", "model", "residual_scheme", "grn_v4", ["`residual_scheme` is 'grn_v4'", "did you mean 'grn_v"]),
    ("text", "model", "residual_scheme", "densenet", ["'densenet'", "Known: standard, grn_v1, grn_v2, grn_v3, dca"]),
    ("text", "model", "last_k", 0, ["`last_k` is 0", "at least 1"]),
    ("text", "model", "last_k", -2, ["`last_k` is -2", "at least 1"]),
    ("text", "model", "last_k", "two", ["'last_k'", "int", "'two'"]),
    ("text", "model", "hidden_size", "big", ["'hidden_size'", "int", "'big'"]),
    ("text", "model", "hidden_size", 16.5, ["'hidden_size'", "int", "16.5"]),
    ("text", "model", "hidden_size", 17, ["`hidden_size` (17)", "multiple of `num_attention_heads` (2)"]),
    ("text", "model", "hidden_size", 0, ["`hidden_size` is 0", "at least 1"]),
    ("text", "model", "num_attention_heads", 3, ["`hidden_size` (16)", "`num_attention_heads` (3)"]),
    ("text", "model", "num_key_value_heads", 3, ["`num_attention_heads` (2)", "`num_key_value_heads` (3)"]),
    ("text", "model", "gated_mlp", "maybe", ["'gated_mlp'", "bool", "'maybe'"]),
    ("text", "model", "norm_type", "layernorm", ["`norm_type` is 'layernorm'", "'layer_norm'"]),
    ("text", "model", "hidden_act", "gelux", ["`hidden_act` is 'gelux'", "did you mean 'gelu'"]),
    ("text", "model", "grn_implementation", "eagr", ["`grn_implementation` is 'eagr'", "did you mean 'eager'"]),
    ("text", "model", "rope_parameters", {"rope_type": "yarnn"}, ["'yarnn'", "did you mean 'yarn'"]),
    ("text", "model", "attention_dropout", 2, ["`attention_dropout` is 2", "from 0 to 1"]),
    ("text", "model", "initializer_range", 2.5, ["`initializer_range`", "1.0", "2.5"]),
    ("text", "model", "vocab_size", 257, ["`vocab_size` is 257", "258"]),
    ("text", "data", "block_size", "long", ["--block_size", "int", "'long'"]),
    ("text", "data", "block_size", 1, ["`block_size` is 1", "at least 2"]),
    ("text", "data", "max_eval_documents", 0, ["`max_eval_documents` is 0", "at least 1"]),
    ("text", "data", "max_eval_overlap", 1, ["`max_eval_overlap` is 1", "at least 0 and below 1"]),
    ("text", "data", "max_eval_overlap", -0.1, ["`max_eval_overlap` is -0.1", "at least 0 and below 1"]),
    ("text", "data", "tokenizer_documents", -1, ["`tokenizer_documents` is -1", "at least 1"]),
    ("text", "data", "eval_fraction", 0, ["`eval_fraction` is 0", "between 0 and 1"]),
    ("text", "data", "eval_fraction", 1, ["`eval_fraction` is 1", "between 0 and 1"]),
    ("text", "data", "eval_fraction", "half", ["--eval_fraction", "float", "'half'"]),
    ("text", "data", "streaming", "sometimes", ["--streaming", "sometimes", "true/false"]),
    ("text", "training", "max_steps", "many", ["--max_steps", "int", "'many'"]),
    ("text", "training", "max_steps", 2.5, ["--max_steps", "int", "'2.5'"]),
    ("text", "training", "learning_rate", "fast", ["--learning_rate", "float", "'fast'"]),
    ("text", "training", "learning_rate", -1, ["`learning_rate` is -1", "at least 0"]),
    ("text", "training", "learning_rate", ".nan", ["`learning_rate`", "nan", "at least 0"]),
    ("text", "training", "adam_beta2", 2, ["`adam_beta2` is 2", "below 1"]),
    ("text", "training", "warmup_steps", -1, ["`warmup_steps` is -1", "at least 0"]),
    ("text", "training", "per_device_train_batch_size", 0, ["`per_device_train_batch_size` is 0", "at least 1"]),
    ("text", "training", "per_device_eval_batch_size", -4, ["`per_device_eval_batch_size` is -4", "at least 1"]),
    ("text", "training", "gradient_accumulation_steps", 0, ["`gradient_accumulation_steps` is 0", "at least 1"]),
    ("text", "training", "global_batch_size", 0, ["`global_batch_size` is 0", "at least 1"]),
    ("text", "training", "global_batch_size", 6, ["`global_batch_size` is 6", "multiple of 4", "devices 1"]),
    ("text", "training", "global_batch_size", 2, ["`global_batch_size` is 2", "multiple of 4"]),
    ("text", "training", "seed", -1, ["`seed` is -1", "at least 0"]),
    ("text", "training", "lr_scheduler_type", "cosinus", ["cosinus", "'cosine'"]),
    ("text", "training", "optim", "adam", ["--optim", "'adam'", "adamw_torch"]),
    ("text", "training", "eval_strategy", "often", ["--eval_strategy", "'often'", "'epoch'"]),
    ("text", "training", "baseline", "standart", ["`baseline` is 'standart'", "did you mean 'standard'"]),
    ("text", "training", "baseline", "dca", ["`baseline` is 'dca'", "own `residual_scheme`"]),
    ("text", "training", "seed", 2**32, ["`seed` is 4294967296", "at most 4294967295"]),
    ("text", "training", "data_seed", -1, ["`data_seed` is -1", "at least 0"]),
    ("text", "training", "data_seed", 10**20, ["`data_seed` is 1", "at most 4294967295"]),
    ("text", "training", "max_steps", 0, ["`max_steps` is 0", "at least 1", "`num_train_epochs`"]),
    ("text", "training", "learning_rate", 1e999, ["`learning_rate` is inf", "finite"]),
    ("text", "training", "warmup_steps", 1e999, ["`warmup_steps` is inf", "finite"]),
    ("text", "training", "warmup_steps", 2.5, ["`warmup_steps` is 2.5", "whole number of steps"]),
    ("text", "training", "weight_decay", 1e999, ["`weight_decay` is inf", "finite"]),
    ("text", "training", "adam_epsilon", -1, ["`adam_epsilon` is -1", "at least 0"]),
    ("text", "training", "max_grad_norm", -1, ["`max_grad_norm` is -1", "at least 0"]),
    ("text", "training", "label_smoothing_factor", 1.5, ["`label_smoothing_factor` is 1.5", "at most 1"]),
    ("text", "training", "label_smoothing_factor", -0.5, ["`label_smoothing_factor` is -0.5", "at least 0"]),
    ("text", "training", "neftune_noise_alpha", -1, ["`neftune_noise_alpha` is -1", "at least 0"]),
    ("text", "training", "logging_steps", 1e999, ["`logging_steps` is inf", "a number of steps"]),
    ("text", "training", "logging_steps", -1, ["`logging_steps` is -1", "a number of steps"]),
    ("text", "training", "save_steps", 0, ["`save_steps` is 0", "a number of steps"]),
    ("text", "training", "save_steps", ".nan", ["`save_steps` is nan", "a number of steps"]),
    ("text", "training", "eval_accumulation_steps", 0, ["`eval_accumulation_steps` is 0", "at least 1"]),
    ("text", "training", "ddp_timeout", 10**14, ["`ddp_timeout` is 1", "at most"]),
    ("text", "training", "ddp_timeout", 0, ["`ddp_timeout` is 0", "at least 1"]),
    ("text", "training", "prediction_loss_only", True, ["`prediction_loss_only` is True", "leave it out"]),
    ("text", "training", "eval_do_concat_batches", False, ["`eval_do_concat_batches` is False", "leave it out"]),
    ("text", "training", "batch_eval_metrics", True, ["`batch_eval_metrics` is True", "leave it out"]),
    ("text", "training", "use_liger_kernel", True, ["`use_liger_kernel` is True", "no kernels"]),
    ("text", "training", "use_cache", True, ["`use_cache` is True", "leave it out"]),
    ("text", "training", "enable_jit_checkpoint", True, ["`enable_jit_checkpoint` is True", "SIGTERM"]),
    ("text", "training", "do_predict", True, ["`do_predict` is True", "leave it out"]),
    ("text", "training", "label_names", "input_ids", ["`label_names` is ['input_ids']", "leave it out"]),
    ("text", "training", "dataloader_persistent_workers", True, ["`dataloader_num_workers` is 0", "set that"]),
    ("text", "training", "dataloader_multiprocessing_context", "spawn", ["'spawn'", "`dataloader_num_workers` is 0"]),
    ("text", "training", "train_sampling_strategy", "group_by_length", ["'group_by_length'", "'sequential'"]),
    ("text", "training", "optim_target_modules", "x", ["`optim_target_modules`", "GaLore"]),
    ("text", "training", "save_strategy", "best", ["`save_strategy` is 'best'", "`eval_strategy`"]),
    ("text", "training", "metric_for_best_model", "bogus", ["'bogus'", "Known: loss, perplexity, bits_per_byte"]),
    (
        "text",
        "training",
        "metric_for_best_model",
        "accuracy",
        ["'accuracy'", "Known: loss, perplexity, bits_per_byte"],
    ),
    ("text", "training", "metric_for_best_model", "eval_perplexty", ["'eval_perplexty'", "did you mean 'perplexity'"]),
    ("text", "training", "include_num_input_tokens_seen", "some", ["'some'", "'non_padding'"]),
    ("text", "training", "report_to", "bogus", ["`report_to` is ['bogus']", "tensorboard"]),
    ("text", "training", "accelerator_config", "nowhere.json", ["nowhere.json", "No such file"]),
    ("text", "training", "accelerator_config", '{"gradient_accumulation_kwargs": {"bogus": 1}}', ["'bogus'"]),
    (
        *("text", "training", "accelerator_config", '{"gradient_accumulation_kwargs": {"num_steps": 3}}'),
        ["`num_steps`", "set `gradient_accumulation_steps`"],
    ),
    ("text", "training", "debug", "tpu_metrics_debug", ["`debug` is 'tpu_metrics_debug'", "no TPU"]),
    ("text", "training", "fp16", True, ["`fp16`", "`bf16`"]),
    ("text", "training", "fsdp", True, ["`fsdp` is set", "`accelerate launch`"]),
    ("text", "training", "torch_compile_backend", "bogus", ["`torch_compile_backend` is 'bogus'"]),
    ("text", "training", "torch_compile_mode", "bogus", ["'bogus' as `torch_compile_mode`", "reduce-overhead"]),
    ("image", "training", "metric_for_best_model", "perplexity", ["'perplexity'", "Known: loss, accuracy"]),
    ("image", "training", "prediction_loss_only", True, ["`prediction_loss_only` is True", "leave it out"]),
    ("image", "model", "image_size", 9, ["`image_size` (9)", "multiple of `patch_size` (4)"]),
    ("image", "model", "image_size", "big", ["'image_size'", "int", "'big'"]),
    ("image", "model", "patch_size", 3, ["`image_size` (8)", "`patch_size` (3)"]),
    ("image", "model", "num_channels", 0, ["`num_channels` is 0", "at least 1"]),
    ("image", "model", "pooling", "max", ["`pooling` is 'max'", "mean, cls"]),
    ("image", "data", "eval_fraction", 1.5, ["`eval_fraction` is 1.5", "between 0 and 1"]),
    ("image", "training", "num_train_epochs", "few", ["--num_train_epochs", "float", "'few'"]),
]


@pytest.mark.parametrize("place", ["file", "command_line"])
@pytest.mark.parametrize(("name", "section", "field", "value", "words"), WRONG_VALUES)
def test_wrong_value_is_refused(room, capsys, place, name, section, field, value, words):
    main, file, content = COMMANDS[name]
    given = []
    if place == "file":
        value = float("nan") if value == ".nan" else value
        (room / file).write_text(yaml.safe_dump({**content, section: {**content[section], field: value}}))
    else:
        given = [f"--{field}={value}" if value != ".nan" else f"--{field}=nan"]
    assert_names(refusal(capsys, main, file, *given), *words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--residual_scheme=standard", "--last_k=1"], ["`last_k` is 1", "'standard'", "leave `last_k` out"]),
        (
            ["--position_embedding=learned", "--block_size=33"],
            ["`block_size` is 33", "`max_position_embeddings` is 32"],
        ),
        (["--streaming", "--max_steps=-1", "--num_train_epochs=1"], ["`max_steps` is -1", "`streaming`"]),
        (["--max_steps=-1", "--num_train_epochs=0"], ["`num_train_epochs` is 0", "above 0"]),
        (["--max_steps=-1", "--num_train_epochs=nan"], ["`num_train_epochs` is nan", "above 0"]),
        (["--max_steps=-1", "--num_train_epochs=inf"], ["`num_train_epochs` is inf", "finite"]),
        (["--eval_strategy=steps", "--eval_steps=-1"], ["`eval_steps` is -1", "a number of steps"]),
        (["--report_to", "tensorboard", "wandb"], ["['tensorboard', 'wandb']", "requires wandb", "pip install wandb"]),
        (["--report_to", "tensorboard", "none"], ["['tensorboard', 'none']", "'none' excludes the others"]),
        (["--report_to", "all", "wandb"], ["['all', 'wandb']", "'all' excludes the others"]),
        (
            ["--dataloader_drop_last", "--per_device_train_batch_size=200"],
            ["`dataloader_drop_last`", "132 training examples", "a batch of 200"],
        ),
        (["--dataloader_num_workers=1", "--dataloader_prefetch_factor=0"], ["`dataloader_prefetch_factor` is 0"]),
        (
            ["--global_batch_size=8", '--accelerator_config={"split_batches": true}'],
            ["`split_batches`", "`global_batch_size`"],
        ),
        (
            ["--gradient_checkpointing", '--gradient_checkpointing_kwargs={"bogus": 1}'],
            ["_checkpointing_kwargs` is {'bogus': 1}"],
        ),
        pytest.param(
            ["--activation_checkpointing", '--activation_checkpointing_kwargs={"every_n_layers": 0}'],
            ["0 as `every_n_layers`", "at least 1"],
            marks=ACTIVATION_CHECKPOINTING,
        ),
        pytest.param(
            ["--activation_checkpointing", '--activation_checkpointing_kwargs={"offload": true}'],
            ["`offload`", "no device other than the CPU"],
            marks=ACTIVATION_CHECKPOINTING,
        ),
        (
            ["--auto_find_batch_size", "--baseline=standard"],
            ["`auto_find_batch_size`", "set `global_batch_size`, too"],
        ),
        (["--streaming", "--train_sampling_strategy=sequential"], ["'sequential'", "`shuffle_buffer`"]),
        (["--push_to_hub", "--hub_strategy=every_save"], ["`hub_strategy` is 'every_save'", "'end'"]),
        (["--hidden_sz=16"], ["--hidden_sz", "command line", "did you mean 'hidden_size'"]),
        (["--learning-rat", "0.1"], ["learning_rat", "did you mean 'learning_rate'"]),
        (["--hidden=16"], ["--hidden ", "command line"]),  # not taken for the field that it begins
        (["--qqqqqqqq=1"], ["--qqqqqqqq", "--help"]),
        (["surplus"], ["surplus"]),
        (["--max_steps"], ["--max_steps", "expected one argument"]),
        (
            ["--global_batch_size=8", "--gradient_accumulation_steps=3"],
            ["`gradient_accumulation_steps` is 3", "`global_batch_size` = 8 makes it 2", "leave one of them out"],
        ),
    ],
)
def test_wrong_command_line_is_refused(room, capsys, given, words):
    assert_names(refusal(capsys, causal_lm.main, TEXT_RUN, *given), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bytes(range(256)), ["not a YAML file"]),
        (b"\x00\x01\x02", ["not a YAML file"]),
        (b"\x89PNG\r\n\x1a\n\x00\x00", ["not a YAML file"]),
        (b"model: {a: [\n", ["not a YAML file", "line 2"]),
        (b"model:\n\thidden_size: 16\n", ["not a YAML file", "line 2"]),
        (b"- model\n- data\n", ["sections model, data, training"]),
        (b"hello", ["sections model, data, training"]),
        (b"", ["sections model, data, training"]),
        (b"trainin: {}\n", ["unknown section 'trainin'", "did you mean 'training'"]),
        (b"1: {}\n", ["unknown section 1", "Known: model, data, training"]),
        (b"model: [hidden_size, 16]\n", ["section 'model'", "['hidden_size', 16]", "must map fields to values"]),
        (b"training: fast\n", ["section 'training'", "'fast'", "must map fields to values"]),
        (b"training: 0\n", ["section 'training'", "is 0", "must map fields to values"]),
        (b"model: {hidden_sz: 16}\n", ["'model'", "unknown field 'hidden_sz'", "did you mean 'hidden_size'"]),
        (b"data: {datset: x}\n", ["'data'", "unknown field 'datset'", "did you mean 'dataset'"]),
        (b"training: {learning_rat: 1}\n", ["'training'", "'learning_rat'", "did you mean 'learning_rate'"]),
        (b"model: {learning_rate: 1}\n", ["'model'", "unknown field 'learning_rate'"]),
        (b"model: {pad_token_id: 1}\n", ["'model'", "unknown field 'pad_token_id'"]),  # the run sets it itself
        (b"model: {7: 1}\n", ["'model'", "unknown field 7"]),
    ],
)
def test_file_that_is_no_configuration_is_refused(room, capsys, content, words):
    (room / "wrong.yaml").write_bytes(content)
    assert_names(refusal(capsys, causal_lm.main, "wrong.yaml"), "wrong.yaml", *words)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"run.yaml": "training: {seed: 1}\ntraining: {max_steps: 2}"}, ["run.yaml", "'training' twice", "line 2"]),
        ({"run.yaml": "training:\n  seed: 1\n  seed: 1\n"}, ["run.yaml", "'seed' twice", "line 3"]),
        ({"run.yaml": "training: {lr_scheduler_kwargs: {timescale: 1, timescale: 2}}"}, ["'timescale' twice"]),
        ({"run.yaml": "model: {rope_parameters: {rope_theta: 1.0, 'rope_theta': 2.0}}"}, ["'rope_theta' twice"]),
        (
            {"run.yaml": "base: b.yaml", "b.yaml": "data: {}\nmodel: {}\ndata: {}"},
            ["b.yaml", "'data' twice", "line 3"],
        ),
    ],
)
def test_key_that_is_there_twice_is_refused(room, capsys, files, words):
    for name, content in files.items():
        (room / name).write_text(content)
    assert_names(refusal(capsys, causal_lm.main, "run.yaml"), "is not a YAML file", *words)


def test_key_that_is_there_twice_is_refused_on_the_command_line(room, capsys):
    line = refusal(capsys, causal_lm.main, TEXT_RUN, "--rope_parameters={rope_theta: 1.0, rope_theta: 2.0}")
    assert_names(line, "--rope_parameters", "invalid value")


def test_merged_key_of_yaml_may_be_overridden(room):
    shared = "&shared {<<: {hidden_size: 32, num_attention_heads: 2}, hidden_size: 48}"
    (room / "run.yaml").write_text(
        f"training: {{lr_scheduler_kwargs: {{inner: {shared}}}}}\nmodel:\n  <<: *shared\n  hidden_size: 64\n"
    )
    run = parse("run.yaml")
    assert run.config.hidden_size == 64 and run.config.num_attention_heads == 2
    assert run.training.lr_scheduler_kwargs == {"inner": {"hidden_size": 48, "num_attention_heads": 2}}


def test_file_that_is_not_there_is_refused(room, capsys):
    assert_names(refusal(capsys, causal_lm.main, "nowhere.yaml"), "nowhere.yaml", "No such file")
    assert_names(refusal(capsys, causal_lm.main, "."), "cannot be read", "directory")


def test_fields_of_a_base_stand_where_the_file_has_none(room):
    (room / "shared").mkdir()
    (room / "shared" / "base.yaml").write_text(
        "base: deeper.yaml\nmodel: {hidden_size: 64, last_k: 3}\ntraining: {seed: 5}\n"
    )
    (room / "shared" / "deeper.yaml").write_text(
        "model: {vocab_size: 400, hidden_size: 32, rope_parameters: {rope_type: default, rope_theta: 5.0}}\n"
        "data: {block_size: 8, text_column: body, eval_split: test}\ntraining: {seed: 6, max_steps: 9}\n"
    )
    (room / "run.yaml").write_text(
        "model: {last_k: null, rope_parameters: {rope_theta: 7.0}}\ndata: {text_column: title, eval_split: null}\n"
        "base: shared/base.yaml\n"  # wherever in the file it stands
    )
    run = parse("run.yaml")
    config, data, training = run.config, run.data, run.training
    assert (config.hidden_size, config.vocab_size, config.last_k) == (64, 400, None)
    assert (data.text_column, data.block_size, data.eval_split) == ("title", 8, None)
    assert (training.seed, training.max_steps, training.output_dir) == (5, 9, "runs/run")
    assert config.rope_parameters["rope_theta"] == 7.0  # a field is taken whole

    # The record stands alone.
    assert "base" not in run.named
    (room / "elsewhere").mkdir()
    (room / "elsewhere" / "record.yaml").write_text(yaml.safe_dump(run.named))
    again = parse("elsewhere/record.yaml")
    assert again.named == run.named and again.config.to_dict() == config.to_dict() and again.data == data

    assert parse("run.yaml", "--seed=7", "--block_size=16").data.block_size == 16
    assert parse("run.yaml", "--seed=7").training.seed == 7


def test_file_that_names_no_more_than_its_base_is_a_run_of_its_own(room):
    (room / "second.yaml").write_text(f"base: {room / TEXT_RUN}\nmodel:\n")
    first, second = parse(TEXT_RUN), parse("second.yaml")
    assert second.config.to_dict() == first.config.to_dict() and second.training.output_dir == "runs/second"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"run.yaml": "base: run.yaml"}, ["`base` of run.yaml is 'run.yaml'", "a file cannot be its own base"]),
        (
            {"run.yaml": "base: a/b.yaml", "a/b.yaml": "base: c.yaml", "a/c.yaml": "base: ../a/b.yaml"},
            ["`base` of a/c.yaml is '../a/b.yaml'", "a file cannot be its own base"],
        ),
        (
            {"run.yaml": "base: nowhere.yaml"},
            ["nowhere.yaml, the `base` of run.yaml,", "cannot be read", "No such file"],
        ),
        (
            {"run.yaml": "base: a/b.yaml", "a/b.yaml": "base: c.yaml"},
            ["a/c.yaml, the `base` of a/b.yaml", "No such file"],
        ),
        ({"run.yaml": "base: ''"}, ["cannot be read", "directory"]),
        ({"run.yaml": "base: [a.yaml]"}, ["`base` of run.yaml is ['a.yaml']", "the path of a YAML file"]),
        ({"run.yaml": "base: 7"}, ["`base` of run.yaml is 7", "the path of a YAML file"]),
        ({"run.yaml": "base:"}, ["`base` of run.yaml is None", "the path of a YAML file"]),
        ({"run.yaml": "base: b.yaml", "b.yaml": "a: ["}, ["b.yaml, the `base` of run.yaml,", "not a YAML file"]),
        ({"run.yaml": "base: b.yaml", "b.yaml": "hello"}, ["b.yaml, the `base` of run.yaml,", "sections model, data"]),
        ({"run.yaml": "base: b.yaml", "b.yaml": "model: 7"}, ["section 'model' of b.yaml", "is 7"]),
        (
            {"run.yaml": "base: b.yaml", "b.yaml": "model: {hidden_sz: 7}"},
            ["section 'model' of b.yaml", "'hidden_sz'", "did you mean 'hidden_size'"],
        ),
        ({"run.yaml": "bas: b.yaml"}, ["unknown section 'bas'", "did you mean 'base'"]),
    ],
)
def test_wrong_base_is_refused(room, capsys, files, words):
    (room / "a").mkdir()
    for name, content in files.items():
        (room / name).write_text(content)
    assert_names(refusal(capsys, causal_lm.main, "run.yaml"), *words)


@pytest.mark.parametrize(("processes", "steps"), [(1, 12), (2, 6), (3, 4), (12, 1)])
def test_global_batch_is_the_same_on_any_number_of_devices(room, monkeypatch, processes, steps):
    monkeypatch.setattr(CausalLMArguments, "world_size", processes)
    run = parse(TEXT_RUN, "--global_batch_size=48")
    assert run.training.gradient_accumulation_steps == steps
    # What follows from the number of devices is not part of what was asked for.
    assert run.named["training"]["global_batch_size"] == 48
    assert "gradient_accumulation_steps" not in run.named["training"]


def test_global_batch_that_the_devices_cannot_take_is_refused(room, capsys, monkeypatch):
    monkeypatch.setattr(CausalLMArguments, "world_size", 5)
    words = ["`global_batch_size` is 48", "multiple of 20", "`per_device_train_batch_size` is 4", "devices 5"]
    assert_names(refusal(capsys, causal_lm.main, TEXT_RUN, "--global_batch_size=48"), *words)


@pytest.mark.parametrize("given", [[], ["--max_steps=2"], ["--max_steps", "2", TEXT_RUN]])
def test_configuration_must_be_named(room, capsys, given):
    assert_names(refusal(capsys, causal_lm.main, *given), "CONFIGURATION.yaml")


def test_command_ends_without_a_traceback(tmp_path):
    line = [sys.executable, "-m", "training.causal_lm", "nowhere.yaml"]
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert completed.returncode == 2 and completed.stdout == ""
    assert completed.stderr.splitlines()[-1].startswith("error: The configuration nowhere.yaml cannot be read")
    assert "Traceback" not in completed.stderr


@pytest.mark.parametrize(
    ("main", "model_class", "data_class", "training_class"),
    [
        (causal_lm.main, DCAForCausalLM, TextDataArguments, CausalLMArguments),
        (
            image_classification.main,
            DCAForImageClassification,
            ImageDataArguments,
            ImageClassificationArguments,
        ),
    ],
)
@pytest.mark.parametrize("given", [["--help"], ["-h"], ["run.yaml", "--help"]])
def test_help_tells_every_field_and_its_meaning(room, capsys, main, model_class, data_class, training_class, given):
    (room / "run.yaml").write_text("training: {max_steps: 1}\n")
    with pytest.raises(SystemExit) as exit:
        call(main, *given)
    assert exit.value.code == 0
    text = capsys.readouterr().out
    config_class = model_class.config_class
    own = {name for name in config_class.__annotations__ if not name.startswith("_")}
    inherited = {name for name in DCABaseConfig.__annotations__ if not name.startswith("_")}
    fields = own | inherited
    fields -= {*arguments.NOT_MODEL_FIELDS, "model_type", "keys_to_ignore_at_inference"}
    fields -= {name for name in fields if "plan" in name}
    assert {"hidden_size", "last_k", "residual_scheme"} < fields
    fields.add("initial_checkpoint")
    fields |= {field.name for each in (data_class, training_class) for field in dataclasses.fields(each) if field.init}
    # Each begins a paragraph, and words follow: `--name VALUE  What it means.`
    paragraphs = re.split(r"\n  (?=-)", text)
    meanings = {}
    for paragraph in paragraphs:
        if match := re.match(r"(?:-\w,? ?)?(?:[^-\n]*)?--(\w+)", paragraph):
            meanings[match[1]] = re.sub(r"--?[\w-]+|\{[^}]*\}|\b[A-Z_]+\b|\(default[^)]*\)", "", paragraph)
    assert sorted(fields - meanings.keys()) == []
    assert [name for name in sorted(fields) if len(re.findall(r"[a-z]{2,}", meanings[name])) < 3] == []


def test_meanings_of_the_fields_of_a_model_are_those_of_its_docstring():
    of_text, of_images = map(arguments._field_documentation, (DCAConfig, DCAVisionConfig))
    assert DCAConfig.own_fields() <= of_text.keys() and DCAVisionConfig.own_fields() <= of_images.keys()
    assert of_text["last_k"] == of_images["last_k"] and of_text["last_k"].endswith("`None` keeps all of them apart.")
    # A class's own words go over those of its base, and the last field ends before the next paragraph.
    assert of_images["position_embedding"].startswith('`"sincos"` (fixed sine and cosine of row and column)')
    assert of_text["positions_by_mask"].endswith("as in OPT.")
    assert of_text["source_config"].endswith("for the conversion back.")


def test_command_line_goes_over_the_file(room):
    run = parse(TEXT_RUN, "--hidden_size=32", "--residual_scheme", "grn_v2", "--max-steps", "9", "--text_column=body")
    assert run.config.hidden_size == 32 and run.config.residual_scheme == "grn_v2"
    assert run.config.num_hidden_layers == TEXT["model"]["num_hidden_layers"]
    assert run.training.max_steps == 9 and run.data.text_column == "body" and run.data.block_size == 16


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "last_k", None),
        ("model", "layer_types", ["full_attention", "full_attention"]),
        ("model", "rope_parameters", {"rope_type": "default", "rope_theta": 5000.0}),
        ("model", "tie_word_embeddings", True),
        ("model", "norm_eps", 1e-7),
        ("training", "lr_scheduler_kwargs", {"timescale": 7}),
        ("training", "report_to", ["tensorboard", "wandb"]),
        ("training", "bf16_full_eval", False),
        ("training", "output_dir", "a folder/with a space"),
        ("data", "text_column", "--text"),
    ],
)
def test_values_of_every_kind_come_from_the_file(room, section, field, value):
    (room / TEXT_RUN).write_text(yaml.safe_dump({**TEXT, section: {**TEXT[section], field: value}}))
    run = parse(TEXT_RUN)
    assert getattr(getattr(run, "config" if section == "model" else section), field) == value


def test_number_that_yaml_takes_for_text_is_a_number(room):
    assert parse(TEXT_RUN, "--norm_eps=1e-5").config.norm_eps == 1e-5
    (room / TEXT_RUN).write_text("model: {norm_eps: 1e-7}\ntraining: {learning_rate: 1e-4}\n")
    run = parse(TEXT_RUN)
    assert run.config.norm_eps == 1e-7 and run.training.learning_rate == 1e-4


def test_record_has_what_was_named_and_no_more(room, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    run = parse(TEXT_RUN, "--seed=7", "--overwrite", "--hub_token=hf_secret", "--last_k=2")
    assert run.named == {
        "model": {**TEXT["model"], "last_k": 2},
        "data": TEXT["data"],
        "training": {**TEXT["training"], "seed": 7, "output_dir": "runs/text", "report_to": ["none"]},
    }
    assert run.training.hub_token is None
    (room / "record.yaml").write_text(yaml.safe_dump(run.named))
    again = parse("record.yaml")
    assert again.named == run.named and again.config.to_dict() == run.config.to_dict()


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("configuration/demo/text.yaml", "runs/demo/text"),
        ("/somewhere/configuration/lm1b/dca.v2.yaml", "runs/lm1b/dca.v2"),
        ("configuration/old/configuration/x.yml", "runs/x"),
        ("mine.yaml", "runs/mine"),
        ("../elsewhere/mine.yaml", "runs/mine"),
    ],
)
def test_folder_of_a_run_follows_from_its_file(file, folder):
    assert arguments.default_output_dir(Path(file)) == Path(folder)


@pytest.mark.parametrize("file", sorted((ROOT / "configuration" / "demo").glob("*.yaml")), ids=lambda file: file.stem)
def test_configurations_of_the_demo_are_valid(file):
    classes = (DCAForCausalLM, TextDataArguments, CausalLMArguments)
    if file.stem == "image":
        classes = (DCAForImageClassification, ImageDataArguments, ImageClassificationArguments)
    run = arguments.parse_run([str(file)], "command", "A test.", *classes)
    assert run.config.residual_scheme == "dca" and run.training.output_dir == f"runs/demo/{file.stem}"


def test_error_of_a_configuration_names_its_field():
    with pytest.raises(StrictDataclassError) as error:
        DCAConfig(initializer_range=2.0)
    assert innermost_message(error.value).startswith("`initializer_range`: ")
    with pytest.raises(StrictDataclassError) as error:
        DCAConfig(hidden_size="big")
    assert innermost_message(error.value).count("hidden_size") == 1


@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--optim=lomo"], ["`optim` is 'lomo'", "install `lomo_optim`"]),
        (
            ["--optim=adagrad", "--optim_args=lr_decay=low"],
            ["`optim` is 'adagrad'", "'lr_decay=low' as `optim_args`", "'low'"],
        ),
        (
            ["--lr_scheduler_type=cosine", '--lr_scheduler_kwargs={"cycles": 2}'],
            ["`lr_scheduler_type` is 'cosine'", "{'cycles': 2} as `lr_scheduler_kwargs`", "'cycles'"],
        ),
        (["--lr_scheduler_type=cosine_with_min_lr"], ["'cosine_with_min_lr'", "min_lr or min_lr_rate should be set"]),
        (
            ["--lr_scheduler_type=inverse_sqrt", '--lr_scheduler_kwargs={"timescale": 0}'],
            ["{'timescale': 0} as `lr_scheduler_kwargs`", "division by zero"],
        ),
        (['--lr_scheduler_kwargs={"timescale": "x"}'], ["{'timescale': 'x'} as `lr_scheduler_kwargs`"]),
        (["--optim=sgd", "--optim_args=momentum=-1"], ["'momentum=-1' as `optim_args`", "Invalid momentum"]),
        (["--optim_args=momentum=0.9"], ["'momentum=0.9' as `optim_args`", "takes no `optim_args`"]),
        (["--lr_scheduler_type=warmup_stable_decay"], ["'warmup_stable_decay'", "'num_decay_steps'"]),
        (
            ["--lr_scheduler_type=polynomial", '--lr_scheduler_kwargs={"lr_end": 0.5}', "--learning_rate=0.1"],
            ["'polynomial'", "lr_end (0.5) must be smaller than initial lr (0.1)"],
        ),
    ],
)
def test_optimizer_or_schedule_that_cannot_be_had_is_refused(room, capsys, name, given, words):
    main, file, _ = COMMANDS[name]
    assert_names(refusal(capsys, main, file, "--output_dir=run", *given), *words)
    assert not (room / "run").exists()


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "sgd", "adafactor", "rmsprop"])
@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("constant", None),
        ("cosine_with_min_lr", {"min_lr": 1e-5}),
        ("warmup_stable_decay", {"num_decay_steps": 10}),
        ("reduce_lr_on_plateau", {"patience": 2}),
    ],
)
def test_optimizer_and_schedule_that_can_be_had(optimizer, schedule, options):
    rest = {"warmup_steps": 0.1, "num_train_epochs": 2, "eval_strategy": "epoch", "output_dir": "run"}
    check_optimizer(
        CausalLMArguments(optim=optimizer, lr_scheduler_type=schedule, lr_scheduler_kwargs=options, **rest)
    )


def test_integration_that_is_not_installed_is_refused(room, capsys):
    assert_names(refusal(capsys, causal_lm.main, TEXT_RUN, "--report_to=wandb"), "wandb")
    assert_names(refusal(capsys, causal_lm.main, TEXT_RUN, "--report_to=paper"), "paper", "tensorboard")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["none"], []),
        (["tensorboard"], ["tensorboard"]),
        (["tensorboard", "wandb"], ["tensorboard", "wandb"]),
        (["tensorboard", "tensorboard"], ["tensorboard"]),
    ],
)
def test_run_can_report_to_several(room, given, expected):
    assert parse(TEXT_RUN, "--report_to", *given).training.report_to == expected
    (room / TEXT_RUN).write_text(yaml.safe_dump({**TEXT, "training": {"report_to": given}}))
    run = parse(TEXT_RUN)
    assert run.training.report_to == expected and run.named["training"]["report_to"] == (expected or ["none"])


@pytest.mark.parametrize(("given", "expected"), [("true", "all"), ("no", "no"), ("non_padding", "non_padding")])
def test_tokens_that_are_counted(room, given, expected):
    assert (
        parse(TEXT_RUN, f"--include_num_input_tokens_seen={given}").training.include_num_input_tokens_seen == expected
    )


@pytest.mark.parametrize(
    ("metric", "greater_is_better"),
    [("loss", False), ("eval_perplexity", False), ("bits_per_byte", False)],
)
def test_lower_perplexity_is_better(room, metric, greater_is_better):
    run = parse(TEXT_RUN, f"--metric_for_best_model={metric}")
    assert run.training.greater_is_better == greater_is_better
    assert parse(TEXT_RUN, f"--metric_for_best_model={metric}", "--greater_is_better=true").training.greater_is_better


def test_higher_accuracy_is_better_for_a_schedule_too(room):
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "output_dir": "run"}
    make = ImageClassificationArguments
    accuracy, loss = (make(**options, metric_for_best_model=metric) for metric in ("accuracy", "loss"))
    assert accuracy.greater_is_better and accuracy.lr_scheduler_kwargs == {"mode": "max"}
    assert not loss.greater_is_better and loss.lr_scheduler_kwargs is None


@pytest.mark.parametrize("name", list(COMMANDS))
def test_several_devices_need_a_launcher(room, capsys, monkeypatch, name):
    main, file, _ = COMMANDS[name]
    monkeypatch.setattr(fields.RunArguments, "n_gpu", 4)
    line = refusal(capsys, main, file, "--output_dir=a run")
    launch = "accelerate launch --config_file configuration/accelerate/ddp.yaml --num_processes 4"
    assert_names(line, "4 GPUs", f"{launch} -m training.command {file} '--output_dir=a run'", "CUDA_VISIBLE_DEVICES=0")


def test_batch_size_is_not_looked_for_by_several_processes(room, capsys, monkeypatch):
    monkeypatch.setattr(fields.RunArguments, "world_size", 2)
    line = refusal(capsys, causal_lm.main, TEXT_RUN, "--auto_find_batch_size", "--global_batch_size=8")
    assert_names(line, "`auto_find_batch_size`", "one process", "`per_device_train_batch_size`")


def test_images_are_needed_for_the_image_command(room, capsys):
    assert_names(refusal(capsys, image_classification.main, IMAGE_RUN), "'images'")
