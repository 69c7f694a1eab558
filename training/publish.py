"""
Publish a finished run, or a converted model, on the Hugging Face Hub: `python -m training.publish RUN user/name`.

The model is pushed with its modelling code, so that transformers can load it, and in one commit, so that an interrupted push
leaves the repository unchanged and can be repeated. The run itself is only read. What is pushed reveals nothing about the
machine: no local path, no host name.
"""

from pathlib import Path

from training.results.hub import publish
from training.support.errors import command
from training.support.parser import Parser


@command
def main():
    parser = Parser(None, "training.publish", __doc__, allow_abbrev=True)
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished run, or of a converted model")
    parser.add_argument("repo_id", metavar="user/name", help="the model's name on the Hub")
    parser.add_argument(
        "--private", action="store_true", help="publish in a private repository; a public one is refused"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="the branch, which is created if missing (default: main)")
    arguments = parser.parse_args()
    publish(arguments.run, arguments.repo_id, arguments.private or None, arguments.revision)


if __name__ == "__main__":
    main()
