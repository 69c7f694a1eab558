"""
Publishes a finished run as a model on the Hugging Face Hub: `python -m training.publish RUN user/name [--private]`.

The model goes up with its modelling code, so that whoever has transformers can load it, and in one commit, so that a
push that breaks off leaves the repository as it was and can be run again. The run itself is only read.
"""

import argparse
import json
import sys
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, filter_repo_objects, logging, validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files

from training.arguments import RECORD
from training.errors import NO_TOKEN, UserError, command, hub_error


#: What `Trainer.push_to_hub` leaves out, hidden files, and what only serves to resume the training. The training
#: arguments are a pickle that may hold an access token.
NOT_PUBLISHED = [
    *("checkpoint-*", "_*", ".*", "*/.*", "*__pycache__*"),
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin"),
]

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def published_files(run: Path) -> list[str]:
    """
    The files of a finished run that are published, as paths within it.

    Raises:
        `UserError`: `run` is not a folder, or lacks a file without which the model cannot be loaded or understood.
    """
    if not run.is_dir():
        raise UserError(f"{run} is not a folder.")
    paths = [path.relative_to(run).as_posix() for path in sorted(run.rglob("*")) if path.is_file()]
    for needed in ("config.json", "*.safetensors", "README.md"):
        if not any(run.glob(needed)):
            raise UserError(f"{run} has no {needed}: only the folder of a finished run can be published.")
    # A folder with a configuration of its own holds another model: the baseline, say.
    other_models = [f"{Path(path).parent}/*" for path in paths if path.endswith("/config.json")]
    return list(filter_repo_objects(paths, ignore_patterns=NOT_PUBLISHED + other_models))


def read_config(run: Path) -> dict:
    """
    The run's `config.json`.

    Raises:
        `UserError`: it cannot be read, or the modelling code that it names is not in the run.
    """
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run / 'config.json'} cannot be read: {error}.") from error
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


def loading_line(config: dict, repo_id: str) -> str:
    """The line of Python that loads the published model with the head that it was trained with."""
    architectures = config.get("architectures") or []
    auto_classes = {reference.split(".")[-1]: auto_class for auto_class, reference in config["auto_map"].items()}
    auto_class = next((auto_classes[name] for name in architectures if name in auto_classes), "AutoModel")
    load = f'model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)'
    return f"from transformers import {auto_class}; {load}"


def published_card(run: Path, repo_id: str) -> bytes:
    """The model card, whose code loads the model from the Hub where that of the run loads it from its folder."""
    card = (run / "README.md").read_text(encoding="utf-8")
    record = run / RECORD
    if record.exists():
        folder = yaml.safe_load(record.read_text(encoding="utf-8"))["training"]["output_dir"]
        card = card.replace(f'from_pretrained("{folder}"', f'from_pretrained("{repo_id}"')
    return card.encode()


def check_token(token: str | None, run: Path, files: list[str]) -> None:
    """
    Raises:
        `UserError`: there is no access token, it cannot be sent, or a file that would be published holds it.
    """
    if not token:
        raise UserError(NO_TOKEN)
    if not (token.isascii() and token.isprintable()):
        raise UserError("The access token for the Hub holds characters that no token has: copy it again.")
    for file in files:
        # Weights are large, and written by safetensors alone.
        if not file.endswith(".safetensors") and token.encode() in (run / file).read_bytes():
            raise UserError(f"{run / file} holds the access token for the Hub: remove it there.")


def push(run: Path, files: list[str], repo_id: str, private: bool, token: str) -> str:
    """
    Makes `files` of `run` the model `repo_id` on the Hub, in one commit, and returns its URL.

    Raises:
        `UserError`: the model should be private, but is public already.
        Exceptions of huggingface_hub, see `hub_error`.
    """
    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private or None, exist_ok=True)
    published = api.model_info(repo_id)
    if private and not published.private:
        raise UserError(f"{url} exists and is public: make it private in its settings, or choose another name.")
    # Weights of an earlier push that were cut into other files would be loaded in place of the new ones.
    old_files = [sibling.rfilename for sibling in published.siblings]
    old_weights = filter_repo_objects(old_files, allow_patterns=WEIGHTS, ignore_patterns=["*/*", *files])
    # Not `upload_folder`, which may split a push into several commits.
    api.create_commit(
        repo_id,
        [
            CommitOperationAdd("README.md", published_card(run, repo_id)),
            *(CommitOperationAdd(file, run / file) for file in files if file != "README.md"),
        ]
        + [CommitOperationDelete(path_in_repo=file) for file in old_weights],
        commit_message=f"Publish {run.resolve().name}",
    )
    return url


def publish(run: Path, repo_id: str, private: bool) -> None:
    """
    Makes a finished run the model `repo_id` (`user/name`) on the Hub, and prints its URL and how to load it.

    Raises:
        `UserError`: the run is not whole, the name is none, or the Hub could not be reached or refused the push.
    """
    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id!r} is not the name of a model: write it as user/name.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(str(error)) from error
    files = published_files(run)
    config = read_config(run)

    # The client warns of each attempt that failed, with URLs that are signed; the last failure is told below.
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        token = get_token()
        check_token(token, run, files)
        url = push(run, files, repo_id, private, token)
    except UserError:
        raise
    except Exception as error:
        raise hub_error(error) from error
    print(url)
    print(loading_line(config, repo_id))


@command
def main():
    parser = argparse.ArgumentParser(prog="python -m training.publish", description=__doc__.strip().split("\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished run")
    parser.add_argument("repo_id", metavar="user/name", help="the model's name on the Hub")
    parser.add_argument("--private", action="store_true", help="create the model as a private one")
    arguments = parser.parse_args()
    publish(arguments.run, arguments.repo_id, arguments.private)


if __name__ == "__main__":
    main()
