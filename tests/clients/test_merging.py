"""mergekit: the average of two models is that of their weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.clients.tools import ROOT, python


pytest.importorskip("mergekit")

CONFIG = """
merge_method: linear
dtype: float32
models:
  - model: {first}
    parameters: {{weight: 0.75}}
  - model: {second}
    parameters: {{weight: 0.25}}
"""


def test_linear_merge(checkpoint, tmp_path):
    first = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(1)
    second = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        for weight in second.parameters():
            weight += 0.02 * torch.randn_like(weight)
    second.save_pretrained(tmp_path / "second")
    (tmp_path / "merge.yaml").write_text(CONFIG.format(first=checkpoint, second=tmp_path / "second"))
    command = ("-m", "modeling_dca", "mergekit-yaml", "merge.yaml", "merged", "--no-copy-tokenizer")
    python(*command, folder=tmp_path, PYTHONPATH=str(ROOT))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    weights, others = first.state_dict(), second.state_dict()
    assert merged.state_dict().keys() == weights.keys()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, 0.75 * weights[name] + 0.25 * others[name])
