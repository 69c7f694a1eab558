"""
Compare runs with each other, over several seeds:

    python -m training.compare configuration/evidence/STUDY.yaml   # trains what is missing
    python -m training.compare RUN RUN ...                         # of runs that are finished
    python -m training.compare --redraw FOLDER ...                 # the figures of earlier comparisons, again
    python -m training.compare --forest PICTURE FOLDER ...         # their differences in one picture

A study's YAML file names the configuration that its runs share, the fields in which its variants differ, and the seeds:

    configuration: ../demo/text.yaml  # as seen from the folder of this file; a variant may name its own
    fields: {max_steps: 1000}         # for all variants, by their names on the command line
    baseline: standard                # the variant that the others are compared with
    seeds: [0, 1, 2]
    variants:
      standard: {residual_scheme: standard}
      2-DCA: {residual_scheme: dca, last_k: 2}

and, if it likes, a `title`; the `command` that trains them (`causal_lm`, if not given, `image_classification`, or `altered`);
`groups`, named as the variants are, each with its fields: all variants are then trained in each, and compared with the
baseline of their own group; `runs_of`, the file of another study, whose runs are its own where they are the same; and `tune`,

    tune: {seed: 0, fields: {learning_rate: [0.003, 0.006, 0.012]}}

with which each variant is first trained with each of these values alike, on a seed that is none of `seeds`, and then with those
that had the lowest held-out loss; what all gain at equal tokens, time and parameters is then told, too.

The runs are then in `runs/<path of the file below configuration>/[<group>/]<variant>/seed-<seed>`, with their logs in `logs`
beside them. Those that are whole are kept, also those that ended because they diverged, and those that were cut off are
resumed, so that the same command can always be given again. The `comparison.json` that it writes is there as soon as one run has
ended, and grows with each. `--recorded` takes runs with the same fields, and trials of `tune`, from the `comparison.json` of
another comparison or of this one instead of training them again: to add to one whose runs are no longer at hand.
"""

import shlex
import sys
from pathlib import Path

from training.studies.report import draw_forest, redraw
from training.studies.running import compare
from training.support.errors import command
from training.support.parser import Parser


@command
def main():
    parser = Parser(None, "training.compare", __doc__)
    parser.add_argument("runs", metavar="STUDY.yaml | RUN", nargs="*", type=Path, help="a study, or finished runs")
    parser.add_argument("--output_dir", type=Path, help="the folder of the table and figures (default: of the study)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="how many runs to train at a time; 0 compares those that are whole (default: %(default)s)",
    )
    parser.add_argument(
        "--baseline", help="the variant to compare with, of finished runs (default: standard, if there)"
    )
    parser.add_argument(
        "--recorded", type=Path, help="the comparison.json of an earlier comparison; runs that it has are not trained"
    )
    parser.add_argument(
        "--redraw",
        metavar="FOLDER",
        nargs="+",
        type=Path,
        help="draw the figures in the folders of earlier comparisons again, from their comparison.json, and do nothing else",
    )
    parser.add_argument(
        "--forest",
        metavar="PICTURE",
        type=Path,
        help="draw the differences of several comparisons, whose folders are named in the place of runs, and do nothing else",
    )
    parser.add_argument(
        "--step_rounds",
        type=int,
        default=0,
        help="measure in so many rounds, in turns, how long a training step of each variant takes, on a machine that does "
        "nothing else; times are then those, and kept for later (default: times are those of the runs)",
    )
    arguments = parser.parse_args()
    if bool(arguments.runs) == bool(arguments.redraw):
        parser.error("name a study, finished runs, or with --redraw the folders of earlier comparisons")
    for folder in arguments.redraw or ():
        redraw(folder)
    if arguments.redraw:
        return
    if arguments.forest:
        draw_forest(arguments.runs, arguments.forest)
        return
    line = shlex.join(["python", "-m", "training.compare", *sys.argv[1:]])
    compare(
        arguments.runs,
        arguments.output_dir,
        arguments.jobs,
        arguments.baseline,
        arguments.recorded,
        arguments.step_rounds,
        line,
    )


if __name__ == "__main__":
    main()
