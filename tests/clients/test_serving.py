"""transformers' server: what it sends, whole and as a stream, is what `generate` gives."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

from tests.clients.tools import ROOT, ask, served, streamed


pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
PROMPT = "def rms_norm(hidden_states"
TOKENS = 12


@pytest.mark.parametrize("options", [[], ["--continuous-batching"]], ids=["one by one", "continuous batching"])
def test_transformers_server(checkpoint, tmp_path, options):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": "user", "content": PROMPT}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**chat, max_new_tokens=TOKENS, do_sample=False)[0, chat["input_ids"].shape[1] :]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(expected.strip()) > 4
    command = ("-m", "modeling_dca", "transformers", "serve", checkpoint, "--device", "cpu", *options)
    with served(tmp_path, *command, PYTHONPATH=str(ROOT)) as address:
        question = {"model": checkpoint, "messages": messages, "temperature": 0, "max_tokens": TOKENS}
        (whole,) = ask(address, "/v1/chat/completions", **question)
        assert json.loads(whole)["choices"][0]["message"]["content"] == expected
        pieces = streamed(ask(address, "/v1/chat/completions", stream=True, **question))
        deltas = [piece["choices"][0]["delta"].get("content") or "" for piece in pieces if piece["choices"]]
        assert "".join(deltas) == expected and sum(map(bool, deltas)) > 1


def test_pipeline_streams(checkpoint, capsys):
    generate = pipeline("text-generation", checkpoint)
    text = generate(PROMPT, max_new_tokens=TOKENS, do_sample=False)[0]["generated_text"]
    capsys.readouterr()
    generate(PROMPT, max_new_tokens=TOKENS, do_sample=False, streamer=TextStreamer(generate.tokenizer))
    assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")
