"""
Train a language model with one part of DCA altered, for studies of that part:

    python -m training.altered CONFIGURATION.yaml --alteration NAME [--field value ...]

This is `training.causal_lm` with another name for `--variant`.
"""

import sys

from training.run.parsing import parse_run
from training.support.errors import command
from training.text.fields import AlteredArguments
from training.text.task import LANGUAGE_MODELS


@command
def main():
    description = "Train a language model with one part of DCA altered."
    task = LANGUAGE_MODELS._replace(arguments_class=AlteredArguments)
    run = parse_run(sys.argv[1:], "training.altered", description, *task.fields)
    task.train(run)


if __name__ == "__main__":
    main()
