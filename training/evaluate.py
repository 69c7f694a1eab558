"""
Evaluate a checkpoint on held-out data:

    python -m training.evaluate CHECKPOINT [--dataset ... --batch_size 32 --output FILE.json ...]

CHECKPOINT is the folder or Hub id of any causal language model or image classifier of this family or of transformers, and
its tokenizer or image processor is used. In the folder of a run it is evaluated on that run's own held-out data, with
what the run came to, unless told otherwise. `--eval_dataset FILE` alone evaluates on all of a file or folder. `--help`
after a checkpoint lists its fields.
"""

import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from training.images.task import IMAGE_CLASSIFIERS
from training.results.record import find_record
from training.run.evaluation import EvaluationArguments, evaluate, find_task, report
from training.support.errors import UserError, command, told
from training.support.parser import Parser
from training.text.task import LANGUAGE_MODELS


TASKS = (LANGUAGE_MODELS, IMAGE_CLASSIFIERS)


def parse(argv: list[str]) -> dict[str, Any]:
    """What `argv` (`CHECKPOINT [--field value ...]`) asks for, else what the run had: the arguments of [`evaluate`]."""
    named = bool(argv) and not argv[0].startswith("-")
    given = {each[2:].partition("=")[0].replace("-", "_") for each in argv if each.startswith("--")}
    defaults, precision, config, task, model_class = {}, {}, None, None, None
    data_classes = {"data": LANGUAGE_MODELS.data_class, "data (of images)": IMAGE_CLASSIFIERS.data_class}
    if named:
        with told(argv[0], "evaluated"):
            config = AutoConfig.from_pretrained(argv[0])
        task, model_class = find_task(TASKS, config, argv[0])
        data_classes = {"data": task.data_class}
        record = find_record(Path(argv[0]))
        if record is not None:
            run = yaml.safe_load(record.read_text(encoding="utf-8"))
            training = run["training"]
            # On other data, the blocks are as long, and nothing else of the run's data counts. A run's tokenizer is in its
            # folder, whatever it was made from.
            kept = (
                ("block_size",)
                if given & {"dataset", "eval_dataset"}
                else {*run["data"], "split_seed"} - {"tokenizer"}
            )
            # (Before the split had a seed of its own, it was the run's.)
            run_data = {"split_seed": training.get("seed", 42), **run["data"]}
            defaults = {name: value for name, value in run_data.items() if name in kept}
            if "eval_split" in given:
                defaults.pop("eval_dataset", None)
            if "per_device_eval_batch_size" in training:
                defaults["batch_size"] = training["per_device_eval_batch_size"]
            if "metrics" in training:
                defaults["metrics"] = training["metrics"]
            if training.get("use_cpu"):
                defaults["device"] = "cpu"
            precision = {name: training[name] for name in ("bf16", "fp16") if training.get(name)}
    parser = Parser(
        {**data_classes, "evaluation": EvaluationArguments},
        "training.evaluate",
        __doc__,
        usage="%(prog)s CHECKPOINT [--field value ...]",
        conflict_handler="resolve",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder or Hub id of a model")
    parser.set_defaults(**defaults)
    if "--tokenizer" in parser._option_string_actions:
        parser._option_string_actions[
            "--tokenizer"
        ].help = "Another tokenizer than the checkpoint's: its path or Hub id."
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        raise UserError(str(error)) from error
    data, arguments = parsed
    if "eval_dataset" in given and "dataset" not in given:
        data.dataset = data.eval_dataset  # of which nothing is needed but the names of the classes
    asked = {"checkpoint": rest.checkpoint, "task": task, "model_class": model_class, "config": config}
    return {**asked, "data": data, "arguments": arguments, **({} if arguments.dtype else precision)}


@command
def main():
    asked = parse(sys.argv[1:])
    report(evaluate(**asked), asked["arguments"].output)


if __name__ == "__main__":
    main()
