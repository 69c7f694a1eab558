"""
Write tasks for lm-evaluation-harness from the held-out text of a run:

    python -m training.harness_tasks CHECKPOINT [--output_dir data/harness --items 300 ...]

It writes `held_out_cloze` (predict a word) and `held_out_choice` (choose one of four continuations), which `lm-eval` finds with
`--include_path data/harness`. For the folder of a run, the text is its held-out data; `--eval_dataset FILE` sets another.
"""

import sys

from training.run.evaluation import parse_evaluation
from training.support.errors import command
from training.support.parser import Parser
from training.text.harness import HarnessArguments, write_tasks
from training.text.task import LANGUAGE_MODELS


@command
def main():
    parser = Parser(
        HarnessArguments, "training.harness_tasks", __doc__, usage="%(prog)s CHECKPOINT [--field value ...]"
    )
    arguments, rest = parser.parse_args_into_dataclasses(sys.argv[1:], return_remaining_strings=True)
    asked = parse_evaluation(rest, (LANGUAGE_MODELS,), "training.harness_tasks", __doc__)
    folder = write_tasks(asked["data"], arguments)
    print(f"{2 * arguments.items} items are in {folder}.")


if __name__ == "__main__":
    main()
