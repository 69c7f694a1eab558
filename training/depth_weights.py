"""
What the blocks of trained models draw from each earlier output (paper, figure 10), and what the loss is without it:

    python -m training.depth_weights CHECKPOINT [CHECKPOINT ...] --output_dir FOLDER [--times_size] [--without ENTRY]
    python -m training.depth_weights CHECKPOINT --page FILE.html (--text "..." | --image FILE)

The first writes `depth_weights.json`, `depth_weights.png` and `depth_spreads.png` into the folder, of all checkpoints together (those of
several seeds, say). What is drawn is the whole weight `b + relu(w . n(f))` in the mean over held-out tokens: the first figure
maps its mean over features, by block and output, for queries, keys and values; the second has the band beside it that holds
90 % of the features. `--without` writes `without.json` and `without.png`, too, and a table.

The data is that which `training.evaluate` takes: in the folder of a run all that this run held out, by its `run.yaml`. The
fields of `training.evaluate` (`--eval_dataset FILE`, `--batch_size 32`, `--device cpu`, ...; its `--help` after a checkpoint
lists them) say otherwise, for all checkpoints; they stand after these.

The second writes a page to explore: what each block draws for each token of the text, or patch of the image, from each earlier
output. It is one file that needs no network, and is made with bokeh (`pip install bokeh`). Its figures are in it as JSON. A page
in the folder of a run is linked to by its card.
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
#: Fields of `training.evaluate` that mean nothing here.
OTHERS = {"output", "overwrite", "metrics"}
#: Those that mean something where only a page is written.
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
    parser.add_argument("--output_dir", type=Path, help="where figures and numbers go")
    parser.add_argument(
        "--times_size",
        action="store_true",
        help="multiply weights by the entry's size, its root mean square over held-out tokens",
    )
    parser.add_argument(
        "--without",
        metavar="ENTRY",
        help="measure how much the held-out loss rises when each block, all blocks, and the model's output leave out the entry "
        "that holds this output (0: the model's input); 'all' takes each output in turn; outputs that an entry merges (k-DCA) "
        "are left out together",
    )
    parser.add_argument(
        "--page",
        metavar="FILE.html",
        type=Path,
        help="write a page that shows, for each token of --text or patch of --image, what each block draws; it is one file and "
        "needs no network",
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
            parser.error("--times_size and --without are of the figures in --output_dir, which is missing")
        unknown |= named - OF_PAGES  # there is no other data
    if unknown:
        parser.error(f"unrecognized arguments: --{min(unknown)}")
    if arguments.page is None and (arguments.text, arguments.image) != (None, None):
        parser.error("--text and --image are what --page shows, which is missing")
    if arguments.page is not None and len(arguments.checkpoints) > 1:
        parser.error(f"--page shows one model, and {len(arguments.checkpoints)} are named")
    asked = [
        parse_evaluation([checkpoint, *fields], TASKS, "training.depth_weights", __doc__)
        for checkpoint in arguments.checkpoints
    ]
    for each in asked:
        each["arguments"].metrics = []  # the run's, which are not asked for
    if arguments.page is not None:
        explore(asked[0], arguments.page, text=arguments.text, image=arguments.image)
    if arguments.output_dir is not None:
        write_depth_weights(asked, arguments.output_dir, arguments.times_size, arguments.without)


if __name__ == "__main__":
    main()
