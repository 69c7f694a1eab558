"""
Train a DCA image classifier:

    python -m training.image_classification configuration/demo/image.yaml [--field value ...]

`--help` lists all fields. Several processes: `accelerate launch -m training.image_classification ...`.
"""

import sys

from training.images.task import IMAGE_CLASSIFIERS
from training.run.parsing import parse_run
from training.support.errors import command


@command
def main():
    run = parse_run(
        sys.argv[1:], "training.image_classification", "Train a DCA image classifier.", *IMAGE_CLASSIFIERS.fields
    )
    IMAGE_CLASSIFIERS.train(run)


if __name__ == "__main__":
    main()
