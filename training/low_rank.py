"""
Repeat the paper's low-rank study (figures 1 and 5, theorems 4.1 to 4.3) on linear networks with the library's residuals:

    python -m training.low_rank
    python -m training.low_rank --seeds 0 1 2 3 4 --output_dir FOLDER

It trains the networks of figure 1, compares the bounds of theorem 4.2 with the results of gradient descent, and writes a page
with tables and both figures, and all numbers as JSON.
"""

import shlex
import sys
from pathlib import Path

from training.studies.low_rank import DEFAULT_OUTPUT, study
from training.support.errors import command
from training.support.parser import Parser


@command
def main():
    parser = Parser(None, "training.low_rank", __doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output_dir", type=Path, default=Path(DEFAULT_OUTPUT), help="default: %(default)s")
    arguments = parser.parse_args()
    study(arguments.seeds, arguments.output_dir, shlex.join(["python", "-m", "training.low_rank", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
