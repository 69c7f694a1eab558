"""
What a trained model draws from each earlier output: the learned `b` and the mean gate (paper, figure 10).

    python -m training.depth_weights CHECKPOINT [CHECKPOINT ...] --output_dir FOLDER

writes `learned_b.json` and `learned_b.png` into the folder: the median over the features of each entry's `b`, and the band
that holds 90 % of them, for each input of each block, over all checkpoints together (those of several seeds, say).
"""

from pathlib import Path

from training.results.depth_weights import write_learned_b
from training.support.errors import command
from training.support.parser import Parser


@command
def main():
    parser = Parser(None, "training.depth_weights", __doc__)
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help="folder or Hub id of a DCA model")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the figure and its numbers go")
    arguments = parser.parse_args()
    write_learned_b(arguments.checkpoints, arguments.output_dir)


if __name__ == "__main__":
    main()
