"""
Evaluate a checkpoint on held-out data:

    python -m training.evaluate CHECKPOINT [--dataset ... --batch_size 32 --output FILE.json ...]

CHECKPOINT is the folder or Hub id of any causal language model or image classifier, DCA or not; its own tokenizer or image
processor is used. By default, a checkpoint in the folder of a run is evaluated on the held-out data of that run, with the same
results. With only `--eval_dataset FILE`, it is evaluated on all of a file or folder. `--help` after a checkpoint lists its
fields.
"""

import sys

from training.images.task import IMAGE_CLASSIFIERS
from training.run.evaluation import evaluate, parse_evaluation, report
from training.support.errors import command
from training.text.task import LANGUAGE_MODELS


TASKS = (LANGUAGE_MODELS, IMAGE_CLASSIFIERS)


@command
def main():
    asked = parse_evaluation(sys.argv[1:], TASKS, "training.evaluate", __doc__)
    report(evaluate(**asked), asked["arguments"].output)


if __name__ == "__main__":
    main()
