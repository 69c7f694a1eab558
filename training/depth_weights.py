"""
Measure how much the blocks of trained models draw from each earlier output (paper, figure 10), and the loss without it:

    python -m training.depth_weights CHECKPOINT [CHECKPOINT ...] --output_dir FOLDER [--times_size] [--without ENTRY]
    python -m training.depth_weights CHECKPOINT --page FILE.html (--text "..." | --image FILE)

The first form writes `depth_weights.json`, `depth_weights.png` and `depth_spreads.png` to the folder, over all checkpoints
together (for example several seeds). They show the weight `b + relu(w . n(f))` as the mean over held-out tokens: the first
figure maps its mean over features, by block and output, for queries, keys and values; the second adds the band that holds 90 %
of the features. `--without` also writes `without.json` and `without.png`, and prints a table.

The data is that of `training.evaluate`: for the folder of a run, its own held-out data. The fields of `training.evaluate`
(`--eval_dataset FILE`, `--batch_size 32`, `--device cpu`, ...; its `--help` after a checkpoint lists them) change it for all
checkpoints, and follow these.

The second form writes an interactive page: how much each block draws from each earlier output, for each token of the text, or
patch of the image. It is a single file that needs no network, made with bokeh (`pip install bokeh`), and contains its data as
JSON. If it is in the folder of a run, the model card links to it.
"""

import sys
from pathlib import Path

from training.images.task import IMAGE_CLASSIFIERS
from training.run.depth_weights import explore, write_depth_weights
from training.run.evaluation import parse_evaluation
from training.support.errors import command
from training.support.parser import Parser
from training.text.task import LANGUAGE_MODELS


TASKS = (LANGUAGE_MODELS, IMAGE_CLASSIFIERS)
#: Fields of `training.evaluate` that do not apply here.
OTHERS = {"output", "overwrite", "metrics"}
#: Those that apply if only a page is written.
OF_PAGES = {"device", "dtype", "tokenizer"}


@command
def main():
    parser = Parser(
        None,
        "training.depth_weights",
        __doc__,
        usage="%(prog)s CHECKPOINT [CHECKPOINT ...] [--output_dir FOLDER [--times_size] [--without ENTRY]] "
        '[--page FILE.html (--text "..." | --image FILE)] [--field value ...]',
    )
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help="folder or Hub id of a DCA model")
    parser.add_argument("--output_dir", type=Path, help="the folder for figures and numbers")
    parser.add_argument(
        "--times_size",
        action="store_true",
        help="multiply weights by the entry's size, its root mean square over held-out tokens",
    )
    parser.add_argument(
        "--without",
        metavar="ENTRY",
        help="measure the rise of the held-out loss when each block, all blocks, or the model's output leave out the entry that "
        "holds this output (0: the model's input), or with 'all' each output in turn; outputs that an entry merges (k-DCA) are "
        "left out together",
    )
    parser.add_argument(
        "--page",
        metavar="FILE.html",
        type=Path,
        help="write a page, a single file that needs no network, with the weights for each token of --text or patch of --image",
    )
    parser.add_argument("--text", help="the text of the page")
    parser.add_argument("--image", metavar="FILE", help="the image of the page")
    arguments, fields = parser.parse_known_args(sys.argv[1:])
    named = {each[2:].partition("=")[0].replace("-", "_") for each in fields if each.startswith("--")}
    unknown = named & OTHERS
    if arguments.output_dir is None:
        if arguments.page is None:
            parser.error("the following arguments are required: --output_dir or --page")
        if arguments.times_size or arguments.without is not None:
            parser.error("--times_size and --without need --output_dir, which is missing")
        unknown |= named - OF_PAGES  # a page uses no data set
    if unknown:
        parser.error(f"unrecognized arguments: --{min(unknown)}")
    if arguments.page is None and (arguments.text, arguments.image) != (None, None):
        parser.error("--text and --image need --page, which is missing")
    if arguments.page is not None and len(arguments.checkpoints) > 1:
        parser.error(f"--page shows one model, but {len(arguments.checkpoints)} are given")
    asked = [
        parse_evaluation([checkpoint, *fields], TASKS, "training.depth_weights", __doc__)
        for checkpoint in arguments.checkpoints
    ]
    for each in asked:
        each["arguments"].metrics = []  # (those of the run are not needed)
    if arguments.page is not None:
        explore(asked[0], arguments.page, text=arguments.text, image=arguments.image)
    if arguments.output_dir is not None:
        write_depth_weights(asked, arguments.output_dir, arguments.times_size, arguments.without)


if __name__ == "__main__":
    main()
