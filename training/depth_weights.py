"""
What trained models draw from each earlier output (paper, figure 10), and what they lose without it:

    python -m training.depth_weights CHECKPOINT [CHECKPOINT ...] --output_dir FOLDER [--times_size] [--without ENTRY]

writes `depth_weights.json`, `depth_weights.png` and `depth_spreads.png` into the folder, of all checkpoints together (those of
several seeds, say). What is drawn is the whole weight `b + relu(w . n(f))` in the mean over held-out tokens: the first figure
maps its mean over features, by block and output, for queries, keys and values; the second has the band beside it that holds
90 % of the features. `--without` writes `without.json` and `without.png`, too, and a table.

The data is that which `training.evaluate` takes: in the folder of a run all that this run held out, by its `run.yaml`. The
fields of `training.evaluate` (`--eval_dataset FILE`, `--batch_size 32`, `--device cpu`, ...; its `--help` after a checkpoint
lists them) say otherwise, for all checkpoints; they stand after these.
"""

import sys
from pathlib import Path

from training.images.task import IMAGE_CLASSIFIERS
from training.run.depth_weights import write_depth_weights
from training.run.evaluation import parse_evaluation
from training.support.errors import command
from training.support.parser import Parser
from training.text.task import LANGUAGE_MODELS


TASKS = (LANGUAGE_MODELS, IMAGE_CLASSIFIERS)
#: Fields of `training.evaluate` that mean nothing here.
OTHERS = {"output", "overwrite", "metrics"}


@command
def main():
    parser = Parser(
        None,
        "training.depth_weights",
        __doc__,
        usage="%(prog)s CHECKPOINT [CHECKPOINT ...] --output_dir FOLDER [--times_size] [--without ENTRY] [--field value ...]",
    )
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help="folder or Hub id of a DCA model")
    parser.add_argument("--output_dir", type=Path, required=True, help="where figures and numbers go")
    parser.add_argument(
        "--times_size",
        action="store_true",
        help="multiply weights by the entry's size, its root mean square over held-out tokens",
    )
    parser.add_argument(
        "--without",
        metavar="ENTRY",
        help="measure what the held-out loss loses when each block, all blocks, and the model's output do without the entry "
        "that holds this output (0: the model's input), or with 'all', without each in turn; outputs that are merged in an "
        "entry (k-DCA) go together",
    )
    arguments, fields = parser.parse_known_args(sys.argv[1:])
    named = {each[2:].partition("=")[0].replace("-", "_") for each in fields if each.startswith("--")}
    if named & OTHERS:
        parser.error(f"unrecognized arguments: --{min(named & OTHERS)}")
    asked = [
        parse_evaluation([checkpoint, *fields], TASKS, "training.depth_weights", __doc__)
        for checkpoint in arguments.checkpoints
    ]
    for each in asked:
        each["arguments"].metrics = []  # the run's, which are not asked for
    write_depth_weights(asked, arguments.output_dir, arguments.times_size, arguments.without)


if __name__ == "__main__":
    main()
