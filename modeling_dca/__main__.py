"""
Runs the command of another package in a process with DCA models registered: `python -m modeling_dca transformers serve MODEL`,
`python -m modeling_dca lm-eval run ...`.
"""

import sys
from importlib.metadata import entry_points

import modeling_dca  # noqa: F401 (it registers the models)


USAGE = "python -m modeling_dca COMMAND [ARGUMENT ...], with a command that a package has installed, such as `transformers serve`"


def main() -> object:
    """Calls what the command calls, with its own arguments, and returns what that returns."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in (None, "-h", "--help"):
        sys.exit(f"usage: {USAGE}")
    commands = entry_points(group="console_scripts", name=name)
    if not commands:
        sys.exit(f"error: no installed package has a command {name!r}; usage: {USAGE}.")
    del sys.argv[0]
    return next(iter(commands)).load()()


if __name__ == "__main__":
    sys.exit(main())
