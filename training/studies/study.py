"""What is compared: the runs of a study, or runs that are finished."""

import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from modeling_dca.configuration_dca import nearest_name
from training.images.task import IMAGE_CLASSIFIERS
from training.results.card import METRICS, scheme_name
from training.results.record import DIVERGED, RECORD, RUNS_FOLDER, find_record, read_record
from training.run.fields import Run
from training.run.parsing import as_arguments, default_output_dir, known_fields, parse_run
from training.support.errors import UserError
from training.support.files import load_yaml, read_json
from training.text.fields import AlteredArguments
from training.text.task import LANGUAGE_MODELS


#: What the commands train that a study may name.
COMMANDS = {
    "causal_lm": LANGUAGE_MODELS,
    "altered": LANGUAGE_MODELS._replace(arguments_class=AlteredArguments),
    "image_classification": IMAGE_CLASSIFIERS,
}

STUDY_KEYS = (
    "title",
    "command",
    "configuration",
    "fields",
    "baseline",
    "seeds",
    "groups",
    "variants",
    "runs_of",
    "tune",
)
#: Where, beside the runs of a study, those are by which its variants are tuned.
TUNING_FOLDER = "tuning"
#: Fields that a study gives to each run itself, or that are for one run alone.
NOT_FOR_VARIANTS = ("seed", "output_dir", "baseline", "overwrite", "resume_from_checkpoint", "push_to_hub")
#: Fields in which the runs of a variant may differ.
NOT_OF_A_VARIANT = {*NOT_FOR_VARIANTS, "hub_model_id", "run_name", "report_to"}
#: What table and figures are made of, beside the metrics of the task.
FIGURES = (
    *("seed", "scheme", "parameters", "steps", "examples", "seconds", "speed"),
    *("held_out", "training", "spikes", "diverged"),
)


@dataclasses.dataclass
class Member:
    """A run of a comparison."""

    group: str | None
    variant: str
    folder: Path
    command: str  # of the room `training`
    run: Run  # as it was asked for
    arguments: list[str]  # of the command

    @property
    def seed(self) -> int:
        return self.run.training.seed

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.group, self.variant, f"seed {self.seed}")))

    @property
    def log(self) -> Path:
        return self.folder.parent / "logs" / f"{self.folder.name}.log"

    @property
    def sittings(self) -> Path:
        """Where it is told on what the run was trained, in one sitting or, where it was cut off, several."""
        return self.log.with_suffix(".json")

    def is_whole(self) -> bool:
        try:
            return "eval_loss" in read_json(self.folder / "all_results.json") and any(
                self.folder.glob("*.safetensors")
            )
        except (OSError, ValueError):
            return False

    def divergence(self) -> dict[str, Any] | None:
        """The step at which the loss or the weights became NaN or infinite, and which, if the run ended so."""
        found = self.folder / DIVERGED
        again = f"move {self.folder} away, and it is trained anew"
        return read_json(found, "step", remedy=again) if found.exists() else None


@dataclasses.dataclass
class Trial:
    """A run by which a variant is tuned, and the fields that it tries."""

    group: str | None
    variant: str
    values: dict[str, Any]
    member: Member
    recorded: float | None = None  # the loss, where an earlier comparison has it

    @property
    def loss(self) -> float | None:
        """The held-out loss, infinite where the run diverged, and none where it is not whole."""
        if self.recorded is not None:
            return self.recorded
        if self.member.divergence():
            return math.inf
        return read_json(self.member.folder / "all_results.json")["eval_loss"] if self.member.is_whole() else None


@dataclasses.dataclass
class Comparison:
    """
    Runs that are compared with each other, those of one variant after those of another or not; where they are in groups,
    those of each group.
    """

    title: str
    baseline: str
    members: list[Member]
    folder: Path  # of the table and the figures, if no other is named
    trials: list[Trial] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        """
        Raises:
            [`UserError`]: there is no baseline, a run is there twice, or the data of two runs of a group is not the same.
        """
        variants = [member.variant for member in self.members]
        if self.baseline not in variants:
            raise UserError(f"`baseline` is {self.baseline!r}, no variant; {nearest_name(self.baseline, variants)}")
        by_name, first_of_group = {}, {}
        for member in self.members:
            first = first_of_group.setdefault(member.group, member)
            other = by_name.setdefault(member.name, member)
            if other is not member:
                raise UserError(f"{other.folder} and {member.folder} are both {member.name}: leave one of them out.")
            if member.command != self.members[0].command:
                first = self.members[0]
                raise UserError(f"{first.folder} and {member.folder} have different tasks: compare those of one task.")
            pairs = [(name, value, vars(member.run.data)[name]) for name, value in vars(first.run.data).items()]
            if COMMANDS[member.command].name == "text-generation":
                pairs.append(("vocab_size", first.run.config.vocab_size, member.run.config.vocab_size))
            for name, value, others in pairs:
                if value != others:
                    raise UserError(
                        f"The losses of {first.name} and {member.name} cannot be compared: `{name}` is {value!r} for one and "
                        f"{others!r} for the other."
                    )


def parse_member(group: str | None, variant: str, command_name: str, folder: Path, arguments: list[str]) -> Member:
    run = parse_run(arguments, f"training.{command_name}", "", *COMMANDS[command_name].fields)
    return Member(group, variant, folder, command_name, run, arguments)


def read_study(file: Path, earlier: Sequence[dict[str, Any]] = ()) -> Comparison:
    """
    The comparison that a YAML file asks for.

    Args:
        earlier: the records of trials of an earlier comparison, as [`tuning_record`] made them.

    Raises:
        [`UserError`]: with what is wrong with the file, or a field of a variant.
    """
    try:
        study = load_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"The study {file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"The study {file} is not a YAML file: {error}.") from error
    if not isinstance(study, dict):
        raise UserError(f"The study {file} is not a YAML file with the keys {', '.join(STUDY_KEYS)}.")
    for key in study:
        if key not in STUDY_KEYS:
            raise UserError(f"The study {file} has an unknown key {key!r}; {nearest_name(key, STUDY_KEYS)}")
    variants, groups, seeds = study.get("variants"), study.get("groups", {None: {}}), study.get("seeds")
    tune = study.get("tune")
    shared, command_name = study.get("fields") or {}, study.get("command", "causal_lm")
    if not isinstance(variants, dict) or not variants:
        raise UserError(f"`variants` of {file} is {variants!r}; it must name the variants, each with its fields.")
    if not isinstance(groups, dict) or not groups:
        raise UserError(f"`groups` of {file} is {groups!r}; it must name the groups, each with its fields.")
    if not isinstance(shared, dict):
        raise UserError(f"`fields` of {file} is {shared!r}; it must name fields and values.")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"`seeds` of {file} is {seeds!r}; it must be a list of integers from 0.")
    check_tune(tune, seeds, file)
    if command_name not in COMMANDS:
        raise UserError(f"`command` of {file} is {command_name!r}; {nearest_name(command_name, COMMANDS)}")
    runs_of = study.get("runs_of", file.name)
    if not isinstance(runs_of, str) or not (file.parent / runs_of).is_file():
        raise UserError(
            f"`runs_of` of {file} is {runs_of!r}; it must be the file of a study, as seen from this one's folder."
        )
    runs_folder = default_output_dir(Path(os.path.relpath(file.parent / runs_of)))
    for name in (*variants, *filter(None, groups)):
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w .+=-]*", name):
            raise UserError(f"{name!r} of {file} cannot be the name of a folder: use letters, digits, - and _.")

    def member_of(seed: int, group: str | None, variant: str, values: dict, label: str, output: Path) -> Member:
        of_group, of_variant = groups[group], variants[variant]
        where = f"The variant {variant!r} of {file}" + ("" if group is None else f", group {group!r},")
        for fields in (of_group or {}, of_variant or {}):
            if not isinstance(fields, dict):
                raise UserError(f"{where} has {fields!r}, which must name fields and values.")
        fields = {**shared, **(of_group or {}), **(of_variant or {}), **values}
        arguments = member_arguments(where, fields, {"seed": seed, "output_dir": str(output)}, study, file)
        try:
            member = parse_member(group, label, command_name, output, arguments)
            if member.run.training.baseline is not None:
                # It is the configuration's, for when it is run alone.
                member = parse_member(group, label, command_name, output, [*arguments, "--baseline=none"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        return member

    grid = (
        [dict(zip(tune["fields"], values)) for values in itertools.product(*tune["fields"].values())] if tune else []
    )
    trials = []
    for group, variant, values in itertools.product(groups, variants, grid):
        tried = " ".join(f"{name} {value}" for name, value in values.items())
        output = Path(runs_folder, TUNING_FOLDER, group or "", variant, tried.replace("/", "-"))
        member = member_of(tune["seed"], group, variant, values, f"{variant} with {tried}", output)
        trial = Trial(group, variant, values, member)
        for record in earlier:
            # (Earlier releases did not record what was named for a trial.)
            if "named" in record and identity(record["named"]) == identity(member.run.named):
                trial.recorded = math.inf if record["eval_loss"] is None else record["eval_loss"]
        trials.append(trial)
    members = []
    # A seed at a time, so that a study that is cut off has the same seeds of all variants, or nearly so.
    for seed, group, variant in itertools.product(seeds, groups, variants):
        values = best_values([trial for trial in trials if (trial.group, trial.variant) == (group, variant)])
        output = Path(runs_folder, group or "", variant, f"seed-{seed}")
        members.append(member_of(seed, group, variant, values, variant, output))
    baseline = study.get("baseline", next(iter(variants)))
    return Comparison(str(study.get("title", file.stem)), baseline, members, default_output_dir(file), trials)


def check_tune(tune: Any, seeds: list[int], file: Path) -> None:
    """
    Raises:
        [`UserError`]: the key `tune` of a study is none.
    """
    if tune is None:
        return
    if not isinstance(tune, dict) or set(tune) != {"seed", "fields"}:
        raise UserError(f"`tune` of {file} is {tune!r}; it must have the keys seed and fields.")
    seed, fields = tune["seed"], tune["fields"]
    if type(seed) is not int or seed < 0 or seed in seeds:
        raise UserError(
            f"`seed` of `tune` of {file} is {seed!r}; it must be an integer from 0 that is none of `seeds`."
        )
    if (
        not isinstance(fields, dict)
        or not fields
        or not all(isinstance(each, list) and each for each in fields.values())
    ):
        raise UserError(
            f"`fields` of `tune` of {file} is {fields!r}; it must name fields, each with a list of values."
        )
    for name, values in fields.items():
        if len({str(value) for value in values}) < len(values):
            raise UserError(
                f"`fields` of `tune` of {file} has {values!r} for `{name}`; each value must be there once."
            )


def best_values(trials: list[Trial]) -> dict[str, Any]:
    """
    With which values a variant was best, by the held-out loss of its trials; as long as some are not trained, the
    first.

    Raises:
        [`UserError`]: it diverged with all.
    """
    losses = [trial.loss for trial in trials]
    if None in losses or not losses:
        return trials[0].values if trials else {}
    if min(losses) == math.inf:
        raise UserError(f"The variant {trials[0].variant!r} diverged with all values of `tune`: add lower ones.")
    return trials[losses.index(min(losses))].values


def member_arguments(where: str, fields: dict, own: dict, study: dict, file: Path) -> list[str]:
    """
    The arguments of the command that trains a run of a study.

    Args:
        where: what an error names, the variant and the study's `file`.
        fields: those of the study, of the group and of the variant.
        own: fields of the section `training` that are the run's own.

    Raises:
        [`UserError`]: a field is unknown, not for a variant, or has no value; or there is no configuration.
    """
    known = known_fields(*COMMANDS[study.get("command", "causal_lm")].fields)
    configuration, sections = study.get("configuration"), {}
    for field, value in fields.items():
        section = next((section for section, names in known.items() if field in names), None)
        if field == "configuration":
            configuration = value
        elif field in NOT_FOR_VARIANTS:
            raise UserError(f"{where} has the field {field!r}, which is not for a variant: leave it out.")
        elif section is None:
            nearest = nearest_name(field, sum(known.values(), [])).partition(" Known: ")[0]
            raise UserError(f"{where} has an unknown field {field!r}; {nearest}")
        elif value is None and section != "model":
            raise UserError(f"{where} has no value for {field!r}: give one, or leave it out.")
        else:
            sections.setdefault(section, {})[field] = value
    if not isinstance(configuration, str):
        raise UserError(f"{where} has no `configuration`: name the YAML file of the run.")
    sections.setdefault("training", {}).update(own)
    return [os.path.relpath(file.parent / configuration), *as_arguments(sections)]


def read_runs(folders: list[Path], baseline: str | None) -> Comparison:
    """
    The comparison of runs that are finished. Those that differ in nothing but the seed are of one variant.

    Raises:
        [`UserError`]: one of them is no finished run.
    """
    members, kinds = [], {}
    for folder in folders:
        record = find_record(folder)
        if record is None or not (folder / "config.json").exists():
            raise UserError(f"{folder} is not the folder of a run, nor a YAML file: name one of them.")
        read_record(record, f"move {folder} away, and train it again")
        config = read_json(folder / "config.json")
        classifier = any("ForImageClassification" in name for name in config.get("architectures") or [])
        # ("altered" knows the fields of all language models.)
        member = parse_member(None, "", "image_classification" if classifier else "altered", folder, [str(record)])
        if not member.is_whole():
            raise UserError(f"{folder} holds a run that is not finished: resume it, or leave it out.")
        named = {**member.run.named["model"], **member.run.named["training"]}
        for name in ("residual_scheme", "last_k", *NOT_OF_A_VARIANT):  # (The first two are in `config`.)
            named.pop(name, None)
        kinds.setdefault(json.dumps([config, named], sort_keys=True), []).append(member)
        members.append(member)
    names = [scheme_name(kind[0].folder) for kind in kinds.values()]
    for name, kind in zip(names, kinds.values()):
        first = kind[0].folder
        if first.name.startswith("seed-"):
            name = first.parent.name
        elif names.count(name) > 1:
            name = first.as_posix()
        for member in kind:
            member.variant = name
    if baseline is None:
        plain = [member for member in members if scheme_name(member.folder) == "standard"]
        baseline = [*plain, *members][0].variant
    schemes = ", ".join(dict.fromkeys(member.variant for member in members))
    return Comparison(f"Comparison of {schemes}", baseline, members, Path(RUNS_FOLDER, "comparison"))


def check_folder(member: Member) -> None:
    """
    See that what is in the folder of a run is that run, as it is asked for now.

    Raises:
        [`UserError`]: it is another one.
    """
    folder, record = member.folder, member.folder / RECORD
    if not record.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is in the way of a run of that name, and holds none: move it.")
        return
    before = read_record(record, f"move {folder}, and it is trained anew")
    if member.sittings.exists():
        read_json(member.sittings, "sittings", remedy="delete it")
    for section, fields in member.run.named.items():
        old = before.get(section) or {}
        for name in {**old, **fields}:
            if old.get(name) != fields.get(name):
                was, now = (repr(each[name]) if name in each else "not named" for each in (old, fields))
                raise UserError(
                    f"The run in {folder} was started with another `{name}` (it was {was}, and now is {now}): put that back, or "
                    "move the folder."
                )


def identity(named: dict[str, dict]) -> dict[str, dict]:
    """The fields that were named for a run, but for its folder: two runs with the same ones are the same."""
    return {**named, "training": {**named["training"], "output_dir": None}}


class Recorded(NamedTuple):
    """What an earlier comparison knows: its runs, and the trials by which its variants were tuned."""

    file: Path
    runs: list[dict[str, Any]]
    trials: list[dict[str, Any]]


def read_recorded(file: Path) -> Recorded:
    """
    What a `comparison.json` holds.

    Raises:
        [`UserError`]: the file is none.
    """
    content = read_json(file, "runs", remedy="name the `comparison.json` of an earlier comparison")
    try:
        trials = list(content.get("tuning", ()))
        for each in (*content["runs"], *(trial for trial in trials if "named" in trial)):
            identity(each["named"])
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"`recorded` is {str(file)!r}, which is no `comparison.json` of `training.compare`."
        ) from error
    return Recorded(file, content["runs"], trials)


def take_recorded(recorded: Recorded, comparison: Comparison, written: Path) -> dict[str, dict[str, Any]]:
    """
    The figures of those runs of a comparison that an earlier one has, by the names that they have now. A run is the same where
    all of its fields are, wherever its folder was and whatever its variant and group were called.

    Args:
        written: the `comparison.json` that will be written.

    Raises:
        [`UserError`]: the earlier comparison shares nothing with this one, is of another release, or has runs that would be
            written over and lost.
    """
    file, found = recorded.file, {}
    for member in comparison.members:
        for run in recorded.runs:
            if identity(run["named"]) == identity(member.run.named):
                found[member.name] = {**run, "group": member.group, "variant": member.variant}
    trials = [trial for trial in comparison.trials if trial.recorded is not None]
    if not found and not trials:
        raise UserError(
            f"{file} has none of the runs of this study: name the `comparison.json` of one that shares some."
        )
    taken = len(found) + len(trials)
    if taken < len(recorded.runs) + len(recorded.trials) and file.resolve() == written.resolve():
        raise UserError(
            f"{file} has runs that this study has not, and would be written over: name another `output_dir`."
        )
    metrics = [key for key, _, _ in METRICS[COMMANDS[comparison.members[0].command].name]]
    missing = [key for run in found.values() for key in (*FIGURES, *metrics) if key not in run]
    if missing:
        raise UserError(f"{file} is of another release, as a run of it lacks {missing[0]!r}: leave `--recorded` out.")
    return found
