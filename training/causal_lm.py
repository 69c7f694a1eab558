"""
Train a DCA language model:

    python -m training.causal_lm configuration/demo/text.yaml [--field value ...]

`--help` lists all fields. Several processes: `accelerate launch -m training.causal_lm ...`.
"""

import sys

from training.run.parsing import parse_run
from training.support.errors import command
from training.text.task import LANGUAGE_MODELS


@command
def main():
    run = parse_run(sys.argv[1:], "training.causal_lm", "Train a DCA language model.", *LANGUAGE_MODELS.fields)
    LANGUAGE_MODELS.train(run)


if __name__ == "__main__":
    main()
