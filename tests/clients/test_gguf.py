"""GGUF: a Llama's file becomes DCA, which computes what transformers makes of that file."""

import pytest
import torch
from transformers import LlamaForCausalLM

from modeling_dca import DCAForCausalLM


gguf = pytest.importorskip("gguf")
IDS = torch.arange(2, 20).reshape(2, 9)

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of queries and keys as GGUF has them: what rotates together, side by side."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def write(model: LlamaForCausalLM, file) -> None:
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, weight in model.state_dict().items():
        name = name.removesuffix(".weight")
        if name.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if name.endswith("q_proj") else config.num_key_value_heads
            weight = interleaved(weight, heads)
        if name.startswith("model.layers."):
            _, _, layer, part = name.split(".", 3)
            name = f"blk.{layer}.{NAMES[part]}"
        else:
            name = NAMES[name]
        writer.add_tensor(f"{name}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_gguf_file_becomes_dca(checkpoints, tmp_path):
    llama = LlamaForCausalLM.from_pretrained(checkpoints["llama"])
    write(llama, tmp_path / "model.gguf")
    expected = llama.eval()(IDS).logits
    model = DCAForCausalLM.from_residual(tmp_path, gguf_file="model.gguf", last_k=2)
    assert model.config.residual_scheme == "dca"
    torch.testing.assert_close(model.eval()(IDS).logits, expected, rtol=1e-4, atol=1e-4)
