"""The page to explore: its data is what the model draws, whatever the text is, and a browser shows it."""

import errno
import json
import re
import shutil
import subprocess
from base64 import b64decode
from html import unescape
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_dca import DCAConfig, DCAForCausalLM, DCAForImageClassification, DCAVisionConfig
from tests.training.results.test_depth_weights import entries_by_hand, model_of, vision_model, whole_weight
from tests.training.tiny import call, failure, image, need_image_processors, snapshot
from training import depth_weights as command
from training.results import page
from training.results.hub import published_files
from training.text.task import pieces


TEXT = "deep cross attention größe 日本 🙂 layer\n\tsum"
HOSTILE = "</script><script>document.title='hit'</script><!--<script> &lt; ]]> ' \" \\ \u2028 {{ 1 }} ${x}\0"


@pytest.fixture
def bokeh():
    pytest.importorskip("bokeh", reason="bokeh draws the maps of pages")


@pytest.fixture
def saved(room, comparison):
    """The current folder, with checkpoints that have a tokenizer, and the folder of a finished run."""
    tokenizer = AutoTokenizer.from_pretrained(comparison[0] / "run")
    for name, scheme, last_k in (
        ("dca", "dca", None),
        ("k", "dca", 1),
        ("v2", "grn_v2", None),
        ("standard", "standard", None),
    ):
        model_of(scheme, last_k, vocab_size=300).save_pretrained(name)
        tokenizer.save_pretrained(name)
    shutil.copytree(comparison[0] / "run", room / "run")
    return room


class Scripts(HTMLParser):
    """The scripts of a page by id, and what it takes from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.found, self.elsewhere, self.id = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elsewhere += [attributes[name] for name in ("src", "href") if name in attributes]
        self.elsewhere += [tag] if tag in ("link", "iframe", "object") else []
        if tag == "script":
            self.found.append([attributes.get("id"), ""])
            self.id = tag

    def handle_endtag(self, tag):
        self.id = None if tag == "script" else self.id

    def handle_data(self, data):
        if self.id:
            self.found[-1][1] += data


def read_page(file):
    scripts = Scripts(Path(file).read_text(encoding="utf-8"))
    assert scripts.elsewhere == []  # nothing comes from a network
    return json.loads(dict(scripts.found)["data"])


def shown(checkpoint, text=TEXT, file="page.html"):
    call(command.main, checkpoint, "--page", file, "--text", text, "--device=cpu")
    return read_page(file)


def text_of(tokens):
    """The text that tokens are pieces of, where it has no brackets of its own."""
    parts = [re.fullmatch(r"(.*?)(?: \((\d)/\d\))?", each, flags=re.DOTALL).groups() for each in tokens]
    return "".join(part for part, number in parts if number in (None, "1"))


@torch.no_grad()
def assert_is_drawn(data, model, inputs):
    """Each weight, band and size of each token in the data, against the formula in float64."""
    outputs = [
        (model.model.embed_tokens if hasattr(model.model, "embed_tokens") else model.model.embeddings)(
            *inputs.values()
        )
    ]
    hooks = [
        layer.register_forward_hook(lambda layer, args, results: outputs.append(results[-1]))
        for layer in model.model.layers
    ]
    model.eval()(**inputs)
    for hook in hooks:
        hook.remove()
    step, sizes = data["gate_step"], {tuple(each["outputs"]): each["size"] for each in data["sizes"]}
    largest = 0.0
    assert [draw["block"] for draw in data["draws"]] == list(range(1, len(model.model.layers) + 1))
    for draw in data["draws"]:
        residual = model.model.layers[draw["block"] - 1].residual
        entries = entries_by_hand(draw["block"], model.config.last_k)
        assert draw["outputs"] == [[entry[0], entry[-1]] for entry in entries]
        for place, entry in enumerate(entries):
            tokens = sum(outputs[output] for output in entry)[0]
            found = sizes[entry[0], entry[-1]]
            assert found == pytest.approx(tokens.double().square().mean(-1).sqrt().tolist(), rel=1e-3)
            for index in range(len(data["inputs"])):
                whole = whole_weight(residual, index, place, tokens)[0].expand(-1, tokens.shape[-1]).numpy()
                gates = np.array(draw["gate"][index][place])
                assert gates.dtype.kind == "i" and len(gates) == len(data["tokens"]) == len(whole)
                largest = max(largest, gates.max() * step)
                for key, expected in (
                    ("b", whole.mean(-1)),
                    *(zip(("low", "high"), np.quantile(whole, [0.05, 0.95], axis=-1))),
                ):
                    apart = np.abs(draw[key][index][place] + step * gates - expected)
                    assert apart.max() <= step / 2 + 2e-6 * max(1, np.abs(expected).max()), (key, apart.max())
    if model.model.layers[0].residual.gate is not None:
        assert 0 < step <= largest / 10_000 * (1 + 1e-6)
    return largest


@pytest.mark.parametrize("checkpoint", ["dca", "k", "v2"])
def test_data_is_what_the_model_draws(saved, bokeh, checkpoint):
    data = shown(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert data["unit"] == "token" and len(data["tokens"]) == ids.shape[1]
    assert data["inputs"] == (["q, k, v"] if checkpoint == "v2" else ["q", "k", "v"])
    assert data["model"] == checkpoint and data["last_k"] == (1 if checkpoint == "k" else None)
    largest = assert_is_drawn(data, DCAForCausalLM.from_pretrained(checkpoint), {"input_ids": ids})
    assert (largest == 0) == (checkpoint == "v2")


@pytest.mark.parametrize("prefix", [False, True])
def test_patches_of_an_image(room, bokeh, prefix):
    need_image_processors()
    from training.images.task import image_processor

    model = vision_model()
    if prefix:
        config = {**model.config.to_dict(), "pooling": "cls", "num_register_tokens": 2, "image_size": [8, 12]}
        model = DCAForImageClassification(DCAVisionConfig(**{k: v for k, v in config.items() if k != "architectures"}))
        for name, parameter in model.named_parameters():
            if name.endswith(("delta", "gate")):
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained("vision")
    processor = image_processor(model.config, None)
    processor.save_pretrained("vision")
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)
    Image.fromarray(pixels).save("picture.png")
    call(command.main, "vision", "--page=page.html", "--image=picture.png", "--device=cpu")
    data = read_page("page.html")
    columns = 3 if prefix else 2
    patches = [f"row {row}, column {column}" for row in (1, 2) for column in range(1, columns + 1)]
    assert data["tokens"] == (["class token", "register 1", "register 2"] if prefix else []) + patches
    assert data["unit"] == "patch" and data["grid"] == [2, columns]
    assert_is_drawn(data, model, dict(processor(Image.open("picture.png"), return_tensors="pt")))
    if prefix:
        # The picture is what the model sees: of its own size, the file's pixels.
        view = json.loads(dict(Scripts(Path("page.html").read_text()).found)["view"])
        with Image.open(BytesIO(b64decode(view["picture"].partition(",")[2]))) as picture:
            assert np.abs(np.asarray(picture).astype(int) - pixels).max() <= 1


def test_any_text_is_data(saved, bokeh):
    """Nothing in a text ends the script that it stands in, or becomes part of the page."""
    call(command.main, "dca", "--page=harmless.html", "--text=harmless")
    data = shown("dca", HOSTILE)
    assert text_of(data["tokens"]) == HOSTILE
    harmless, hostile = (Scripts(Path(f"{name}.html").read_text(encoding="utf-8")) for name in ("harmless", "page"))
    assert [name for name, _ in harmless.found] == [name for name, _ in hostile.found]
    for name in (None, "map-items"):
        kept = [[text for id, text in each.found if id == name] for each in (harmless, hostile)]
        assert [len(re.sub(r'"id":"[^"]*"', "", text)) for text in kept[0]] == [
            len(re.sub(r'"id":"[^"]*"', "", text)) for text in kept[1]
        ]
    assert "title='hit'" not in re.sub(r"<script.*?</script>", "", Path("page.html").read_text(), flags=re.DOTALL)


def test_any_token_is_data(tmp_path, bokeh):
    """The same where all of it is one token, and in the name of the model."""
    found = []
    for name, token in (("model", "token"), ("</title><script>alert(1)</script>", HOSTILE)):
        draws = draws_of(2, 2)
        data = page.page_data(name, DCAConfig(num_hidden_layers=2), page.Example({}, "token", [token, "x"]), draws)
        page.write_page(data, draws, None, tmp_path / "page.html")
        assert read_page(tmp_path / "page.html") == json.loads(json.dumps(data))
        found.append([id for id, _ in Scripts((tmp_path / "page.html").read_text(encoding="utf-8")).found])
    assert found[0] == found[1]


def test_name_of_a_model_is_text(saved, bokeh):
    Path("dca").rename("<img src=x>&")
    assert shown("<img src=x>&")["model"] == "<img src=x>&"


def test_pieces_of_characters(saved):
    tokenizer = AutoTokenizer.from_pretrained("dca")
    for text in (TEXT, "🙂🙂", "é", "a🙂"):
        ids = tokenizer(text)["input_ids"]
        found = pieces(tokenizer, ids)
        assert len(found) == len(ids) and not any("\ufffd" in each for each in found), found
        assert text_of(found) == text
    # A text may end within a character.
    assert len(pieces(tokenizer, tokenizer("日")["input_ids"][:-1])) == len(tokenizer("日")["input_ids"]) - 1 > 0


def test_special_tokens_in_a_text_are_text(saved, bokeh):
    data = shown("dca", "a<|endoftext|>b")
    assert len(data["tokens"]) > 3 and "".join(data["tokens"]) == "a<|endoftext|>b"


def draws_of(layers, tokens, scale=1.0):
    torch.manual_seed(0)
    return [
        {
            "outputs": [(i, i) for i in range(block)],
            "b": 1 + 0.1 * torch.randn(3, block, 8, dtype=torch.float64),
            "gate": scale * torch.rand(3, block, tokens, dtype=torch.float64),
            "size": torch.rand(block, tokens, dtype=torch.float64),
        }
        for block in range(1, layers + 1)
    ]


def test_page_of_many_layers_and_tokens_can_be_sent(tmp_path, bokeh):
    """48 layers, 200 tokens, and gates of which none is shut."""
    draws = draws_of(48, 200)
    example = page.Example({}, "token", ["word "] * 200)
    data = page.page_data("large", DCAConfig(num_hidden_layers=48), example, draws)
    page.write_page(data, draws, None, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 6e6
    assert read_page(tmp_path / "page.html") == json.loads(json.dumps(data))


@pytest.mark.parametrize("scale", [1e-9, 0.001, 0.02, 1.0, 9.99, 1e6])
def test_gates_of_any_size_are_told_apart(scale):
    draws = draws_of(2, 50, scale)
    data = page.page_data("model", DCAConfig(), page.Example({}, "token", ["x"] * 50), draws)
    step, largest = data["gate_step"], max(draw["gate"].max().item() for draw in draws)
    assert largest / 100_000 < step <= largest / 10_000 * (1 + 1e-9)
    for draw, found in zip(draws, data["draws"]):
        assert np.abs(step * np.array(found["gate"]) - draw["gate"].numpy()).max() <= step / 2 * (1 + 1e-9)
        assert np.allclose(found["b"], draw["b"].mean(-1), rtol=1e-6)


def test_shut_gates_are_zero():
    data = page.page_data("model", DCAConfig(), page.Example({}, "token", ["x"] * 5), draws_of(2, 5, 0.0))
    assert not np.any(data["draws"][1]["gate"]) and data["gate_step"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dca", "--page=page.html"], "'dca' is a model of texts: --page takes --text"),
        (
            ["dca", "--page=page.html", "--image=x.png"],
            "'dca' is a model of texts: --page takes --text, not --image",
        ),
        (["dca", "--page=page.html", "--text=a", "--image=x.png"], "not --image"),
        (["dca", "--page=page.html", "--text="], "`text` has no tokens"),
        (["dca", "--page=page.html", "--text=\udcff"], "`text` has in 'text' the character '\\udcff' at position 0"),
        (["dca", "--page=page.txt", "--text=a"], "`page` is 'page.txt', which browsers do not open as a page"),
        (["dca", "--page=run", "--text=a"], "`page` is 'run', which browsers do not open"),
        (
            ["dca", "--page=mine.html", "--text=a"],
            "`page` is 'mine.html', which exists and this command did not write",
        ),
        (
            ["dca", "--page=folder.html", "--text=a"],
            "`page` is 'folder.html', which cannot be written: Is a directory",
        ),
        (["dca", "--page=mine.html/page.html", "--text=a"], "which cannot be written: "),
        (["dca", "k", "--page=page.html", "--text=a"], "--page shows one model, but 2 are given"),
        (["dca", "--text=a", "--output_dir=new"], "--text and --image need --page"),
        (["dca", "--image=a", "--output_dir=new"], "--text and --image need --page"),
        (["dca"], "required: --output_dir or --page"),
        (["dca", "--page=page.html", "--text=a", "--times_size"], "--output_dir, which is missing"),
        (["dca", "--page=page.html", "--text=a", "--without=1"], "--output_dir, which is missing"),
        (["dca", "--page=page.html", "--text=a", "--eval_dataset=x.jsonl"], "Unrecognized arguments: --eval_dataset"),
        (["dca", "--page=page.html", "--text=a", "--tokenizer=nowhere"], "`tokenizer` is 'nowhere'"),
        (["dca", "--page=page.html", "--text=a", "--device=none"], "'dca' cannot be shown"),
        (["standard", "--page=page.html", "--text=a"], "'standard' has no generalized residuals"),
        (["llama", "--page=page.html", "--text=a"], "'llama' has no generalized residuals"),
        (["gone", "--page=page.html", "--text=a"], "'gone' is not a local folder"),
        (["nan", "--page=page.html", "--text=a"], "'nan' has weights that are NaN or infinite"),
        (["learned", "--page=page.html", "--text=aaaaaaaaaaaa"], "takes at most 4"),
    ],
    ids=lambda value: (
        None
        if isinstance(value, str)
        else "-".join(each.lstrip("-") for each in value).encode("ascii", "replace").decode()
    ),
)
def test_what_cannot_be_shown(saved, bokeh, capsys, arguments, words):
    Path("mine.html").write_text("<!DOCTYPE html><p>mine")
    Path("folder.html").mkdir()
    tokenizer = AutoTokenizer.from_pretrained("dca")
    sizes = {"vocab_size": 300, "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    if arguments[0] == "llama":
        LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=8)).save_pretrained("llama")
    if arguments[0] == "nan":
        model = model_of("dca", vocab_size=300)
        model.model.layers[1].residual.gate.data[0, 0] = torch.nan
        model.save_pretrained("nan")
        tokenizer.save_pretrained("nan")
    if arguments[0] == "learned":
        DCAForCausalLM(DCAConfig(**sizes, position_embedding="learned", max_position_embeddings=4)).save_pretrained(
            "learned"
        )
        tokenizer.save_pretrained("learned")
    before = snapshot(saved)
    line = failure(capsys, command.main, *arguments)
    assert words in line
    assert snapshot(saved) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text=a"], "'vision' is a model of images: --page takes --image"),
        (["--image=gone.png"], "`image` is 'gone.png', which cannot be read"),
        (["--image=text.png"], "`image` is 'text.png', which cannot be read"),
    ],
)
def test_images_that_cannot_be_shown(room, bokeh, capsys, arguments, words):
    vision_model().save_pretrained("vision")
    Path("text.png").write_text("no image")
    assert words in failure(capsys, command.main, "vision", "--page=page.html", *arguments)
    image(3, channels=3).save("picture.png")
    assert "'vision' cannot be shown" in failure(
        capsys, command.main, "vision", "--page=page.html", "--image=picture.png"
    )  # (it has no image processor)
    assert not Path("page.html").exists()


def test_page_without_bokeh(saved, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bokeh", None)
    line = failure(capsys, command.main, "dca", "--page=page.html", "--text=a")
    assert "`page` needs bokeh: install it with `pip install bokeh`." in line


def test_text_too_long_for_a_page(saved, bokeh, capsys, monkeypatch):
    monkeypatch.setattr(page, "MOST_GATES", 3 * (1 + 2 + 3 + 4) * 5)
    shown("dca", "aaaaa" if len(AutoTokenizer.from_pretrained("dca")("aaaaa")["input_ids"]) == 5 else "a")
    line = failure(capsys, command.main, "dca", "--page=page.html", f"--text={TEXT}")
    assert "tokens, but a page of 'dca' holds at most 5: give a smaller text." in line


def test_page_is_replaced_and_kept_on_a_full_disk(saved, bokeh, capsys, monkeypatch):
    shown("dca", "first", "new/page.html")
    assert "".join(shown("k", "second", "new/page.html")["tokens"]) == "second"
    before = Path("new/page.html").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(page, "write_whole", full)
    line = failure(capsys, command.main, "dca", "--page=new/page.html", "--text=third")
    assert "`page` is 'new/page.html', which cannot be written: No space left on device." in line
    assert Path("new/page.html").read_bytes() == before


def test_page_beside_the_figures(saved, bokeh):
    data = ("--eval_dataset=held_out.jsonl", "--block_size=8", "--device=cpu")
    call(command.main, "dca", "--output_dir=result", "--page=result/page.html", "--text=a b", *data)
    assert "".join(read_page("result/page.html")["tokens"]) == "a b"
    assert Path("result/depth_weights.json").exists()


def test_card_links_to_the_page(saved, bokeh, capsys):
    before = Path("run/README.md").read_text()
    shown("run", "elsewhere", "page.html")
    assert Path("run/README.md").read_text() == before and "links to it" not in capsys.readouterr().out
    shown("run", "here", "run/page.html")
    assert "The model card links to it." in capsys.readouterr().out
    linked = Path("run/README.md").read_text()
    assert [line for line in linked.splitlines() if line not in before.splitlines()] == [
        "[A page to explore](page.html) shows what each block draws, token by token: download it and open it in a browser."
    ]
    assert re.search(r"\(depth_weights\.png\)\n\n\[A page to explore\]\(page\.html\)", linked)
    assert "page.html" in published_files(Path("run"))
    # One page at a time, the last; what the card does not link to is not published.
    shown("run", "again", "run/page.html")
    assert Path("run/README.md").read_text() == linked
    shown("run", "another", "run/other.html")
    assert Path("run/README.md").read_text() == linked.replace("(page.html)", "(other.html)")
    assert "other.html" in published_files(Path("run")) and "page.html" not in published_files(Path("run"))
    # It tells no path.
    assert str(saved) not in Path("run/other.html").read_text()


# In a browser

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
#: What a reader does, and what the page then shows.
READER = """
<script>
(async () => {
  const wait = async () => { for (let i = 0; i < 3; i++) await new Promise(resolve => requestAnimationFrame(() => setTimeout(resolve, 30))); };
  const failed = []; addEventListener("error", event => failed.push(event.message)); addEventListener("unhandledrejection", event => failed.push(String(event.reason)));
  while (document.documentElement.dataset.ready !== "yes" && !failed.length) await new Promise(resolve => setTimeout(resolve, 50));
  const seen = [], key = (name, more = {}) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true, cancelable: true, ...more}));
  const record = what => seen.push({
    what, title: document.title, chosen: {...chosen}, of: document.getElementById("of").textContent,
    selected: [...document.querySelectorAll("[aria-selected=true]")].map(each => each.id),
    cell: document.getElementById("cell").textContent,
    table: [...document.querySelectorAll("#rows tr")].map(row => [...row.children].map(each => each.textContent)),
    maps: maps.map(({source}) => [source.data.block, source.data.entry, source.data.weight].map(column => [...column])),
    focus: document.activeElement.id || document.activeElement.dataset.cell,
    canvases: maps.length && [...document.querySelectorAll("#maps > div")].map(each => each.getBoundingClientRect().height),
    background: getComputedStyle(document.body).backgroundColor, wide: document.documentElement.scrollWidth > innerWidth,
  });
  try {
    await wait(); record("start");
    key("Home"); await wait(); record("Home");
    key("ArrowRight"); await wait(); record("ArrowRight");
    key("m"); await wait(); record("m");
    key("m"); await wait();
    for (let i = 0; i < 9; i++) key("ArrowDown");
    await wait(); record("ArrowDown");
    key("ArrowUp"); await wait(); record("ArrowUp");
    if (data.grid) { key("Home"); key("ArrowDown", {shiftKey: true}); await wait(); record("Shift"); }
    const third = document.getElementById("token-2");
    third.dispatchEvent(new PointerEvent("pointerover", {bubbles: true})); await wait(); record("pointed");
    document.getElementById("tokens").dispatchEvent(new PointerEvent("pointerleave")); await wait(); record("left");
    third.click(); await wait(); record("clicked");
    (document.querySelector('[data-cell="0-1"]') ?? document.querySelector('[data-cell="0-0"]')).focus();
    document.activeElement.click(); await wait(); record("cell");
    maps[maps.length - 1].source.selected.indices = [0]; await wait(); record("map");
    document.getElementById("all").click(); await wait(); record("all");
    const blob = await (await fetch(document.getElementById("download").href)).text();
    seen.push({what: "download", same: blob === document.getElementById("data").textContent, name: document.getElementById("download").download});
  } catch (error) { failed.push(String(error.stack)); }
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify({failed, seen});
  document.body.append(result);
})();
</script>
"""


def read_in_browser(file, tmp_path, *options):
    """What a reader sees, by what was done."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"there is no browser here ({', '.join(BROWSERS)})")
    copy = tmp_path / "read.html"
    # (A browser that shows its page to nobody draws no frames.)
    frames = "<head><script>requestAnimationFrame = draw => setTimeout(() => draw(performance.now()), 16)</script>"
    text = Path(file).read_text(encoding="utf-8").replace("<head>", frames, 1).replace("</body>", f"{READER}</body>")
    copy.write_text(text, encoding="utf-8")
    completed = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=60000",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,1400", *options, "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    found = re.search(r'<pre id="result">(.*?)</pre>', completed.stdout, flags=re.DOTALL)
    assert found, completed.stderr[-2000:]
    result = json.loads(unescape(found[1]))
    assert result["failed"] == []
    return {each["what"]: each for each in result["seen"]}


def weight_of(data, block, index, entry, token):
    draw = data["draws"][block - 1]
    gates = draw["gate"][index][entry]
    return draw["b"][index][entry] + data["gate_step"] * (np.mean(gates) if token is None else gates[token])


def assert_shows(data, state, block, token):
    """Table and maps have the figures of the data."""
    assert len(state["table"]) == len(data["draws"][block - 1]["outputs"])
    for entry, row in enumerate(state["table"]):
        for index in range(len(data["inputs"])):
            assert float(row[2 + 4 * index]) == pytest.approx(weight_of(data, block, index, entry, token), abs=6e-5)
    assert len(state["maps"]) == len(data["inputs"])
    for index, columns in enumerate(state["maps"]):
        assert len(columns[0]) == sum(len(draw["outputs"]) for draw in data["draws"])
        for of_block, entry, weight in zip(*columns):
            assert weight == pytest.approx(weight_of(data, of_block, index, entry, token), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["dca", "k", "v2"])
def test_reader_of_a_text(saved, bokeh, tmp_path, checkpoint):
    data = shown(checkpoint, TEXT + HOSTILE)
    seen = read_in_browser("page.html", tmp_path, "--blink-settings=preferredColorScheme=1")
    last = len(data["draws"])
    first = seen["start"]
    assert first["title"] == f"What {checkpoint} draws, token by token" and first["focus"] == "tokens"
    assert min(first["canvases"]) > 150 and not first["wide"]
    assert_shows(data, first, first["chosen"]["block"], first["chosen"]["token"])
    block = first["chosen"]["block"]
    assert_shows(data, seen["Home"], block, 0)
    assert_shows(data, seen["ArrowRight"], block, 1)
    assert seen["ArrowRight"]["selected"] == ["token-1"]
    assert_shows(data, seen["m"], block, None)
    assert "the mean of" in seen["m"]["of"] and seen["m"]["selected"] == []
    assert_shows(data, seen["ArrowDown"], last, 1)
    assert_shows(data, seen["ArrowUp"], last - 1, 1)
    assert f"Block {last - 1} of {last}, token 1" in seen["ArrowUp"]["of"]
    assert_shows(data, seen["pointed"], last - 1, 2)
    assert_shows(data, seen["left"], last - 1, 1)
    assert_shows(data, seen["clicked"], last - 1, 2)
    chosen = seen["cell"]["chosen"]
    assert (chosen["block"], chosen["input"], chosen["entry"]) == (last - 1, 0, 1) and seen["cell"]["focus"] == "0-1"
    chosen = seen["map"]["chosen"]
    assert (chosen["block"], chosen["input"], chosen["entry"]) == (1, len(data["inputs"]) - 1, 0)
    assert_shows(data, seen["all"], 1, None)
    assert seen["download"]["same"] and seen["download"]["name"] == f"{checkpoint}.json"


@pytest.mark.slow
def test_reader_of_an_image_in_the_dark(room, bokeh, tmp_path):
    need_image_processors()
    from training.images.task import image_processor

    model = vision_model()
    model.save_pretrained("vision")
    image_processor(model.config, None).save_pretrained("vision")
    image(3, channels=3).save("picture.png")
    call(command.main, "vision", "--page=page.html", "--image=picture.png", "--device=cpu")
    data = read_page("page.html")
    seen = read_in_browser("page.html", tmp_path, "--blink-settings=preferredColorScheme=0")
    assert seen["Shift"]["selected"] == ["token-2"]
    assert "row 2, column 1" in seen["Shift"]["of"]
    assert_shows(data, seen["clicked"], seen["clicked"]["chosen"]["block"], 2)
    assert seen["start"]["background"] == "rgb(21, 24, 29)"


@pytest.mark.slow
def test_reader_of_a_large_page(bokeh, tmp_path):
    """200 tokens and 48 layers can be moved through."""
    draws = draws_of(48, 200)
    data = page.page_data("large", DCAConfig(), page.Example({}, "token", ["word "] * 200), draws)
    page.write_page(data, draws, None, tmp_path / "page.html")
    seen = read_in_browser(tmp_path / "page.html", tmp_path)
    assert_shows(data, seen["ArrowDown"], min(48, seen["start"]["chosen"]["block"] + 9), 1)
