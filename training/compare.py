"""
Compare runs with each other, over several seeds:

    python -m training.compare configuration/evidence/STUDY.yaml   # trains the missing runs
    python -m training.compare RUN RUN ...                         # compares finished runs
    python -m training.compare --redraw FOLDER ...                 # draws the figures of earlier comparisons again
    python -m training.compare --forest PICTURE FOLDER ...         # draws the differences of several comparisons

A study's YAML file names the configuration that its runs share, the fields in which its variants differ, and the seeds:

    configuration: ../demo/text.yaml  # relative to the folder of this file; a variant may name its own
    fields: {max_steps: 1000}         # for all variants, by the names on the command line
    baseline: standard                # the variant that the others are compared with
    seeds: [0, 1, 2]
    variants:
      standard: {residual_scheme: standard}
      2-DCA: {residual_scheme: dca, last_k: 2}

Optional keys are a `title`; the `command` that trains the runs (`causal_lm`, the default, `image_classification`, or
`altered`); `groups`, a mapping like `variants`: all variants are trained in each group, and compared with the baseline of their
own group; `runs_of`, the file of another study, whose runs are reused if they are the same; and `tune`,

    tune: {seed: 0, fields: {learning_rate: [0.003, 0.006, 0.012]}}

With `tune`, each variant is first trained with each of these values, on a seed that is not among `seeds`, and then with those
that had the lowest held-out loss; the report then includes the gains at equal tokens, time and parameters.

The runs are in `runs/<path of the file below configuration>/[<group>/]<variant>/seed-<seed>`, with their logs in `logs` beside
them. Complete and diverged runs are kept, and interrupted ones are resumed, so that the same command can be repeated at any
time. `comparison.json` is updated whenever a run ends. `--recorded` takes runs with the same fields, and trials of `tune`, from the
`comparison.json` of this or another comparison instead of training them again, to continue where the runs are no longer available.
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
        help="number of runs to train at a time; 0 compares the complete ones (default: %(default)s)",
    )
    parser.add_argument(
        "--baseline", help="the variant to compare with, for finished runs (default: standard, if present)"
    )
    parser.add_argument(
        "--recorded", type=Path, help="the comparison.json of an earlier comparison, whose runs are not trained again"
    )
    parser.add_argument(
        "--redraw",
        metavar="FOLDER",
        nargs="+",
        type=Path,
        help="only draw the figures in the folders of earlier comparisons again, from their comparison.json",
    )
    parser.add_argument(
        "--forest",
        metavar="PICTURE",
        type=Path,
        help="only draw the differences of earlier comparisons in one picture; name their folders instead of runs",
    )
    parser.add_argument(
        "--step_rounds",
        type=int,
        default=0,
        help="rounds in which the training step of each variant is timed, in turns, on an otherwise idle machine; the results "
        "replace the times of the runs, now and later (default: no timing)",
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
