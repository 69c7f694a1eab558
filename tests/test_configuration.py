"""The recipes of the paper: every file is a run that starts, has the size and the recipe that it should, and is in the index."""

import functools
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from modeling_dca import DCAForCausalLM, DCAForImageClassification
from training.images.fields import ImageClassificationArguments, ImageDataArguments
from training.run.fields import Run
from training.run.parsing import parse_run
from training.run.training import model_and_callbacks
from training.text.fields import CausalLMArguments, TextDataArguments


ROOM = Path(__file__).parents[1] / "configuration"
LANGUAGE = ("training.causal_lm", "A test.", DCAForCausalLM, TextDataArguments, CausalLMArguments)
VISION = (
    "training.image_classification",
    "A test.",
    DCAForImageClassification,
    ImageDataArguments,
    ImageClassificationArguments,
)
COMMANDS = {"lm1b": LANGUAGE, "c4": LANGUAGE, "imagenet": VISION}

# The rows of the paper's tables that are runs of their own.
SCHEMES_OF_TABLE_1 = ("standard", "1-dca", "2-dca", "4-dca", "8-dca", "16-dca", "dca")
TABLES = {
    1: [f"lm1b/24-layers-{scheme}" for scheme in SCHEMES_OF_TABLE_1],
    2: [f"lm1b/12-layers-{w}-wide-{scheme}" for w in (64, 192, 384, 768, 1024) for scheme in ("standard", "dca")],
    3: [
        f"c4/{depth}-layers-{width}-wide-{scheme}"
        for depth, width in ((9, 771), (18, 771), (13, 1111), (18, 1111), (18, 1600))
        for scheme in ("standard", "8-dca")
    ],
    4: [f"lm1b/6-layers-{name}" for name in ("standard", "retrofit-standard", "retrofit-dca")],
    5: [
        f"lm1b/6-layers-{scheme}"
        for scheme in ("standard", "denseformer", "grn-v1", "dca", "laurel-pa", "dynamic-hyper-connections")
    ],
    6: [
        f"c4/13-layers-1111-wide-{scheme}"
        for scheme in (
            *("standard", "denseformer", "grn-v1", "8-dca", "laurel-pa"),
            *("dynamic-hyper-connections-4", "dynamic-hyper-connections-10"),
        )
    ],
    7: [f"lm1b/6-layers-{scheme}" for scheme in ("standard", "grn-v1", "grn-v2", "grn-v3", "dca")],
    8: [f"imagenet/vit-s16-{scheme}" for scheme in ("standard", "dca")],
}
RUNS = sorted(set(sum(TABLES.values(), [])))
RETROFITS = [name for name in RUNS if "retrofit" in name]
LANGUAGE_MODELS = [name for name in RUNS if not name.startswith("imagenet") and name not in RETROFITS]

#: The variants of the standard transformer, by the end of the names of files.
VARIANTS = {
    "denseformer": ("denseformer", {}),
    "laurel-pa": ("laurel_pa", {"rank": 8, "k": 3}),
    "dynamic-hyper-connections": ("dynamic_hyper_connections", {"n": 2}),
    "dynamic-hyper-connections-4": ("dynamic_hyper_connections", {"n": 4}),
    "dynamic-hyper-connections-10": ("dynamic_hyper_connections", {"n": 10}),
}

# The paper's parameter counts, in millions.
PAPER = {
    "lm1b/6-layers-standard": 49.65,
    "lm1b/6-layers-grn-v1": 49.65,
    "lm1b/6-layers-denseformer": 49.65,
    "lm1b/6-layers-dca": 49.73,
    "lm1b/6-layers-laurel-pa": 49.75,
    "lm1b/6-layers-dynamic-hyper-connections": 49.68,
    "c4/9-layers-771-wide-standard": 75,
    "c4/9-layers-771-wide-8-dca": 75,
    "c4/18-layers-771-wide-standard": 124,
    "c4/18-layers-771-wide-8-dca": 124,
    "c4/13-layers-1111-wide-standard": 179,
    "c4/13-layers-1111-wide-8-dca": 179,
    "c4/18-layers-1111-wide-standard": 234,
    "c4/18-layers-1111-wide-8-dca": 234,
    "c4/18-layers-1600-wide-standard": 449,
    "c4/18-layers-1600-wide-8-dca": 449,
    "imagenet/vit-s16-standard": 22,
    "imagenet/vit-s16-dca": 22,
}


@pytest.fixture(scope="module", autouse=True)
def trained_model(tmp_path_factory):
    """The current folder, with the model that the runs of table 4 go on from; of it only its configuration is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("checkout"))
        run = parsed("lm1b/6-layers-standard")
        run.config.save_pretrained(run.training.output_dir)
        yield


@functools.cache
def parsed(name: str) -> Run:
    """A run, as its command reads it."""
    return parse_run([str(ROOM / f"{name}.yaml")], *COMMANDS[name.partition("/")[0]])


@functools.cache
def num_parameters(name: str) -> int:
    run, (_, _, model_class, _, _) = parsed(name), COMMANDS[name.partition("/")[0]]
    if model_class is DCAForImageClassification:
        run.config.num_labels = run.data.num_labels
    model_class, _ = model_and_callbacks(run, model_class)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(run.config).parameters())


def named(name: str) -> tuple[int, int, str, int | None]:
    """Depth, width, scheme and k, as the name of a file says them."""
    if name.startswith("imagenet"):
        depth, width, scheme = 12, 384, name.removeprefix("imagenet/vit-s16-")
    else:
        match = re.fullmatch(r"\w+/(\d+)-layers(?:-(\d+)-wide)?(?:-retrofit)?-(.*)", name)
        depth, width, scheme = int(match[1]), int(match[2] or 512), match[3]
    if scheme in VARIANTS:
        return depth, width, "standard", None
    k, _, rest = scheme.rpartition("-")
    return (depth, width, rest, int(k)) if k.isdigit() else (depth, width, scheme.replace("-", "_"), None)


def variant_of(name: str) -> tuple[str | None, dict]:
    """The variant and its settings, as the name of a file says them."""
    ends = [end for end in VARIANTS if re.search(rf"(layers|wide)-{end}$", name)]
    return VARIANTS[ends[0]] if ends else (None, {})


def standard_parameters(name: str) -> int:
    """Of the transformer with the residual sum: matrices, embeddings, norms and biases, with the sizes of the recipe."""
    depth, width, _, _ = named(name)
    mlp = 2 * width * 4 * width
    if name.startswith("imagenet"):
        block = (4 * width**2 + 4 * width) + (mlp + 4 * width + width) + 2 * 2 * width
        patches, classifier = 3 * 16 * 16 * width + width, width * 1000 + 1000
        return patches + depth * block + 2 * width + classifier
    if name.startswith("c4"):
        attention, embeddings = 4 * width * 256, 32_000 * width
    else:
        attention, embeddings = 4 * width**2, 2 * 30_000 * width
    return embeddings + depth * (attention + mlp + 2 * width) + width


def residual_parameters(name: str) -> int:
    """What a scheme adds to that (paper, section 3.1): `b` and `w` of all blocks and of the output, and norms."""
    depth, width, scheme, k = named(name)
    variant, fields = variant_of(name)
    if variant == "denseformer":
        return sum(i + 1 for i in range(1, depth + 1))
    if variant == "laurel_pa":
        return 2 * depth * 2 * 8 * width + sum(min(3, i + 1) for i in range(2 * depth))
    if variant == "dynamic_hyper_connections":
        n = fields["n"]
        return 2 * depth * (2 * n + n * n + (n + 2) * width + 2)

    def instance(entries: int) -> int:
        entries = entries if k is None else min(entries, k + 2)
        return {
            "standard": 0,
            "grn_v1": entries,
            "grn_v2": entries * width,
            "grn_v3": entries * width + width,
            "dca": entries * width + width,
        }[scheme]

    per_block = 3 if scheme == "dca" else 1
    total = sum(per_block * instance(t) for t in range(1, depth + 1)) + instance(depth + 1)
    if scheme == "dca":
        norm = 2 * width if name.startswith("imagenet") else width  # a layer norm has a bias, too
        total += depth * 2 * norm
    return total


def test_every_row_has_its_file_and_every_file_its_row():
    files = {
        file.relative_to(ROOM).with_suffix("").as_posix()
        for folder in COMMANDS
        for file in (ROOM / folder).rglob("*")
        if not file.stem.startswith("base")
    }
    assert files == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_model_is_what_the_name_says(name):
    config = parsed(name).config
    assert (config.num_hidden_layers, config.hidden_size, config.residual_scheme, config.last_k) == named(name)
    assert config.intermediate_size == 4 * config.hidden_size and not config.gated_mlp and config.head_dim == 64
    assert parsed(name).training.output_dir == f"runs/{name}"
    variant, fields = variant_of(name)
    assert parsed(name).training.variant == variant and (parsed(name).training.variant_fields or {}) == fields


@pytest.mark.parametrize("name", RUNS)
def test_parameters_are_those_of_the_formulas(name):
    assert num_parameters(name) == standard_parameters(name) + residual_parameters(name)


@pytest.mark.parametrize("name", PAPER)
def test_parameters_are_the_papers_within_one_percent(name):
    assert num_parameters(name) / 1e6 == pytest.approx(PAPER[name], rel=0.01)


def test_biases_are_what_is_missing_to_the_papers_transformer():
    # Those of the output embedding, the feed-forward modules and the layer norms, none of which our recipe has.
    biases = 30_000 + 6 * (2048 + 512) + (2 * 6 + 1) * 512
    assert round((num_parameters("lm1b/6-layers-standard") + biases) / 1e6, 2) == 49.65
    assert round((num_parameters("lm1b/6-layers-grn-v1") + biases) / 1e6, 2) == 49.65


def test_other_methods_add_what_they_do_in_table_5():
    before = num_parameters("lm1b/6-layers-standard")
    added = {name: num_parameters(f"lm1b/6-layers-{name}") - before for name in VARIANTS if not name[-1].isdigit()}
    # 49.65M of the transformer are 49,653,040, with the biases above.
    for name, paper in (("denseformer", 49.65), ("laurel-pa", 49.75), ("dynamic-hyper-connections", 49.68)):
        assert round((49_653_040 + added[name]) / 1e6, 2) == paper


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_recipe_of_the_language_models(name):
    run = parsed(name)
    training, data, config = run.training, run.data, run.config
    at_once = training.train_batch_size * training.world_size
    assert at_once * training.gradient_accumulation_steps == training.global_batch_size == 2048
    assert training.max_steps == 500_000 and data.block_size == 128 and data.streaming
    assert training.optim.startswith("adamw_torch")
    assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.98, 0.1)
    assert (config.norm_type, config.hidden_act, config.position_embedding) == ("rms_norm", "gelu", "rope")
    if name.startswith("lm1b"):
        assert (data.dataset, data.train_split, data.eval_split) == ("billion-word-benchmark/lm1b", "train", "test")
        assert data.dataset_revision == "refs/convert/parquet" and data.max_eval_documents is None
        assert (config.vocab_size, config.tie_word_embeddings) == (30_000, False)
        assert config.num_attention_heads * config.head_dim == config.hidden_size
    else:
        assert (data.dataset, data.dataset_config) == ("allenai/c4", "en")
        assert (data.train_split, data.eval_split) == ("train", "validation")
        assert data.dataset_revision is None and data.max_eval_documents == 10_000
        assert (config.vocab_size, config.tie_word_embeddings, config.num_attention_heads) == (32_000, True, 4)


def learning_rate(name: str, step: int) -> float:
    """The rate of a run after `step` steps, from the scheduler that the trainer makes."""
    training = parsed(name).training
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    scheduler = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=training.get_warmup_steps(100_000),
        num_training_steps=100_000,
        scheduler_specific_kwargs=training.lr_scheduler_kwargs,
    )
    return training.learning_rate * scheduler.lr_lambdas[0](step)


@pytest.mark.parametrize("step", [1, 500, 1000, 4000, 500_000])
@pytest.mark.parametrize("name", ["lm1b/24-layers-2-dca", "c4/18-layers-1600-wide-8-dca"])
def test_schedule_of_the_language_models(name, step):
    assert learning_rate(name, step) == pytest.approx(0.0016 * min(step / 1000, math.sqrt(1000 / step)), rel=1e-6)


@pytest.mark.parametrize("name", RETROFITS)
def test_retrofit_goes_on_where_the_standard_run_ends(name):
    run, before = parsed(name), parsed("lm1b/6-layers-standard")
    assert run.initial_checkpoint == before.training.output_dir
    assert run.training.max_steps == 60_000 and 20_000 % run.training.eval_steps == 0
    assert run.training.global_batch_size == 2048 and run.training.seed != before.training.seed
    assert run.data == before.data
    for step in (1000, 20_000, 60_000):
        # The warm-up is for the new optimizer; after it the schedule is that of before, 1,000 steps later.
        expected = learning_rate("lm1b/6-layers-standard", 500_000 + step - 1000)
        assert learning_rate(name, step) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", TABLES[8])
def test_recipe_of_the_image_classifiers(name):
    run = parsed(name)
    training, data, config = run.training, run.data, run.config
    at_once = training.train_batch_size * training.world_size
    assert at_once * training.gradient_accumulation_steps == training.global_batch_size == 1024
    assert (training.num_train_epochs, training.max_steps) == (90, -1)
    assert (training.weight_decay, training.max_grad_norm, training.label_smoothing_factor) == (0.0001, 1, 0)
    assert (config.pooling, config.position_embedding, config.attention_dropout) == ("mean", "sincos", 0)
    assert (config.image_size, config.patch_size, config.num_attention_heads) == (224, 16, 6)
    assert (data.dataset, data.train_split, data.eval_split) == ("ILSVRC/imagenet-1k", "train", "validation")
    assert data.random_crop and data.horizontal_flip and data.mixup_alpha == 0.2 and data.eval_resize == 256
    assert (data.rand_augment_operations, data.rand_augment_magnitude) == (2, 10)
    for step in (1, 10_000, 55_000, 100_000):
        expected = 0.001 * min(step / 10_000, (1 + math.cos(math.pi * max(0, step - 10_000) / 90_000)) / 2)
        assert learning_rate(name, step) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("table", TABLES)
def test_rows_of_a_table_differ_in_nothing_but_what_they_compare(table):
    apart = {"residual_scheme", "last_k", "num_hidden_layers", "hidden_size", "num_attention_heads"}
    rest = []
    for name in set(TABLES[table]) - ({"lm1b/6-layers-standard"} if table == 4 else set()):
        recipe = parsed(name).named
        model = {field: value for field, value in recipe["model"].items() if field not in apart}
        training = {**recipe["training"], "output_dir": None, "variant": None, "variant_fields": None}
        rest.append((model, recipe["data"], training))
    assert len(rest) > 1 and all(each == rest[0] for each in rest)


def rows_of_the_index() -> dict[str, set[str]]:
    """The parameter counts that `configuration/README.md` has for each file."""
    rows = {}
    for line in (ROOM / "README.md").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\|[^|]*\| \[`(.*)\.yaml`\]\((.*)\.yaml\) \| ([\d,]+) \|", line):
            assert match[1] == match[2]
            rows.setdefault(match[1], set()).add(match[3])
    return rows


def test_index_has_every_run_with_its_parameters():
    assert rows_of_the_index() == {name: {f"{num_parameters(name):,}"} for name in RUNS}


def test_index_has_every_row_under_its_table():
    sections = re.split(r"^### Table (\d)", (ROOM / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {
        int(table): re.findall(r"\]\(((?:lm1b|c4|imagenet)/[^)]*)\.yaml\)", text)
        for table, text in zip(sections[1::2], sections[2::2])
    }
    assert {table: sorted(names) for table, names in found.items()} == {
        table: sorted(names) for table, names in TABLES.items()
    }
