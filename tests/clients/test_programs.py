"""ONNX and ExecuTorch: from the default implementation, with and without gradients, the logits that the model has."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers import AutoModelForCausalLM


onnxruntime = pytest.importorskip("onnxruntime")
IDS = torch.arange(2, 20).reshape(2, 9)


class Logits(nn.Module):
    """A function of tensors alone."""

    def __init__(self, checkpoint):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


@pytest.fixture
def logits(checkpoint):
    return Logits(checkpoint)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def run_onnx(file, ids):
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    return torch.from_numpy(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gradients", [True, False])
def test_onnx(logits, tmp_path, gradients):
    sizes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    with torch.set_grad_enabled(gradients):
        program = torch.onnx.export(logits, (IDS,), dynamo=True, verbose=False, dynamic_shapes=sizes)
    program.save(tmp_path / "model.onnx")
    others = torch.arange(3, 39).reshape(3, 12)
    close(run_onnx(tmp_path / "model.onnx", others), logits(others))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["portable", "xnnpack"])
def test_executorch(logits, backend):
    exir = pytest.importorskip("executorch.exir")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.runtime import Runtime

    partitioner = [XnnpackPartitioner()] if backend == "xnnpack" else None
    program = torch.export.export(logits, (IDS,))
    edge = exir.to_edge_transform_and_lower(program, partitioner=partitioner)
    method = Runtime.get().load_program(edge.to_executorch().buffer).load_method("forward")
    others = IDS + 100
    close(method.execute([others])[0], logits(others))
