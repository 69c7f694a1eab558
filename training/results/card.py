"""The model card of a run, from the files in its folder, and that of a converted model."""

import platform
import re
from importlib.metadata import version
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HTTPError
from safetensors import safe_open

from training.results.figures import draw_depth_weights, draw_loss_curves
from training.results.hub import model_name, public_name
from training.support.files import read_json, write_whole


TEMPLATES = Path(__file__).parents[2] / "model_cards"
RUN_TEMPLATE, CONVERSION_TEMPLATE = TEMPLATES / "card.md.jinja", TEMPLATES / "conversion.md.jinja"
LOSS_CURVE, DEPTH_WEIGHTS = "loss_curve.png", "depth_weights.png"
DEPTH_WEIGHTS_DATA = "depth_weights.json"
#: The link of a card to a page about its weights: the text before and after the name of the file.
PAGE_LINK = (
    "[A page to explore]",
    " shows what each block draws, token by token: download it and open it in a browser.",
)

#: The tags of all models of this project. (On the Hub, `custom_code` marks models that carry their code.)
TAGS = ("deep-cross-attention", "dca", "residual-connections", "custom_code")
# The training arguments that a card shows.
HYPER_PARAMETERS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "seed",
    "bf16",
    "fp16",
)
# Those that it shows if they are set.
TUNING = ("freeze_backbone", "lora_rank")
#: The metrics of a task: the key in `all_results.json`, the name in a card, and whether lower is better.
METRICS = {
    "text-generation": [
        ("eval_loss", "held-out loss (nats per token)", True),
        ("eval_perplexity", "held-out perplexity", True),
        ("eval_bits_per_byte", "held-out bits per byte", True),
    ],
    "image-classification": [
        ("eval_accuracy", "held-out accuracy", False),
        ("eval_loss", "held-out loss (nats)", True),
    ],
}


def origin(source: str, revision: str | None = None) -> dict:
    """
    The metadata that the card of a model takes from its source: license, base model and language, from the source's own card.

    Args:
        source: path or Hub id.
    """
    on_the_hub = not Path(source).exists()
    try:
        card = Path(hf_hub_download(source, "README.md", revision=revision) if on_the_hub else f"{source}/README.md")
        theirs = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, HTTPError, yaml.YAMLError):  # it has no card, or none that can be read
        theirs = {}
    told = {name: theirs.get(name) for name in ("license", "license_name", "license_link", "base_model", "language")}
    link = told["license_link"]
    if link is not None and "://" not in link:  # a file beside the source's card
        told["license_link"] = f"https://huggingface.co/{source}/blob/main/{link}" if on_the_hub else None
    if on_the_hub:
        told["base_model"] = source
    return {name: value for name, value in told.items() if value is not None}


def tags_of(residual_scheme: str) -> list[str]:
    """The tags of a model on the Hub, in addition to library, task, license and base model."""
    return list(dict.fromkeys([*TAGS, residual_scheme]))


def write_card(folder: Path, run, note: dict) -> None:
    """
    Write `README.md` and its pictures into the folder of a run.

    Args:
        folder: the folder of the run, with `config.json`, the weights, `all_results.json`, `trainer_state.json` and
            `depth_weights.json`.
        run: the `Run` (of `training.run.fields`).
        note: what is not in the folder: `task` (a pipeline tag), `data` (a sentence), `dataset` (a Hub id, or `None`),
            `dataset_name`, `baseline` (the folder of the baseline, or `None`) and, for text generation, `prompt`.
    """
    models = {scheme_name(folder): folder}
    if note["baseline"] is not None:
        models[scheme_name(note["baseline"])] = note["baseline"]
    results = {name: read_json(path / "all_results.json") for name, path in models.items()}
    draw_loss_curves(
        {name: read_json(path / "trainer_state.json", "log_history")["log_history"] for name, path in models.items()},
        folder / LOSS_CURVE,
    )
    state = read_json(folder / "trainer_state.json")
    weights = read_json(folder / DEPTH_WEIGHTS_DATA, kind=list)
    if weights:
        draw_depth_weights(weights, folder / DEPTH_WEIGHTS)

    metrics = METRICS[note["task"]]
    own = next(iter(models))
    arguments = run.training.to_dict()
    name = model_name(folder)
    metadata = {"license": arguments["model_license"]}
    if run.initial_checkpoint is not None:
        metadata = origin(run.initial_checkpoint)
        if "model_license" in run.named["training"]:
            others = {name: value for name, value in metadata.items() if not name.startswith("license")}
            metadata = {**others, "license": arguments["model_license"]}
    names = (_length(arguments), *HYPER_PARAMETERS, *filter(arguments.get, TUNING))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=note["task"],
        **metadata,
        datasets=[note["dataset"]] if note["dataset"] else None,
        tags=tags_of(run.config.residual_scheme),
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=note["task"],
                dataset_type=note["dataset"] or public_name(run.data.dataset),
                dataset_name=note["dataset_name"],
                metric_type=key.removeprefix("eval_"),
                metric_name=label,
                metric_value=round(results[own][key], 6),
            )
            for key, label, _ in metrics
        ],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(RUN_TEMPLATE),
        folder=folder.as_posix(),
        task=note["task"],
        model_name=name,
        scheme=own,
        data_sentence=note["data"],
        metrics=metrics,
        results=results,
        parameters={name: count_parameters(path) for name, path in models.items()},
        verdict=verdict(metrics[0], results) if len(results) > 1 else None,
        steps=state["global_step"],
        best_step=state.get("best_global_step") if arguments["load_best_model_at_end"] else None,
        hyper_parameters={name: arguments[name] for name in names},
        config=run.config,
        alteration=arguments["variant"],
        loss_curve=LOSS_CURVE,
        depth_weights=DEPTH_WEIGHTS if weights else None,
        prompt=repr(note.get("prompt")),  # Python's notation: it would read JSON's escapes of an emoji as another text
        versions={
            "Python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "datasets")},
        },
        configuration=yaml.safe_dump(public_name(run.named["model"]), sort_keys=False).strip(),
        base_model=metadata.get("base_model"),
        is_new=run.initial_checkpoint is None,
        optimizer=str(run.training.optim.value),
        processes=run.training.world_size,
    )
    card.save(folder / "README.md")


def origin_of_gguf(file: Path) -> dict:
    """The metadata of the model in a GGUF file, by their names in a card."""
    from gguf import GGUFReader  # (needed only for such files)

    fields = GGUFReader(file).fields
    names = ("general.license", "general.source.repo_url", "general.base_model.0.repo_url")
    known = {name: bytes(fields[name].parts[fields[name].data[0]]).decode() for name in names if name in fields}
    urls = (known[name] for name in names[1:] if name in known)
    hub = "https://huggingface.co/"
    base_model = next((url.removeprefix(hub).strip("/") for url in urls if url.startswith(hub)), None)
    told = {"license": known.get(names[0]), "base_model": base_model}
    return {name: value for name, value in told.items() if value is not None}


def write_conversion_card(
    folder: Path, source: str, loading: dict, place: Path, note: dict, new_parameters: int
) -> None:
    """
    Write `README.md` into the folder of a model that was converted and not trained.

    Args:
        source: path or Hub id of the source.
        loading: its `revision` and `gguf_file`, if any.
        place: the final path of the folder.
        note: `task` (a pipeline tag), `auto_class` and `processor` (the names of the classes that load model and tokenizer
            or image processor, the latter `None` without one), `architecture` (that of the source's class), `dtype`, `exact`
            (whether only the order of sums differs), `difference` (of the logits, as part of the largest, or `None` if
            nothing was compared), `head` (the name of a head that is new, or `None`), and `config`.
    """
    metadata, revision, gguf_file = (
        origin(source, loading.get("revision")),
        loading.get("revision"),
        loading.get("gguf_file"),
    )
    if gguf_file and (file := Path(source, gguf_file)).exists():
        metadata = origin_of_gguf(file) | metadata
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=note["task"],
        tags=tags_of(note["config"].residual_scheme),
        **metadata,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(CONVERSION_TEMPLATE),
        model_name=model_name(place),
        folder=str(place),
        source=None if Path(source).exists() else source,
        revision=revision,
        metadata=metadata,
        scheme=scheme_name(folder),
        parameters=count_parameters(folder),
        new_parameters=new_parameters,
        versions={name: version(name) for name in ("torch", "transformers")},
        **note,
    )
    card.save(folder / "README.md")


def link_page(page: Path, run: Path) -> bool:
    """Add a link to a page in the same folder to the card of a run; return whether the card has the link."""
    card = run / "README.md"
    if page.resolve().parent != run.resolve() or not card.is_file():
        return False
    text, (before, after) = card.read_text(encoding="utf-8"), PAGE_LINK
    if f"({page.name})" in text:
        return True
    # A card has one page, below its map.
    text = re.sub(rf"\n{re.escape(before)}\([^)\n]*\){re.escape(after)}\n", "", text)
    linked = re.sub(
        rf"^!\[.*\]\({re.escape(DEPTH_WEIGHTS)}\)\n",
        lambda found: f"{found[0]}\n{before}({page.name}){after}\n",
        text,
        count=1,
        flags=re.MULTILINE,
    )
    if linked == text:
        return False
    write_whole(card, linked)
    return True


def _length(arguments: dict) -> str:
    """The name of the training argument that sets the length of a run."""
    return "max_steps" if arguments["max_steps"] > 0 else "num_train_epochs"


def scheme_name(folder: Path) -> str:
    """The name of a model's residual scheme, with its `k`, or the name of its variant."""
    config = read_json(folder / "config.json")
    if config.get("variant") is not None:
        return config["variant"]
    scheme, k = config.get("residual_scheme", "dca"), config.get("last_k")
    return scheme if k is None else f"{k}-{scheme}"


def count_parameters(folder: Path) -> int:
    """The number of parameters in the weights of a folder. Tied ones are saved, and counted, once."""
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dictionary)
                size = 1
                for length in weights.get_slice(name).get_shape():
                    size *= length
                count += size
    return count


def verdict(metric: tuple[str, str, bool], results: dict[str, dict]) -> str:
    """A sentence on which of two models is better on this run."""
    key, label, less_is_better = metric
    (own, own_results), (other, other_results) = results.items()
    difference = own_results[key] - other_results[key]
    if difference == 0:
        return f"On this run `{own}` and `{other}` have the same {label}."
    better, worse = (own, other) if (difference < 0) == less_is_better else (other, own)
    return (
        f"On this run `{better}` is better than `{worse}`: its {label} is {abs(difference):.3g} "
        f"{'lower' if less_is_better else 'higher'}. This is one run with one seed."
    )
