"""
Publishes a finished run, or a converted model, on the Hugging Face Hub: `python -m training.publish RUN user/name`.

The model is pushed with its modelling code, so that transformers can load it, and in one commit, so that an interrupted push
leaves the repository unchanged and can be repeated. The run itself is only read. What is pushed reveals nothing about the
machine: no local path, no host name.
"""

import json
import re
import struct
import sys
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import disable_progress_bars, filter_repo_objects, logging, validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files

from training.results.record import DIVERGED, RECORD, RUNS_FOLDER, read_record
from training.support.errors import NO_TOKEN, UserError, hub_error
from training.support.files import read_json, read_whole


STATE, RESULTS = "trainer_state.json", "all_results.json"

#: The files that a run or a conversion writes, and those that a card may show. Other files, such as the output of a job, are
#: not published.
PUBLISHED = [
    *("*.json", "*.safetensors", "*.py", "*.txt", "*.model", "*.jinja", "*.yaml", "*tfevents*"),
    *("*.md", "*.png", "*.jpg", "*.jpeg", "*.svg", "*.html", "LICENSE*", "NOTICE*"),
]
#: What `Trainer.push_to_hub` leaves out, hidden files, and files that are only needed to resume the training. The training
#: arguments are a pickle that may hold an access token.
NOT_PUBLISHED = [
    *("checkpoint-*", "_*", ".*", "*/.*", "*__pycache__*"),
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin"),
]
#: Files that a model is loaded from, or that describe its training. Those of an earlier push (an adapter, a chat template,
#: other shards) would be mistaken for parts of the new model.
OF_A_MODEL = [
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*config.json", "*.py"),
    *("*tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model"),
    *("chat_template*", "*_results.json", STATE, RECORD, "depth_weights.*", "loss_curve.*"),
]
LOGS = "*tfevents*"
#: A file that only the models of this project have.
OWN_CODE = "configuration_dca.py"

#: Suffixes of local data, which no name on the Hub has.
DATA_SUFFIXES = {".json", ".jsonl", ".parquet", ".csv", ".txt", ".gz", ".zst"}
HUB_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
#: Fields of configurations that may hold the path of something that was loaded.
PATH_FIELD = re.compile(r"(\w*_)?name_or_path|\w+_file")
#: Fields that are not needed to repeat a run: where it was, and where it is published.
NOT_REPEATED = re.compile("output_dir|push_to_hub|hub_.+")


def published_files(run: Path) -> list[str]:
    """
    The files of a finished run that are published, as paths within it.

    Raises:
        `UserError`: `run` is not the folder of a finished run, or the run has diverged.
    """
    if not run.is_dir():
        raise UserError(f"{run} is not a folder.")
    if (run / DIVERGED).exists():
        raise UserError(f"{run} holds a run whose loss or weights became NaN or infinite ({DIVERGED}).")
    paths = [path.relative_to(run).as_posix() for path in sorted(run.rglob("*")) if path.is_file()]
    for needed in ("config.json", "*.safetensors", "README.md"):
        if not any(run.glob(needed)):
            raise UserError(f"{run} has no {needed}: only the folder of a finished run can be published.")
    # A folder with its own configuration holds another model, such as the baseline.
    other_models = [f"{Path(path).parent}/*" for path in paths if path.endswith("/config.json")]
    # A page that the card does not link to shows older weights, from before the run was resumed.
    card = read_whole(run / "README.md", str, kind=str)
    paths = [path for path in paths if not path.endswith(".html") or f"({path})" in card]
    return list(filter_repo_objects(paths, allow_patterns=PUBLISHED, ignore_patterns=NOT_PUBLISHED + other_models))


def read_config(run: Path) -> dict:
    """
    The run's `config.json`.

    Raises:
        `UserError`: it cannot be read, or the run lacks the modelling code that it names.
    """
    config = read_json(run / "config.json")
    remedy = "save the model with its own `save_pretrained`, which saves the modelling code with the weights."
    if not config.get("auto_map"):
        raise UserError(f"{run / 'config.json'} names no modelling code (`auto_map`): {remedy}")
    for reference in config["auto_map"].values():
        module = reference.split("--")[-1].split(".")[0]
        try:
            get_relative_import_files(run / f"{module}.py")
        except FileNotFoundError as error:
            raise UserError(
                f"{run} lacks {Path(error.filename).name}, a part of the modelling code: {remedy}"
            ) from error
    return config


def check_run(run: Path) -> None:
    """
    Raises:
        `UserError`: the model is a variant for a study, its card has the results of another model, or one of the files is
            damaged.
    """
    record = run / RECORD  # (only models that were trained by a command have one)
    training = read_record(record)["training"] if record.exists() else {}
    variant = training.get("variant") or training.get("alteration")
    if variant is not None:
        raise UserError(f"{run} holds a variant for a study ({variant!r}), which is not for use: choose another run.")
    card = read_whole(run / "README.md", str, kind=str)
    metadata = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    try:
        (model,) = yaml.safe_load(metadata[1])["model-index"]
        told = {metric["type"]: metric["value"] for result in model["results"] for metric in result["metrics"]}
    except (ValueError, TypeError, KeyError, yaml.YAMLError):
        return  # a card by the user: the Hub checks its metadata
    if not (run / RESULTS).exists():
        return
    found = read_json(run / RESULTS)
    for name, value in told.items():
        if round(found.get(f"eval_{name}", value), 6) != value:
            raise UserError(
                f"{run / 'README.md'} has a {name} of {value}, but {RESULTS} has {found[f'eval_{name}']}: use the card of this "
                "model."
            )


def loading_line(config: dict, repo_id: str, revision: str | None = None) -> str:
    """The line of Python that loads the published model with its trained head."""
    architectures = config.get("architectures") or []
    auto_classes = {reference.split(".")[-1]: auto_class for auto_class, reference in config["auto_map"].items()}
    auto_class = next((auto_classes[name] for name in architectures if name in auto_classes), "AutoModel")
    load = f"model = {auto_class}.from_pretrained({_source(repo_id, revision)}, trust_remote_code=True)"
    return f"from transformers import {auto_class}; {load}"


def _source(repo_id: str, revision: str | None) -> str:
    """The arguments of `from_pretrained` for a model on the Hub."""
    return f'"{repo_id}"' + (f', revision="{revision}"' if revision else "")


# The published content of each file


def is_local_path(value: str, run: Path | None = None) -> bool:
    """
    Whether the value of a field is a local path, and not a name on the Hub.

    Args:
        run: the folder of the run; the path may be relative to any of its parents.
    """
    if len(Path(value).parts) < 2 or re.match(r"(https?|hf)://", value):
        return False
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value) or Path(value).suffix in DATA_SUFFIXES:
        return True
    places = [Path(), *(run.resolve().parents if run else ())]
    return any((place / value).exists() for place in places)


def model_name(folder: Path) -> str:
    """The name of the model in a folder, for a card, without the path of the folder."""
    parts = folder.parts
    return "-".join(parts[1:]) if parts[:1] == (RUNS_FOLDER,) and len(parts) > 1 else folder.resolve().name


def public_name(value, run: Path | None = None):
    """The value of a field, with each local path in it reduced to its last part."""
    if isinstance(value, dict):
        return {name: public_name(each, run) for name, each in value.items()}
    if isinstance(value, list):
        return [public_name(each, run) for each in value]
    return Path(value).name if isinstance(value, str) and is_local_path(value, run) else value


def published_card(run: Path, repo_id: str, revision: str | None) -> bytes:
    """The model card, with code that loads the model from the Hub instead of the run's folder."""
    card = read_whole(run / "README.md", str, kind=str)
    record = read_record(run / RECORD) if (run / RECORD).exists() else {}
    folder = Path(record.get("training", {}).get("output_dir", run))
    # The title is the name of the folder, or in cards of earlier versions its path.
    for name in (model_name(folder), model_name(run), folder.as_posix().strip("/").replace("/", "-")):
        for start in ("# ", "- name: "):
            card = card.replace(f"\n{start}{name}\n", f"\n{start}{repo_id.split('/')[-1]}\n", 1)
    for folder in set(re.findall(r'from_pretrained\("([^"\n]*)", trust_remote_code=True\)', card)):
        card = card.replace(f'from_pretrained("{folder}"', f"from_pretrained({_source(repo_id, revision)}")
    # Cards of earlier versions contain the paths of the data.
    values = [value for fields in record.values() for value in fields.values()]
    paths = {value for value in values if isinstance(value, str) and is_local_path(value, run)}
    for path in sorted(paths, key=len, reverse=True):
        card = card.replace(path, Path(path).name)
    return card.encode()


def published_record(run: Path) -> bytes:
    """The requested fields of the run, as they can be used elsewhere."""
    record = {
        section: {name: value for name, value in fields.items() if not NOT_REPEATED.fullmatch(name)}
        for section, fields in read_record(run / RECORD).items()
    }
    return yaml.safe_dump(public_name(record, run), sort_keys=False).encode()


def published_fields(file: Path, run: Path) -> bytes:
    """A configuration, or the state of the training, with local paths reduced to their last part."""

    def cleaned(fields):
        if not isinstance(fields, dict):
            return fields
        return {
            name: Path(value).name
            if isinstance(value, str)
            and (name.endswith("checkpoint") or (PATH_FIELD.fullmatch(name) and is_local_path(value, run)))
            else cleaned(value)
            for name, value in fields.items()
        }

    fields = read_json(file)
    return file.read_bytes() if cleaned(fields) == fields else json.dumps(cleaned(fields), indent=2).encode()


def published_log(file: Path) -> bytes:
    """A TensorBoard log without its texts, which hold all training arguments; another file is unchanged."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    content, kept, start = file.read_bytes(), [], 0
    # A record is its length, a checksum of the length, the content, and a checksum of it. The last one may be incomplete.
    while start + 12 < len(content):
        end = start + 12 + struct.unpack_from("<Q", content, start)[0] + 4
        try:
            event = Event.FromString(content[start + 12 : end - 4])
        except DecodeError:
            break
        values = event.summary.value
        numbers = [
            each.HasField("simple_value") or (each.HasField("tensor") and not each.tensor.string_val)
            for each in values
        ]
        if end <= len(content) and (event.file_version or (numbers and all(numbers))):
            kept.append(content[start:end])
        start = end
    return b"".join(kept) if start else content


def published_path(file: str) -> str:
    """The path of a file on the Hub, without the host name that TensorBoard puts into its folders and files."""
    if fnmatch(file, LOGS):
        file = re.sub(r"(?<=/)([A-Z][a-z]{2}\d\d_\d\d-\d\d-\d\d)_[^/]+(?=/)", r"\1", file)
        file = re.sub(r"(tfevents\.\d+)\..+(\.\d+\.\d+)$", r"\1\2", file)
    return file


def additions(run: Path, files: list[str], repo_id: str, revision: str | None) -> list[CommitOperationAdd]:
    """
    The files to add to the repository of a model.

    Raises:
        `UserError`: a file holds a local path that this module cannot remove.
    """
    rewritten = {
        "README.md": lambda: published_card(run, repo_id, revision),
        RECORD: lambda: published_record(run),
        **{file: lambda file=file: published_log(run / file) for file in files if fnmatch(file, LOGS)},
        **{
            file: lambda file=file: published_fields(run / file, run)
            for file in files
            if fnmatch(file, "*config.json") or file == STATE
        },
    }
    folders = [folder for folder in (run.resolve(), Path.home().resolve()) if len(folder.parts) > 2]
    operations = []
    for file in files:
        content = rewritten[file]() if file in rewritten else run / file
        if not file.endswith((".safetensors", ".png", ".jpg", ".jpeg")):
            text = content if isinstance(content, bytes) else content.read_bytes()
            for folder in folders:
                if f"{folder}/".encode() in text:
                    raise UserError(f"{run / file} holds a path below {folder}: remove it there.")
        operations.append(CommitOperationAdd(published_path(file), content))
    return operations


def check_token(token: str | None, run: Path, files: list[str]) -> None:
    """
    Raises:
        `UserError`: there is no access token, it cannot be sent, or a file that would be published holds one.
    """
    check_access(token)
    for file in files:
        # Weights are large, and safetensors writes nothing else into their files.
        if not file.endswith(".safetensors"):
            content = (run / file).read_bytes()
            if token.encode() in content or HUB_TOKEN.search(content):
                raise UserError(f"{run / file} holds an access token for the Hub: remove it there.")


def check_access(token: str | None) -> None:
    """
    Raises:
        `UserError`: there is no access token, or it cannot be sent.
    """
    if not token:
        raise UserError(NO_TOKEN)
    if not (token.isascii() and token.isprintable()):
        raise UserError("The access token for the Hub has invalid characters: copy it again.")


# The repository


def check_name(repo_id: str) -> None:
    """
    Raises:
        `UserError`: no model on the Hub can have this name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(str(error)) from error


def open_repository(api: HfApi, repo_id: str, revision: str | None, private: bool | None) -> ModelInfo:
    """
    Checks that a model can be pushed to a branch on the Hub, and creates repository and branch if missing.

    Args:
        repo_id: `user/name`, or only the name for a repository of the user's own.
        revision: the branch; by default `main`.
        private: whether the repository must be private or public; by default the owner's default for new ones.

    Returns: the content of the branch, with the full name of the repository.

    Raises:
        `UserError`: the name is invalid, the repository has another visibility, or the revision is not a branch, or holds a
            model that this project did not publish.
        Exceptions of huggingface_hub, see `hub_error`.
    """
    check_name(repo_id)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    repo_id = url.repo_id
    api.auth_check(repo_id, write=True)
    main = branch = api.model_info(repo_id)
    if private is not None and main.private != private:
        is_now, wanted = ("public", "private") if private else ("private", "public")
        raise UserError(f"{url} exists and is {is_now}: make it {wanted} in its settings, or choose another name.")
    if revision not in (None, "main"):
        tags = [tag.name for tag in api.list_repo_refs(repo_id).tags]
        if revision in tags or re.fullmatch(r"[0-9a-f]{40}|refs/.*", revision):
            raise UserError(
                f"The revision {revision!r} of {url} is not a branch: choose a branch, as only these accept pushes."
            )
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        branch = api.model_info(repo_id, revision=revision)
    files = [sibling.rfilename for sibling in branch.siblings]
    theirs = [file for file in outdated(files) if OWN_CODE not in files]
    # (A new branch starts as a copy of `main`, which keeps its files.)
    if theirs and (branch is main or branch.sha != main.sha):
        raise UserError(
            f"{url}{f' at {revision!r}' if revision else ''} holds a model that this command did not publish (with "
            f"{theirs[0]}), and is not replaced: choose another name or another revision."
        )
    branch.id = repo_id
    return branch


def outdated(files: list[str]) -> list[str]:
    """The files of a repository that belong to a previous model."""
    at_root = filter_repo_objects(files, allow_patterns=OF_A_MODEL, ignore_patterns=["*/*"])
    return [*at_root, *filter_repo_objects(files, allow_patterns=[LOGS])]


def push(
    run: Path, files: list[str], repo_id: str, private: bool | None, token: str, revision: str | None = None
) -> str:
    """
    Pushes `files` of `run` to the model `repo_id` on the Hub, in one commit to the branch `revision`, and returns the URL.

    Raises:
        `UserError`: see `additions` and `open_repository`.
        Exceptions of huggingface_hub, see `hub_error`.
    """
    api = HfApi(token=token)
    operations = additions(run, files, repo_id, revision)
    branch = open_repository(api, repo_id, revision, private)
    new_files = [operation.path_in_repo for operation in operations]
    old_files = outdated([sibling.rfilename for sibling in branch.siblings])
    # (`upload_folder` may split a push into several commits.)
    api.create_commit(
        branch.id,
        operations + [CommitOperationDelete(file) for file in old_files if file not in new_files],
        commit_message=f"Publish {run.resolve().name}",
        revision=revision,
    )
    return f"{api.endpoint}/{branch.id}" + (f"/tree/{revision}" if revision else "")


def publish(run: Path, repo_id: str, private: bool | None, revision: str | None = None) -> None:
    """
    Publishes a finished run as the model `repo_id` (`user/name`) on the Hub, and prints its URL and how to load it.

    Raises:
        `UserError`: the run is not complete, the name is invalid, or the Hub cannot be reached or refused the push.
    """
    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id!r} is not the name of a model: write it as user/name.")
    check_name(repo_id)
    files = published_files(run)
    config = read_config(run)
    check_run(run)
    with hub_errors():
        token = get_token()
        check_token(token, run, files)
        url = push(run, files, repo_id, private, token, revision)
    print(url)
    print(loading_line(config, repo_id, revision))


def check_target(repo_id: str, private: bool | None, revision: str | None) -> str:
    """
    Check in advance that a run can be published, as far as possible, and create its repository.

    Returns: the full name of the repository.

    Raises:
        `UserError`: it cannot be published.
    """
    with hub_errors():
        token = get_token()
        check_access(token)
        return open_repository(HfApi(token=token), repo_id, revision, private).id


@contextmanager
def hub_errors():
    """Turns errors of the communication with the Hub into a `UserError`."""
    # The client logs each failed attempt with signed URLs; the last failure becomes the error.
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise hub_error(error) from error
