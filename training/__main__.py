"""`python -m training` lists the commands."""

import ast
from pathlib import Path


def commands() -> dict[str, str]:
    """The modules that run as `python -m NAME`, with the first sentence of their docstrings."""
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
