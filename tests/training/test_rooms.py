"""The rooms of `training/`: imports run downhill, and commands are imported by nobody."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


TRAINING = Path(__file__).parents[2] / "training"
#: From below; rooms of one floor know nothing of each other.
FLOORS = [
    {"support"},
    {"data", "variants"},
    {"results"},
    {"run"},
    {"text", "images"},
    {"studies", "benchmarks"},
]
#: What lies in `training/` itself is commands, on top of all.
TOP = len(FLOORS)


def name_of(file: Path) -> str:
    parts = file.relative_to(TRAINING.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def file_of(module: str) -> Path:
    file = TRAINING.parent / f"{module.replace('.', '/')}.py"
    return file if file.exists() else file.with_suffix("") / "__init__.py"


MODULES = {name_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in sorted(TRAINING.rglob("*.py"))}


def room_of(module: str) -> str | None:
    """The room that a module is in, or `None` for what lies in `training/` itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (TRAINING / parts[-1]).is_dir() else None


def floor_of(module: str) -> int:
    room = room_of(module)
    return TOP if room is None else next(index for index, rooms in enumerate(FLOORS) if room in rooms)


def imports(module: str) -> Iterator[str]:
    """The modules of `training` that one imports, wherever in it that is."""
    package = (
        module if module + ".__init__" in MODULES or (TRAINING.parent / module.replace(".", "/")).is_dir() else ""
    )
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "training")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                inside = (package or module.rpartition(".")[0]).split(".")
                base = ".".join([*inside[: len(inside) - node.level + 1], *filter(None, [node.module])])
            if base.split(".")[0] == "training":
                names = [f"{base}.{alias.name}" for alias in node.names]
                yield from (name if name in MODULES else base for name in names)


EDGES = [(module, imported) for module in MODULES for imported in imports(module) if imported != module]


def test_all_that_is_imported_is_there():
    """A module of `training` that the reading below does not know would be checked for nothing."""
    assert EDGES
    assert [edge for edge in EDGES if edge[1] not in MODULES] == []


def test_every_room_has_a_floor():
    rooms = {room_of(module) for module in MODULES} - {None}
    assert rooms == set().union(*FLOORS)


def test_imports_run_downhill():
    uphill = [
        (module, imported)
        for module, imported in EDGES
        if room_of(module) != room_of(imported) and floor_of(imported) >= floor_of(module)
    ]
    assert uphill == []


def test_commands_are_imported_by_nobody():
    run = [module for module in MODULES if "\nif __name__ ==" in file_of(module).read_text(encoding="utf-8")]
    top = [module for module in MODULES if room_of(module) is None and module != "training"]
    assert {"training.causal_lm", "training.benchmarks.images"} < set(run) and set(top) <= set(run)
    assert [edge for edge in EDGES if edge[1] in run] == []


def test_commands_are_listed():
    completed = subprocess.run(
        [sys.executable, "-m", "training"], capture_output=True, text=True, check=True, cwd=TRAINING.parent
    )
    listed = dict(line.removeprefix("python -m ").split(maxsplit=1) for line in completed.stdout.splitlines())
    assert {"training.causal_lm", "training.evaluate", "training.compare", "training.benchmarks.run"} < listed.keys()
    assert all(
        f"training.{file.stem}" in listed for file in TRAINING.glob("*.py") if file.stem.strip("_") == file.stem
    )
    assert listed["training.causal_lm"] == "Train a DCA language model"


def test_no_module_imports_itself_by_way_of_others():
    known = {module: {imported for one, imported in EDGES if one == module} for module in MODULES}
    done, circles = set(), []

    def visit(module: str, way: tuple[str, ...]):
        if module in way:
            circles.append(way[way.index(module) :])
        elif module not in done:
            for imported in known.get(module, ()):
                visit(imported, (*way, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
    assert circles == []
