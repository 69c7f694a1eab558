"""
Compare forms of the gate of generalized residuals on many small language models that are trained side by side.

    python -m training.gate_trial data FILE.npz [--vocab_size 1024]
    python -m training.gate_trial train FILE.npz OUTPUT_DIR [--widths 128 64] [--variants NAME ...] [--minutes 5]
    python -m training.gate_trial report OUTPUT_DIR
    python -m training.gate_trial figure OUTPUT_DIR FILE.png [--dark]

All learning rates and seeds of a variant are one batch of models, with parameters `(runs, ...)`: a GPU trains dozens of them in
the time of one. The model is [`~modeling_dca.DCAForCausalLM`] (a slice of the parameters loads into it), except for how a
block's inputs are formed from its stack, in which the variants differ.
"""

from pathlib import Path

from training.studies.gate_trial import RATES, VARIANTS, draw, report, train_all, write_data
from training.support.errors import command
from training.support.parser import Parser


@command
def main():
    parser = Parser(None, "training.gate_trial", __doc__, allow_abbrev=True)
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("data", allow_abbrev=True)
    part.add_argument("file", type=Path)
    part.add_argument("--vocab_size", type=int, default=1024)
    part = commands.add_parser("train", allow_abbrev=True)
    part.add_argument("file", type=Path)
    part.add_argument("output_dir", type=Path)
    part.add_argument("--widths", type=int, nargs="+", default=[128, 64], choices=RATES)
    part.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    part.add_argument("--device", default="cuda")
    part.add_argument("--no_compile", action="store_true")
    part = commands.add_parser("report", allow_abbrev=True)
    part.add_argument("output_dir", type=Path)
    part = commands.add_parser("figure", allow_abbrev=True)
    part.add_argument("output_dir", type=Path)
    part.add_argument("file", type=Path)
    part.add_argument("--dark", action="store_true", help="for a dark page")
    arguments = parser.parse_args()
    if arguments.command == "data":
        write_data(arguments.file, arguments.vocab_size)
    elif arguments.command == "report":
        print(report(arguments.output_dir))
    elif arguments.command == "figure":
        draw(arguments.output_dir, arguments.file, arguments.dark)
    else:
        train_all(
            arguments.file,
            arguments.output_dir,
            arguments.widths,
            arguments.variants,
            arguments.device,
            not arguments.no_compile,
        )


if __name__ == "__main__":
    main()
