"""What the project tells others of itself: packages, citation, and what runs on a change, checked as files."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: What is imported only where the program has it already, or by name.
OPTIONAL = {"deep_cross_attention", "peft", "triton", "torch_xla", "fla", "einops"}


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def distribution(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def imported(folder):
    """The packages of others that the modules of a folder import, wherever in them that is."""
    found = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"modeling_dca", "training", "tests"} - OPTIONAL


def distributions(packages):
    names = packages_distributions()
    return {name.lower().replace("_", "-") for package in packages for name in names[package]}


def test_what_the_library_and_the_commands_import_is_required():
    library = {distribution(each) for each in PROJECT["dependencies"]}
    training = {distribution(each) for each in PROJECT["optional-dependencies"]["training"]}
    # transformers requires what it uses of these itself; Pillow and its images are optional in the library.
    brought = {"huggingface-hub", "pillow", "numpy", "typer"}
    assert distributions(imported("modeling_dca")) - library <= brought
    # datasets, and protobuf tensorboard, bring what they hand on.
    assert distributions(imported("training")) - library - training <= {"fsspec", "protobuf", "pyarrow", "tqdm"}


def test_what_is_required_is_in_the_tested_environments():
    for file in ("constraints.txt", "constraints-oldest.txt"):
        pinned = {distribution(line) for line in (ROOT / file).read_text().splitlines() if "==" in line}
        for extra in ("training", "test"):
            required = {distribution(each) for each in PROJECT["optional-dependencies"][extra]}
            assert required - pinned - {"modeling-dca"} == set(), file


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert f"## {PROJECT['version']}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    paper, readme = citation["preferred-citation"], (ROOT / "README.md").read_text(encoding="utf-8")
    assert paper["title"] in readme and paper["url"] in readme and paper["url"] in PROJECT["urls"].values()
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in readme


def targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_the_workflow_runs_what_there_is():
    workflow = read_yaml(".github/workflows/tests.yml")
    # (YAML reads the key `on` as true.)
    assert {"push", "pull_request"} <= workflow[True].keys()
    (job,) = workflow["jobs"].values()
    asked = job["strategy"]["matrix"]["target"]
    assert {"lint", "test"} <= set(asked) <= targets()
    assert job["steps"][-1] == {"run": "make ${{ matrix.target }}"}
    python = next(step["with"]["python-version"] for step in job["steps"] if "with" in step)
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]


def test_pre_commit_runs_the_linter_that_is_pinned():
    pinned = re.search(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[0]
    hooks = [hook for repo in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert [hook["entry"].split()[:2] for hook in hooks] == [["ruff", "check"], ["ruff", "format"]]
    assert all(hook["additional_dependencies"] == [pinned] for hook in hooks)


ROOMS = ("configuration", "model_cards", "modeling_dca", "tests", "training")
FILES = {
    file.relative_to(ROOT).as_posix()
    for file in (*ROOT.glob("*.*"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.*")))
}
#: What is named in pages and comments and made by a command.
MADE = {"run.yaml"}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in plain}


def is_there(name: str, folder: Path) -> bool:
    """Whether a name is that of a file, as seen from a folder, or the end of a path in some room."""
    return (folder / name).exists() or any(f"/{file}".endswith(f"/{name}") for file in FILES)


@pytest.mark.parametrize("page", sorted(file for file in FILES if file.endswith(".md")))
def test_every_link_of_a_page_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    folder = (ROOT / page).parent
    for link in re.findall(r"(?<=\]\()[^)\s]+|(?<=src=\")[^\"]+|(?<=srcset=\")[^\"]+", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"`([\w./-]+\.(?:cff|jinja|md|py|sbatch|toml|txt|yaml))`", text):
        assert name in MADE or is_there(name, folder), name


def test_every_file_that_a_configuration_names_exists():
    for file in (ROOT / "configuration").rglob("*.yaml"):
        comments = "\n".join(re.findall(r"#.*", file.read_text(encoding="utf-8")))
        for name in re.findall(r"[\w./-]+\.(?:md|py|yaml)\b", comments):
            assert name in MADE or is_there(name, file.parent), (file, name)
