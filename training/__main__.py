"""`python -m training`: the commands, a line each."""

import ast
from pathlib import Path


def commands() -> dict[str, str]:
    """What is run as `python -m NAME`, by its name, with the first sentence of what it says of itself."""
    root = Path(__file__).parent
    found = {}
    for file in sorted(root.rglob("*.py"), key=lambda file: (len(file.parts), file)):
        text = file.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":\n' in text:
            name = ".".join(file.relative_to(root.parent).with_suffix("").parts)
            found[name] = ast.get_docstring(ast.parse(text)).partition("\n\n")[0].replace("\n", " ").rstrip(":.")
    return found


if __name__ == "__main__":
    listed = commands()
    width = max(map(len, listed))
    for name, line in listed.items():
        if name != "training.__main__":
            print(f"python -m {name.ljust(width)}  {line}")
