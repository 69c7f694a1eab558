"""
Publishes a finished run, or a converted model, on the Hugging Face Hub: `python -m training.publish RUN user/name`.

The model goes up with its modelling code, so that whoever has transformers can load it, and in one commit, so that a
push that breaks off leaves the repository as it was and can be run again. The run itself is only read, and what goes up
tells nothing of the machine: no local path, no host name.
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

#: What a run or a conversion writes, and what a card may show. Other files, such as the output of a job, are not published.
PUBLISHED = [
    *("*.json", "*.safetensors", "*.py", "*.txt", "*.model", "*.jinja", "*.yaml", "*tfevents*"),
    *("*.md", "*.png", "*.jpg", "*.jpeg", "*.svg", "*.html", "LICENSE*", "NOTICE*"),
]
#: What `Trainer.push_to_hub` leaves out, hidden files, and what only serves to resume the training. The training
#: arguments are a pickle that may hold an access token.
NOT_PUBLISHED = [
    *("checkpoint-*", "_*", ".*", "*/.*", "*__pycache__*"),
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin"),
]
#: What a model is loaded from, and what tells of its training. Such files of an earlier push would be taken for a part of
#: the new model: an adapter, a chat template, or weights that were cut into other files.
OF_A_MODEL = [
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*config.json", "*.py"),
    *("*tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model"),
    *("chat_template*", "*_results.json", STATE, RECORD, "depth_weights.*", "loss_curve.*"),
]
LOGS = "*tfevents*"
#: What only the models of this project have.
OWN_CODE = "configuration_dca.py"

#: What local data may end in, and no name on the Hub does.
DATA_SUFFIXES = {".json", ".jsonl", ".parquet", ".csv", ".txt", ".gz", ".zst"}
HUB_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
#: Fields of configurations that may hold the path of what was loaded.
PATH_FIELD = re.compile(r"(\w*_)?name_or_path|\w+_file")
#: Where a run was, and where it is published, is no part of how it is repeated.
NOT_REPEATED = re.compile("output_dir|push_to_hub|hub_.+")


def published_files(run: Path) -> list[str]:
    """
    The files of a finished run that are published, as paths within it.

    Raises:
        `UserError`: `run` is not a folder, is not that of a finished run, or its model is not for use.
    """
    if not run.is_dir():
        raise UserError(f"{run} is not a folder.")
    if (run / DIVERGED).exists():
        raise UserError(f"{run} holds a run whose loss or weights became NaN or infinite ({DIVERGED}).")
    paths = [path.relative_to(run).as_posix() for path in sorted(run.rglob("*")) if path.is_file()]
    for needed in ("config.json", "*.safetensors", "README.md"):
        if not any(run.glob(needed)):
            raise UserError(f"{run} has no {needed}: only the folder of a finished run can be published.")
    # A folder with a configuration of its own holds another model: the baseline, say.
    other_models = [f"{Path(path).parent}/*" for path in paths if path.endswith("/config.json")]
    # A page that the card does not link to is of other weights: of those before the run went on.
    card = read_whole(run / "README.md", str, kind=str)
    paths = [path for path in paths if not path.endswith(".html") or f"({path})" in card]
    return list(filter_repo_objects(paths, allow_patterns=PUBLISHED, ignore_patterns=NOT_PUBLISHED + other_models))


def read_config(run: Path) -> dict:
    """
    The run's `config.json`.

    Raises:
        `UserError`: it cannot be read, or the modelling code that it names is not in the run.
    """
    config = read_json(run / "config.json")
    remedy = "save the model with its own `save_pretrained`, which puts the modelling code beside the weights."
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
        `UserError`: the model is one that was altered for a study, its card tells the figures of another, or what tells
            either is damaged.
    """
    record = run / RECORD  # (which no model has that was not trained by a command)
    training = read_record(record)["training"] if record.exists() else {}
    variant = training.get("variant") or training.get("alteration")
    if variant is not None:
        raise UserError(f"{run} holds a model that was altered for a study ({variant!r}), which is not for use.")
    card = read_whole(run / "README.md", str, kind=str)
    metadata = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    try:
        (model,) = yaml.safe_load(metadata[1])["model-index"]
        told = {metric["type"]: metric["value"] for result in model["results"] for metric in result["metrics"]}
    except (ValueError, TypeError, KeyError, yaml.YAMLError):
        return  # a card of the user's own: the Hub says whether its metadata can be read
    if not (run / RESULTS).exists():
        return
    found = read_json(run / RESULTS)
    for name, value in told.items():
        if round(found.get(f"eval_{name}", value), 6) != value:
            raise UserError(
                f"{run / 'README.md'} tells a {name} of {value}, but {RESULTS} {found[f'eval_{name}']}: the card is not that "
                "of this model."
            )


def loading_line(config: dict, repo_id: str, revision: str | None = None) -> str:
    """The line of Python that loads the published model with the head that it was trained with."""
    architectures = config.get("architectures") or []
    auto_classes = {reference.split(".")[-1]: auto_class for auto_class, reference in config["auto_map"].items()}
    auto_class = next((auto_classes[name] for name in architectures if name in auto_classes), "AutoModel")
    load = f"model = {auto_class}.from_pretrained({_source(repo_id, revision)}, trust_remote_code=True)"
    return f"from transformers import {auto_class}; {load}"


def _source(repo_id: str, revision: str | None) -> str:
    """The arguments of `from_pretrained` that say where on the Hub a model is."""
    return f'"{repo_id}"' + (f', revision="{revision}"' if revision else "")


# What goes up of each file


def is_local_path(value: str, run: Path | None = None) -> bool:
    """
    Whether what a field names is below a folder of this machine, and not on the Hub.

    Args:
        run: the folder of the run; it may have been started in any that holds it.
    """
    if len(Path(value).parts) < 2 or re.match(r"(https?|hf)://", value):
        return False
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value) or Path(value).suffix in DATA_SUFFIXES:
        return True
    places = [Path(), *(run.resolve().parents if run else ())]
    return any((place / value).exists() for place in places)


def model_name(folder: Path) -> str:
    """What a card calls the model in a folder, of which it does not tell where it is."""
    parts = folder.parts
    return "-".join(parts[1:]) if parts[:1] == (RUNS_FOLDER,) and len(parts) > 1 else folder.resolve().name


def public_name(value, run: Path | None = None):
    """The value of a field, or the values in it, but of a local path its last name alone."""
    if isinstance(value, dict):
        return {name: public_name(each, run) for name, each in value.items()}
    if isinstance(value, list):
        return [public_name(each, run) for each in value]
    return Path(value).name if isinstance(value, str) and is_local_path(value, run) else value


def published_card(run: Path, repo_id: str, revision: str | None) -> bytes:
    """The model card, whose code loads the model from the Hub where that of the run loads it from its folder."""
    card = read_whole(run / "README.md", str, kind=str)
    record = read_record(run / RECORD) if (run / RECORD).exists() else {}
    folder = Path(record.get("training", {}).get("output_dir", run))
    # The title is the folder's, and in cards of earlier versions its path.
    for name in (model_name(folder), model_name(run), folder.as_posix().strip("/").replace("/", "-")):
        for start in ("# ", "- name: "):
            card = card.replace(f"\n{start}{name}\n", f"\n{start}{repo_id.split('/')[-1]}\n", 1)
    for folder in set(re.findall(r'from_pretrained\("([^"\n]*)", trust_remote_code=True\)', card)):
        card = card.replace(f'from_pretrained("{folder}"', f"from_pretrained({_source(repo_id, revision)}")
    # Cards of earlier versions tell the paths of the data.
    values = [value for fields in record.values() for value in fields.values()]
    paths = {value for value in values if isinstance(value, str) and is_local_path(value, run)}
    for path in sorted(paths, key=len, reverse=True):
        card = card.replace(path, Path(path).name)
    return card.encode()


def published_record(run: Path) -> bytes:
    """What was asked for, to be asked for elsewhere."""
    record = {
        section: {name: value for name, value in fields.items() if not NOT_REPEATED.fullmatch(name)}
        for section, fields in read_record(run / RECORD).items()
    }
    return yaml.safe_dump(public_name(record, run), sort_keys=False).encode()


def published_fields(file: Path, run: Path) -> bytes:
    """A configuration, or the state of the training, in which what was loaded from a local path, or saved there, has none."""

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
    """The numbers in a log of TensorBoard, whose texts hold all training arguments; what is no such log stays as it is."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    content, kept, start = file.read_bytes(), [], 0
    # A record is its length, the checksum of that, so many bytes, and their checksum. The last one may be cut off.
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
    """Where a file is on the Hub. TensorBoard calls folders and files by the host, too."""
    if fnmatch(file, LOGS):
        file = re.sub(r"(?<=/)([A-Z][a-z]{2}\d\d_\d\d-\d\d-\d\d)_[^/]+(?=/)", r"\1", file)
        file = re.sub(r"(tfevents\.\d+)\..+(\.\d+\.\d+)$", r"\1\2", file)
    return file


def additions(run: Path, files: list[str], repo_id: str, revision: str | None) -> list[CommitOperationAdd]:
    """
    What is added to the repository of a model.

    Raises:
        `UserError`: a file holds a local path of which this module does not know.
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
        # Weights are large, and written by safetensors alone.
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
        raise UserError("The access token for the Hub holds characters that no token has: copy it again.")


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
    Sees that a model can be pushed to a branch on the Hub, and creates what is missing of repository and branch.

    Args:
        repo_id: `user/name`, or the name of one's own.
        revision: the branch; if none, `main`.
        private: whether the repository must be private, or public; if none, it is what new ones of its owner are.

    Returns: what the branch holds, with the repository's whole name.

    Raises:
        `UserError`: the name is none, the repository is not as private as it should be, or the branch is none, or holds
            another model than this project's.
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
            raise UserError(f"The revision {revision!r} of {url} is no branch, and only to a branch can be pushed.")
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        branch = api.model_info(repo_id, revision=revision)
    files = [sibling.rfilename for sibling in branch.siblings]
    theirs = [file for file in outdated(files) if OWN_CODE not in files]
    # (A new branch has what `main` has, where it stays.)
    if theirs and (branch is main or branch.sha != main.sha):
        raise UserError(
            f"{url}{f' at {revision!r}' if revision else ''} holds a model that was not published by this command "
            f"({theirs[0]}, say), which is not replaced: choose another name or another revision."
        )
    branch.id = repo_id
    return branch


def outdated(files: list[str]) -> list[str]:
    """Which files of a repository belong to the model that was there before."""
    at_root = filter_repo_objects(files, allow_patterns=OF_A_MODEL, ignore_patterns=["*/*"])
    return [*at_root, *filter_repo_objects(files, allow_patterns=[LOGS])]


def push(
    run: Path, files: list[str], repo_id: str, private: bool | None, token: str, revision: str | None = None
) -> str:
    """
    Makes `files` of `run` the model `repo_id` on the Hub, in one commit to the branch `revision`, and returns its URL.

    Raises:
        `UserError`: see `additions` and `open_repository`.
        Exceptions of huggingface_hub, see `hub_error`.
    """
    api = HfApi(token=token)
    operations = additions(run, files, repo_id, revision)
    branch = open_repository(api, repo_id, revision, private)
    new_files = [operation.path_in_repo for operation in operations]
    old_files = outdated([sibling.rfilename for sibling in branch.siblings])
    # Not `upload_folder`, which may split a push into several commits.
    api.create_commit(
        branch.id,
        operations + [CommitOperationDelete(file) for file in old_files if file not in new_files],
        commit_message=f"Publish {run.resolve().name}",
        revision=revision,
    )
    return f"{api.endpoint}/{branch.id}" + (f"/tree/{revision}" if revision else "")


def publish(run: Path, repo_id: str, private: bool | None, revision: str | None = None) -> None:
    """
    Makes a finished run the model `repo_id` (`user/name`) on the Hub, and prints its URL and how to load it.

    Raises:
        `UserError`: the run is not whole, the name is none, or the Hub could not be reached or refused the push.
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
    See that a run can be published when it is finished, as far as that can be told before; and create its repository.

    Returns: the whole name of the repository.

    Raises:
        `UserError`: it cannot.
    """
    with hub_errors():
        token = get_token()
        check_access(token)
        return open_repository(HfApi(token=token), repo_id, revision, private).id


@contextmanager
def hub_errors():
    """Makes what goes wrong in the talk with the Hub a sentence for the user."""
    # The client warns of each attempt that failed, with URLs that are signed; the last failure is told.
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise hub_error(error) from error
