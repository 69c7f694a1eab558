"""
DCA written a second time: slow float64 NumPy, straight from the paper's formulas, for the tests to compare with.

Nothing here calls `modeling_dca` or torch's layers: a model gives its configuration and its weights by name, no more.
"""

import math

import numpy as np


erf = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS = {
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def to_array(tensor):
    return tensor.detach().double().numpy()


def weights_of(model):
    """The weights of a model by name, in float64."""
    return {name: to_array(tensor) for name, tensor in model.state_dict().items()}


def generalized_residuals(stack, delta, gate=None):
    """
    `g = sum_i (b_i + relu(w . n(f_i))) * f_i`, `b = 1 + delta` (section 3.1), one token and one entry at a time; `n` divides by
    the root mean square.
    """
    width = stack[0].shape[-1]
    tokens = [entry.reshape(-1, width) for entry in stack]
    results = np.zeros((len(delta), *tokens[0].shape))
    for output in range(len(delta)):
        for token in range(len(tokens[0])):
            for i, entry in enumerate(tokens):
                f = entry[token]
                relu = 0.0 if gate is None else max(0.0, sum(gate[output] * f) / math.sqrt(np.mean(f**2) + 1e-6))
                results[output, token] += (1 + delta[output, i] + relu) * f
    return [result.reshape(stack[0].shape) for result in results]


def visible_stack(outputs, last_k=None):
    """`G_t` of k-DCA (section 3.1), of `outputs = [f_0, ..., f_{t-1}]`, summed anew from the definition."""
    t = len(outputs)
    if last_k is None or t <= last_k + 1:
        return list(outputs)
    return [outputs[0], sum(outputs[1 : t - last_k]), *outputs[t - last_k :]]


def residual_inputs(config, weights, name, outputs):
    if config.residual_scheme == "standard":
        return [sum(outputs)]
    stack = visible_stack(outputs, config.last_k)
    return generalized_residuals(stack, weights[f"{name}.delta"], weights.get(f"{name}.gate"))


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def norm(config, weights, name, x):
    if config.norm_type == "layer_norm":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
    return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)


def rotate(x, positions, theta, width):
    """Rotary positions: feature `j` and `j + width / 2` of `x` `(sequence, head_dim)` turn by `p * theta^(-2j/width)`."""
    rotated = x.copy()
    for j in range(width // 2):
        angle = positions * theta ** (-2 * j / width)
        first, second = x[:, j], x[:, j + width // 2]
        rotated[:, j] = first * np.cos(angle) - second * np.sin(angle)
        rotated[:, j + width // 2] = second * np.cos(angle) + first * np.sin(angle)
    return rotated


def soft_cap(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def attention(config, weights, name, inputs, positions, allowed):
    """Softmax attention, head by head; `allowed[batch, i, j]` says whether token `i` sees token `j`."""
    query, key, value = (linear(weights, f"{name}.{part}_proj", x) for part, x in zip("qkv", inputs))
    if config.qk_norm == "all_heads":
        query, key = norm(config, weights, f"{name}.q_norm", query), norm(config, weights, f"{name}.k_norm", key)
    query, key, value = (x.reshape(*x.shape[:2], -1, config.head_dim) for x in (query, key, value))
    if config.qk_norm is True:
        query, key = norm(config, weights, f"{name}.q_norm", query), norm(config, weights, f"{name}.k_norm", key)
    result = np.zeros_like(query)
    for batch in range(len(query)):
        for head in range(config.num_attention_heads):
            shared_head = head * config.num_key_value_heads // config.num_attention_heads
            q, k, v = query[batch, :, head], key[batch, :, shared_head], value[batch, :, shared_head]
            if config.position_embedding == "rope":
                theta = config.rope_parameters["rope_theta"]
                width = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
                q, k = (rotate(x, positions[batch], theta, width) for x in (q, k))
            scale = 1 / math.sqrt(config.head_dim) if config.attention_scaling is None else config.attention_scaling
            scores = np.where(allowed[batch], np.exp(soft_cap(q @ k.T * scale, config.attention_softcap)), 0.0)
            result[batch, :, head] = scores / scores.sum(-1, keepdims=True) @ v
    return linear(weights, f"{name}.o_proj", result.reshape(*result.shape[:2], -1))


def feed_forward(config, weights, name, x):
    activation = ACTIVATIONS[config.hidden_act]
    up = linear(weights, f"{name}.up_proj", x)
    up = activation(linear(weights, f"{name}.gate_proj", x)) * up if config.gated_mlp else activation(up)
    return linear(weights, f"{name}.down_proj", up)


def block(config, weights, name, outputs, positions, allowed):
    """
    What a block adds to the network, `f_t` (figure 4), given `outputs = [f_0, ..., f_{t-1}]`; the figure's block has its
    norms before the modules, `N1` and `N2`, and its feed-forward module sees `q + a`.
    """
    before, after = config.norm_placement in ("pre", "sandwich"), config.norm_placement in ("sandwich", "post_module")
    inputs = residual_inputs(config, weights, f"{name}.residual", outputs)
    norms = ["input_layernorm"] * 3
    if config.residual_scheme == "dca":
        norms = ["input_layernorm", "key_layernorm", "value_layernorm"]
    else:
        inputs = inputs * 3
    q = inputs[0]
    if before:
        inputs = [norm(config, weights, f"{name}.{norm_name}", x) for norm_name, x in zip(norms, inputs)]
    a = attention(config, weights, f"{name}.self_attn", inputs, positions, allowed)
    if after:
        a = norm(config, weights, f"{name}.attention_output_norm", a)
    m = q if config.parallel_blocks else q + a
    if before:
        m = norm(config, weights, f"{name}.post_attention_layernorm", m)
    m = feed_forward(config, weights, f"{name}.mlp", m)
    return a + (norm(config, weights, f"{name}.mlp_output_norm", m) if after else m)


def hidden_states(config, weights, f_0, positions, allowed):
    """All blocks and the final norm, of a model whose weights are called `model.*`."""
    outputs = [f_0]
    for layer in range(config.num_hidden_layers):
        outputs.append(block(config, weights, f"model.layers.{layer}", outputs, positions, allowed[layer]))
    (g,) = residual_inputs(config, weights, "model.residual", outputs)
    return norm(config, weights, "model.norm", g)


def sincos(positions, width):
    """Sines, then cosines, of `p / 10000^(i / (width/2 - 1))`."""
    angles = positions[..., None] / 10000 ** (np.arange(width // 2) / (width // 2 - 1))
    return np.concatenate((np.sin(angles), np.cos(angles)), axis=-1)


def causal_lm_logits(model, input_ids, positions=None, visible=None):
    """
    The logits of a language model. `visible[batch, i, j]` (a boolean array) narrows down the causal mask (padding,
    packed sequences); sliding windows come from the configuration.
    """
    config, weights = model.config, weights_of(model)
    batch, length = input_ids.shape
    positions = np.broadcast_to(np.arange(length), (batch, length)) if positions is None else positions.numpy()
    row, column = np.arange(length)[:, None], np.arange(length)[None]
    causal = np.broadcast_to(column <= row, (batch, length, length))
    if visible is not None:
        # A token always sees itself, so that the row of a padding token has a softmax (its result is of no interest).
        causal = causal & (visible | (row == column))
    allowed = [
        causal & (row - column < config.sliding_window) if layer_type == "sliding_attention" else causal
        for layer_type in config.layer_types
    ]

    f_0 = weights["model.embed_tokens.weight"][input_ids.numpy()]
    if config.position_embedding == "learned":
        f_0 = f_0 + weights["model.embed_positions.weight"][positions]
    elif config.position_embedding == "sincos":
        f_0 = f_0 + sincos(positions, config.hidden_size)
    logits = linear(weights, "lm_head", hidden_states(config, weights, f_0, positions, allowed))
    return soft_cap(logits * config.logit_multiplier, config.logit_softcap)


def image_logits(model, pixel_values):
    """The logits of an image classifier: patches are cut, flattened and embedded one by one."""
    config, weights = model.config, weights_of(model)
    pixel_values = to_array(pixel_values)
    patch_height, patch_width = config.patch_height_width
    rows, columns = pixel_values.shape[2] // patch_height, pixel_values.shape[3] // patch_width

    kernel = weights["model.embeddings.patch_embeddings.projection.weight"].reshape(config.hidden_size, -1)
    bias = weights["model.embeddings.patch_embeddings.projection.bias"]
    patches = []
    for row in range(rows):
        for column in range(columns):
            height = slice(row * patch_height, (row + 1) * patch_height)
            width = slice(column * patch_width, (column + 1) * patch_width)
            patches.append(pixel_values[:, :, height, width].reshape(len(pixel_values), -1) @ kernel.T + bias)
    f_0 = np.stack(patches, axis=1)
    if config.position_embedding == "sincos":
        f_0 = f_0 + posemb_sincos_2d(rows, columns, config.hidden_size)
    if config.pooling == "cls":
        class_token = np.broadcast_to(weights["model.embeddings.cls_token"], (len(f_0), 1, config.hidden_size))
        f_0 = np.concatenate((class_token, f_0), axis=1)
    if config.position_embedding == "learned":
        f_0 = f_0 + weights["model.embeddings.position_embeddings"]

    everything = np.ones((len(f_0), f_0.shape[1], f_0.shape[1]), dtype=bool)
    hidden = hidden_states(config, weights, f_0, None, [everything] * config.num_hidden_layers)
    pooled = hidden[:, 0] if config.pooling == "cls" else hidden.mean(axis=1)
    return linear(weights, "classifier", pooled)


def posemb_sincos_2d(height, width, size):
    """The positions of Beyer et al. (2022), in the manner of big_vision's function of this name, row by row."""
    result = np.zeros((height * width, size))
    omega = 1.0 / 10000 ** (np.arange(size // 4) / (size // 4 - 1))
    for y in range(height):
        for x in range(width):
            result[y * width + x] = np.concatenate(
                (np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega))
            )
    return result
