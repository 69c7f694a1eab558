"""
Makes tasks for lm-evaluation-harness of the text that a run held out:

    python -m training.harness_tasks CHECKPOINT [--output_dir data/harness --items 300 ...]

writes `held_out_cloze` (a word to fill in) and `held_out_choice` (one continuation of four), which `lm-eval` finds with
`--include_path data/harness`. In the folder of a run the text is what that run held out; `--eval_dataset FILE` names another.
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
