"""What all commands stand on: one parser, whose refusals are one sentence, and one check of an output folder."""

import dataclasses
import importlib

import pytest

from tests.training.test_rooms import MODULES, file_of
from tests.training.tiny import call, failure, snapshot
from training.support.errors import UserError
from training.support.files import output_folder
from training.support.parser import Parser


COMMANDS = [
    module
    for module in MODULES
    if "\ndef main():\n" in file_of(module).read_text(encoding="utf-8") and module != "training.__main__"
]


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_has_a_help_and_refuses_in_a_sentence(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(module).main
    with pytest.raises(SystemExit) as exit:
        call(main, "--help")
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and printed.startswith(f"usage: python -m {module} ")
    assert failure(capsys, main, "--nothing=1").endswith(".")
    assert not snapshot(tmp_path)


def test_there_is_one_parser():
    sources = {module: file_of(module).read_text(encoding="utf-8") for module in MODULES}
    assert [module for module, text in sources.items() if "ArgumentParser" in text] == ["training.support.parser"]


@dataclasses.dataclass
class Fields:
    """Fields of a test."""

    number: int = dataclasses.field(default=3, metadata={"help": "A number."})
    word: str | None = dataclasses.field(default=None, metadata={"help": "A word."})
    flag: bool = dataclasses.field(default=False, metadata={"help": "A flag."})


def test_help_tells_defaults_that_there_are(capsys):
    parser = Parser({"fields": Fields}, "training.test", "What\n    it does.")
    parser.add_argument("--other", default=1, help="another (default: none)")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    printed = capsys.readouterr().out
    assert "What\n    it does." in printed and "\nfields:\n" in printed
    assert "A number. (default: 3)" in printed and "another (default: none)\n" in printed
    assert "A word.\n" in printed and "A flag.\n" in printed
    for arguments, words in (
        (["--num=4"], "Unrecognized arguments: --num=4"),
        (["--number=x"], "invalid int value: 'x'"),
    ):
        with pytest.raises(UserError, match=words):
            parser.parse_args(arguments)


def test_folder_that_is_written_into(tmp_path):
    folder = tmp_path / "new" / "folder"
    names = ("page.md", "raw.json")

    def checked(own=lambda: False, **options):
        return output_folder(folder, names, own, **options)

    assert checked() == folder and folder.is_dir()
    (folder / "other.txt").write_text("mine")
    assert checked() == folder
    (folder / "raw.json").write_text("mine")
    for own in (lambda: False, lambda: {}["title"], lambda: int("x")):
        with pytest.raises(
            UserError, match="which has a raw.json that this command did not write: choose another folder"
        ):
            checked(own)
    assert checked(lambda: True) == checked(lambda: True, overwrite=True) == folder
    with pytest.raises(UserError, match="which holds results: choose another, or pass --overwrite"):
        checked(lambda: True, overwrite=False)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"other.txt": "mine", "raw.json": "mine"}
    with pytest.raises(UserError, match="cannot be created"):
        output_folder(folder / "raw.json" / "below", names, lambda: True)
