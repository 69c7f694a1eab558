"""Generalized residuals on a GPU: Triton kernels that read each entry of the stack once, forward and backward."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .grn import ALL_GRN_FUNCTIONS, GATE_NORM_EPS, output_dtype
from .grn_fused import FusedGeneralizedResidual
from .norm import rms_norm


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def jit(**options):
    return (lambda function: function) if triton is None else triton.jit(**options)


# Pointers are arguments of a kernel, which has limited room for them: more entries take several launches.
MAX_ENTRIES = 128

# (Kernels see a global that is a constant, and no other.)
NORM_EPS = GATE_NORM_EPS if triton is None else tl.constexpr(GATE_NORM_EPS)

# Arguments that differ from block to block or from batch to batch: no variant is to be compiled for their values.
VARYING = ["entries", "first_entry", "head_entries", "tail_entries", "all_entries", "tokens", "tokens_per_range"]


@jit()
def select(pointers, i):
    """`pointers[i]`, where there is a power of two of them, at most `MAX_ENTRIES`, and `i` is known at run time only."""
    for bit in tl.static_range(7):
        if len(pointers) > 1:
            halved = ()
            for j in tl.static_range(len(pointers) // 2):
                halved = halved + (tl.where((i >> bit) & 1 == 0, pointers[2 * j], pointers[2 * j + 1]),)
            pointers = halved
    return pointers[0]


@jit()
def load_b(delta, row, columns, WIDTH: tl.constexpr, ELEMENTWISE: tl.constexpr, COMPUTE: tl.constexpr):
    """`b` of one entry and output: `(1, BLOCK_WIDTH)`, or a scalar."""
    if ELEMENTWISE:
        return 1 + tl.load(delta + row * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(COMPUTE)[None, :]
    else:
        return 1 + tl.load(delta + row).to(COMPUTE)


@jit()
def load_gates(gate, columns, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, COMPUTE: tl.constexpr):
    """`w` of each output, `(1, BLOCK_WIDTH)`, or nothing where there is no gate."""
    gates = ()
    if gate is not None:
        for output in tl.static_range(OUTPUTS):
            row = tl.load(gate + output * WIDTH + columns, mask=columns < WIDTH, other=0.0)
            gates = gates + (row.to(COMPUTE)[None, :],)
    return gates


@jit()
def relu(x):
    return tl.where(x < 0, 0.0, x)  # tl.maximum would make 0 of NaN


@jit()
def sum_over_width(tiles):
    """The sums over `d` of several tiles, `(BLOCK_TOKENS, 1)` each, for which threads exchange data once."""
    joined = tiles
    for _ in tl.static_range(8):
        if (len(joined) & (len(joined) - 1)) != 0:
            joined = joined + (tiles[0],)  # to a power of two
    for _ in tl.static_range(4):
        if len(joined) > 1:
            pairs = ()
            for j in tl.static_range(len(joined) // 2):
                pairs = pairs + (tl.join(joined[j], joined[j + len(joined) // 2]),)
            joined = pairs
    sums = (tl.sum(joined[0], axis=1, keep_dims=True),)
    for _ in tl.static_range(4):
        if len(sums) < len(tiles):  # (What was added comes after them.)
            first = ()
            second = ()
            for j in tl.static_range(len(sums)):
                left, right = tl.split(sums[j])
                first = first + (left,)
                second = second + (right,)
            sums = first + second
    return sums


@jit()
def inverse_rms(sum_of_squares, eps, WIDTH: tl.constexpr):
    return 1 / tl.sqrt(sum_of_squares / WIDTH + eps)


@jit()
def inverse_rms_of(tiles, eps, WIDTH: tl.constexpr):
    """One over the root mean square of each row of several tiles, `(BLOCK_TOKENS, 1)` each."""
    squares = ()
    for i in tl.static_range(len(tiles)):
        squares = squares + (tiles[i] * tiles[i],)
    sums = sum_over_width(squares)
    scales = ()
    for i in tl.static_range(len(tiles)):
        scales = scales + (inverse_rms(sums[i], eps, WIDTH),)
    return scales


@jit()
def pre_activations(entry, gates, WIDTH: tl.constexpr):
    """`w . n(f)` of each gate, `(BLOCK_TOKENS, 1)` each, for which the entry is summed over `d` once."""
    products = (entry * entry,)
    for output in tl.static_range(len(gates)):
        products = products + (entry * gates[output],)
    sums = sum_over_width(products)
    scale = inverse_rms(sums[0], NORM_EPS, WIDTH)
    results = ()
    for output in tl.static_range(len(gates)):
        results = results + (sums[1 + output] * scale,)
    return results


@jit()
def add_entries(
    totals,
    stack,
    entries,
    first_entry,
    all_entries,
    delta,
    gates,
    tile,
    mask,
    columns,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    COMPUTE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The totals of all outputs with what the entries of `stack` add to them."""
    for i in tl.range(entries, num_stages=STAGES):
        entry = tl.load(select(stack, i) + tile, mask=mask, other=0.0, eviction_policy="evict_first").to(COMPUTE)
        sums = ()
        if len(gates) > 0:
            seen = pre_activations(entry, gates, WIDTH)
        for output in tl.static_range(OUTPUTS):
            row = output * all_entries + first_entry + i
            factor = load_b(delta, row, columns, WIDTH, ELEMENTWISE, COMPUTE)
            if len(gates) > 0:
                factor = factor + relu(seen[output])
            sums = sums + (totals[output] + factor * entry,)
        totals = sums
    return totals


@jit(do_not_specialize=VARYING)
def forward_kernel(
    head,
    tail,
    delta,
    gate,
    outputs,
    normalized,
    norms,
    eps,
    first_entry,
    head_entries,
    tail_entries,
    all_entries,
    tokens,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """
    One program forms all outputs of a block of tokens. The entries are those of `head` and then those of `tail`, which
    may be of another type; with `ACCUMULATE` they are added to what `outputs` holds. With `norms` it writes to `normalized`,
    too.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    columns = tl.arange(0, BLOCK_WIDTH)
    mask = (rows < tokens) & (columns[None, :] < WIDTH)
    tile = rows * WIDTH + columns[None, :]
    gates = load_gates(gate, columns, WIDTH, OUTPUTS, COMPUTE)
    totals = ()
    for output in tl.static_range(OUTPUTS):
        if ACCUMULATE:
            total = tl.load(outputs + output * tokens.to(tl.int64) * WIDTH + tile, mask=mask, other=0.0).to(COMPUTE)
        else:
            total = tl.zeros((BLOCK_TOKENS, BLOCK_WIDTH), COMPUTE)
        totals = totals + (total,)
    totals = add_entries(
        totals, head, head_entries, first_entry, all_entries,
        delta, gates, tile, mask, columns, WIDTH, OUTPUTS, ELEMENTWISE, COMPUTE, STAGES,
    )  # fmt: skip
    if len(tail) > 0:
        totals = add_entries(
            totals, tail, tail_entries, first_entry + head_entries, all_entries,
            delta, gates, tile, mask, columns, WIDTH, OUTPUTS, ELEMENTWISE, COMPUTE, STAGES,
        )  # fmt: skip
    rounded = ()
    for output in tl.static_range(OUTPUTS):
        total = totals[output].to(outputs.dtype.element_ty)
        tl.store(outputs + output * tokens.to(tl.int64) * WIDTH + tile, total, mask=mask)
        rounded = rounded + (total.to(COMPUTE),)
    if len(norms) > 0:
        scales = inverse_rms_of(rounded, eps, WIDTH)
        for output in tl.static_range(OUTPUTS):
            norm = tl.load(norms[output] + columns, mask=columns < WIDTH, other=0.0).to(COMPUTE)[None, :]
            result = rounded[output] * scales[output] * norm
            tl.store(normalized + output * tokens.to(tl.int64) * WIDTH + tile, result, mask=mask)


@jit(do_not_specialize=VARYING)
def backward_kernel(
    output_grads,
    entry_grads,
    stack,
    stack_grads,
    delta,
    gate,
    b_grad_parts,
    gate_grad_parts,
    first_entry,
    entries,
    all_entries,
    tokens,
    tokens_per_range,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    COMPUTE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """
    One program forms the gradients of a group of entries for a range of tokens, and what the range adds to those of the
    parameters that need a gradient. Programs of one range and all groups run at the same time, so that the gradients of the outputs, which
    all of them read, come from the cache for all but the first.
    """
    first_of_group = tl.program_id(0) * GROUP
    token_range = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_WIDTH)
    gates = load_gates(gate, columns, WIDTH, OUTPUTS, COMPUTE)
    gate_grads = ()
    for _ in tl.static_range(len(gates)):
        gate_grads = gate_grads + (tl.zeros((BLOCK_WIDTH,), COMPUTE),)
    b = ()
    b_grads = ()
    for output in tl.static_range(OUTPUTS):
        for k in tl.static_range(GROUP):
            # Beyond the last entry: what is loaded for it, only to be masked, is that of the last one.
            row = output * all_entries + first_entry + tl.minimum(first_of_group + k, entries - 1)
            b = b + (load_b(delta, row, columns, WIDTH, ELEMENTWISE, COMPUTE),)
            b_grads = b_grads + (tl.zeros((BLOCK_WIDTH,), COMPUTE),)

    last_token = tl.minimum((token_range + 1) * tokens_per_range, tokens)
    for first_token in tl.range(token_range * tokens_per_range, last_token, BLOCK_TOKENS):
        rows = first_token + tl.arange(0, BLOCK_TOKENS)[:, None]
        mask = (rows < last_token) & (columns[None, :] < WIDTH)
        tile = rows * WIDTH + columns[None, :]
        grads = ()
        for output in tl.static_range(OUTPUTS):
            grads = grads + (tl.load(output_grads[output] + tile, mask=mask, other=0.0).to(COMPUTE),)
        entry_tiles = ()
        totals = ()
        for k in tl.static_range(GROUP):
            i = first_of_group + k
            entry_mask = tl.where(i < entries, mask, False)  # Triton 3.9's interpreter makes an integer of `&`
            entry = tl.load(select(stack, i) + tile, mask=entry_mask, other=0.0).to(COMPUTE)
            entry_tiles = entry_tiles + (entry,)
            if len(entry_grads) > 0:
                total = tl.load(select(entry_grads, i) + tile, mask=entry_mask, other=0.0).to(COMPUTE)
            else:
                total = tl.zeros((BLOCK_TOKENS, BLOCK_WIDTH), COMPUTE)
            totals = totals + (total,)
        scales = ()
        along = ()
        if len(gates) > 0:
            scales = inverse_rms_of(entry_tiles, NORM_EPS, WIDTH)
            for _ in tl.static_range(GROUP):
                along = along + (0.0,)
        b_sums = ()
        gate_sums = ()
        for output in tl.static_range(OUTPUTS):
            new_along = ()
            if len(gates) > 0:
                products = ()
                for k in tl.static_range(GROUP):
                    products = products + (entry_tiles[k] * gates[output], entry_tiles[k] * grads[output])
                sums = sum_over_width(products)
                gate_grad = gate_grads[output]
            new_totals = ()
            for k in tl.static_range(GROUP):
                b_grad = b_grads[output * GROUP + k]
                if b_grad_parts is not None:
                    b_grad += tl.sum(entry_tiles[k] * grads[output], axis=0)
                b_sums = b_sums + (b_grad,)
                factor = b[output * GROUP + k]
                total = totals[k]
                if len(gates) > 0:
                    pre_activation = sums[2 * k] * scales[k]
                    # At exactly 0 the gate counts as open, so that one that starts at zero can learn.
                    open_grad = tl.where(pre_activation >= 0, sums[2 * k + 1], 0.0) * scales[k]
                    if gate_grad_parts is not None:
                        gate_grad += tl.sum(open_grad * entry_tiles[k], axis=0)
                    total += open_grad * gates[output]
                    new_along = new_along + (along[k] + open_grad * pre_activation,)
                    factor = factor + relu(pre_activation)
                new_totals = new_totals + (total + factor * grads[output],)
            totals = new_totals
            along = new_along
            if len(gates) > 0:
                gate_sums = gate_sums + (gate_grad,)
        b_grads = b_sums
        gate_grads = gate_sums
        for k in tl.static_range(GROUP):
            i = first_of_group + k
            total = totals[k]
            if len(gates) > 0:
                # n(f) = f * scale(f): the part of the gradient along f goes with the scale.
                total -= along[k] * (scales[k] / WIDTH) * entry_tiles[k]
            tl.store(select(stack_grads, i) + tile, total, mask=tl.where(i < entries, mask, False))

    if b_grad_parts is not None:
        for k in tl.static_range(GROUP):
            i = first_of_group + k
            for output in tl.static_range(OUTPUTS):
                part = (token_range * OUTPUTS + output) * entries + i
                b_grad = b_grads[output * GROUP + k]
                if ELEMENTWISE:
                    column_mask = tl.where(i < entries, columns < WIDTH, False)
                    tl.store(b_grad_parts + part * WIDTH + columns, b_grad, mask=column_mask)
                else:
                    tl.store(b_grad_parts + part, tl.sum(b_grad), mask=i < entries)
    if gate_grad_parts is not None:
        for output in tl.static_range(OUTPUTS):
            part = (token_range * tl.num_programs(0) + tl.program_id(0)) * OUTPUTS + output
            tl.store(gate_grad_parts + part * WIDTH + columns, gate_grads[output], mask=columns < WIDTH)


@jit(do_not_specialize=["tokens", "tokens_per_range"])
def norm_backward_kernel(
    outputs,
    first_grad,
    grads,
    norms,
    output_grads,
    norm_grad_parts,
    eps,
    tokens,
    tokens_per_range,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """
    One program forms, of one output, the gradients for a range of tokens, from those of what its norm makes of it (for the
    first also from its own), and what the range adds to the gradient of the norm's weight.
    """
    output = tl.program_id(0)
    token_range = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_WIDTH)
    norm = tl.load(select(norms, output) + columns, mask=columns < WIDTH, other=0.0).to(COMPUTE)[None, :]
    norm_grad = tl.zeros((BLOCK_WIDTH,), COMPUTE)
    last_token = tl.minimum((token_range + 1) * tokens_per_range, tokens)
    for first_token in tl.range(token_range * tokens_per_range, last_token, BLOCK_TOKENS):
        rows = first_token + tl.arange(0, BLOCK_TOKENS)[:, None]
        mask = (rows < last_token) & (columns[None, :] < WIDTH)
        tile = rows * WIDTH + columns[None, :]
        values = tl.load(select(outputs, output) + tile, mask=mask, other=0.0).to(COMPUTE)
        grad = tl.load(select(grads, output) + tile, mask=mask, other=0.0).to(COMPUTE)
        sums = sum_over_width((values * values, values * grad * norm))
        scale = inverse_rms(sums[0], eps, WIDTH)
        norm_grad += tl.sum(values * grad * scale, axis=0)
        # x / rms(x): the part of the gradient along x goes with the scale.
        result = (grad * norm - values * (sums[1] * scale * scale / WIDTH)) * scale
        if first_grad is not None:
            result += tl.load(first_grad + tile, mask=tl.where(output == 0, mask, False), other=0.0).to(COMPUTE)
        tl.store(output_grads + output * tokens.to(tl.int64) * WIDTH + tile, result, mask=mask)
    part = token_range * OUTPUTS + output
    tl.store(norm_grad_parts + part * WIDTH + columns, norm_grad, mask=columns < WIDTH)


INTERPRETED = triton is not None and not isinstance(forward_kernel, triton.JITFunction)


def runs_of_one_type(stack: Sequence[Tensor]) -> list[slice]:
    """Cuts the stack where the type changes: under autocast the model's input is wider than what blocks return."""
    starts = []
    for i, entry in enumerate(stack):
        if i == 0 or entry.dtype != stack[i - 1].dtype or i - starts[-1] == MAX_ENTRIES:
            starts.append(i)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(stack)])]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor as kernels take it; a variant for each pattern of pointers that are aligned or not would be too many."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def padded(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """As many tensors as a power of two, so that there is one variant of a kernel for many numbers of entries."""
    size = max(4, next_power_of_2(len(tensors))) if tensors else 0
    return (*tensors, *tensors[:1] * (size - len(tensors)))


def constants(stack: Sequence[Tensor], delta: Tensor) -> dict:
    width = stack[0].shape[-1]
    return {
        "WIDTH": width,
        "OUTPUTS": len(delta),
        "ELEMENTWISE": delta.shape[-1] == width,
        "COMPUTE": tl.float64 if output_dtype(stack) == torch.float64 else tl.float32,
        "BLOCK_WIDTH": next_power_of_2(width),
    }


@functools.cache
def processors_and_shared_memory(device: torch.device) -> tuple[int, int]:
    """How many processors a device has, and the bytes that a program can share there (of the interpreter: one, none)."""
    if device.type != "cuda":
        return 1, 0
    properties = torch.cuda.get_device_properties(device)
    # (ROCm does not say; its devices have as much as this.)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 2**16)


def loop_stages(tile_bytes: int, device: torch.device) -> int:
    """How many entries the forward pass has in flight: the next two wait in half of the shared memory, or none does."""
    _, room = processors_and_shared_memory(device)
    return 3 if 2 * tile_bytes <= room // 2 else 1


def forward_tile(block_width: int) -> tuple[int, int]:
    """
    Tokens and warps of a program. The totals stay in registers: of each output, 32 elements in a thread at most. Of tiles
    of that size the one with the fewest warps was the fastest on an H200, at a width of 1,024: sums over the width cross
    warps through shared memory.
    """
    num_warps = min(max(block_width // 512, 1), 32)
    return max(1024 * num_warps // block_width, 1), num_warps


def backward_tile(block_width: int, outputs: int, sum_dtype: torch.dtype) -> tuple[int, int, int]:
    """
    Entries, tokens and warps of a program. A row of a tile is as wide as all warps with 8 elements in a thread: so the
    sums over tokens need no exchange between threads. They stay in registers, for as many entries at a time as those have
    room for. (For three outputs, two entries of one token were faster on an H200 than one of two, at a width of 1,024.)
    """
    num_warps = min(max(block_width // 256, 1), 16)
    crowded = sum_dtype == torch.float64 or block_width > 2048
    group = 1 if crowded else {1: 4, 2: 2, 3: 2}.get(outputs, 1)
    elements = 256 if crowded or outputs > 2 else 512
    return group, max(elements * num_warps // block_width, 1), num_warps


def ranges_of_tokens(tokens: int, groups: int, block_tokens: int, device: torch.device) -> tuple[int, int]:
    """
    How many ranges there are, and how many tokens one has, in whole blocks: enough for 8 programs on each processor, but
    of 64 tokens at least, next to which the sums for the parameters that each range writes are few.
    """
    processors, _ = processors_and_shared_memory(device)
    ranges = min(ceil_div(tokens, 64), ceil_div(8 * processors, groups))
    tokens_per_range = ceil_div(ceil_div(tokens, ranges), block_tokens) * block_tokens
    return ceil_div(tokens, tokens_per_range), tokens_per_range


def forward(
    stack: Sequence[Tensor], delta: Tensor, gate: Tensor | None, norms: Sequence[Tensor] = (), eps: float = 0.0
) -> Tensor:
    dtype = output_dtype(stack)
    runs = runs_of_one_type(stack)
    if norms and len(runs) > 2:
        outputs = forward(stack, delta, gate)
        return torch.stack([*map(rms_norm, outputs, norms, itertools.repeat(eps)), *outputs])
    # Outputs that another launch adds to are not to be rounded.
    total_dtype = dtype if len(runs) <= 2 else torch.promote_types(dtype, torch.float32)
    results = stack[0].new_empty((len(norms) + len(delta), *stack[0].shape), dtype=total_dtype)
    if results.numel() == 0:
        return results.to(dtype)
    normalized, outputs = results[: len(norms)], results[len(norms) :]
    norms = tuple(aligned(norm) for norm in norms)
    stack = [aligned(entry) for entry in stack]
    delta, gate = aligned(delta), None if gate is None else aligned(gate)
    options = constants(stack, delta)
    width, block_width = options["WIDTH"], options["BLOCK_WIDTH"]
    tokens = stack[0].numel() // width
    block_tokens, num_warps = forward_tile(block_width)
    tile_bytes = block_width * (block_tokens * dtype.itemsize + len(delta) * delta.itemsize)
    with torch.cuda.device_of(stack[0]):
        for head, tail in zip(runs[::2], [*runs[1::2], slice(0)]):
            forward_kernel[(ceil_div(tokens, block_tokens),)](
                padded(stack[head]),
                padded(stack[tail]),
                delta,
                gate,
                outputs,
                normalized if norms else None,
                norms,
                eps,
                head.start,
                len(stack[head]),
                len(stack[tail]),
                len(stack),
                tokens,
                **options,
                ACCUMULATE=head.start > 0,
                BLOCK_TOKENS=block_tokens,
                STAGES=loop_stages(tile_bytes, stack[0].device),
                num_warps=num_warps,
            )
    return results.to(dtype)


def backward(
    output_grads: Sequence[Tensor],
    entry_grads: Sequence[Tensor],
    stack: Sequence[Tensor],
    delta: Tensor,
    gate: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    inputs = (*stack, delta, gate)
    if stack[0].numel() == 0:
        return [torch.zeros_like(tensor) for tensor, own in zip(inputs, needed) if own]
    of_delta, of_gate = needed[len(stack)], gate is not None and needed[-1]
    output_grads = tuple(aligned(grad) for grad in output_grads)
    entry_grads = [aligned(grad) for grad in entry_grads]
    stack = [aligned(entry) for entry in stack]
    delta, gate = aligned(delta), None if gate is None else aligned(gate)
    options = constants(stack, delta)
    width, block_width = options["WIDTH"], options["BLOCK_WIDTH"]
    tokens = stack[0].numel() // width
    sum_dtype = torch.promote_types(output_dtype(stack), torch.float32)
    group, block_tokens, num_warps = backward_tile(block_width, len(delta), sum_dtype)
    # (Where calls are what costs, each allocation and each sum counts.)
    stack_grads, b_grads, gate_grads = [], [], []
    with torch.cuda.device_of(stack[0]):
        for run in runs_of_one_type(stack):
            entries = len(stack[run])
            groups = ceil_div(entries, group)
            ranges, tokens_per_range = ranges_of_tokens(tokens, groups, block_tokens, stack[0].device)
            grads = [torch.empty_like(entry) for entry in stack[run]]
            b_parts = gate_parts = None
            if of_delta:
                b_parts = delta.new_empty((ranges, len(delta), entries, delta.shape[-1]), dtype=sum_dtype)
            if of_gate:
                gate_parts = delta.new_empty((ranges * groups, len(delta), width), dtype=sum_dtype)
            backward_kernel[(groups, ranges)](
                output_grads,
                padded(entry_grads[run]),
                padded(stack[run]),
                padded(grads),
                delta,
                gate,
                b_parts,
                gate_parts,
                run.start,
                entries,
                len(stack),
                tokens,
                tokens_per_range,
                **options,
                GROUP=group,
                BLOCK_TOKENS=block_tokens,
                num_warps=num_warps,
            )
            stack_grads += grads
            b_grads += [] if b_parts is None else [b_parts.sum(0).to(delta.dtype)]
            gate_grads += [] if gate_parts is None else [gate_parts.sum(0)]
    # (The gradients of entries that need none are written, too: they are few.)
    results = [grad for grad, own in zip(stack_grads, needed) if own]
    if of_delta:
        results.append(b_grads[0] if len(b_grads) == 1 else torch.cat(b_grads, dim=1))
    if of_gate:
        gate_grad = gate_grads[0] if len(gate_grads) == 1 else torch.stack(gate_grads).sum(0)
        results.append(gate_grad.to(gate.dtype))
    return results


def norm_backward(
    outputs: Sequence[Tensor], first_grad: Tensor | None, grads: Sequence[Tensor], norms: Sequence[Tensor], eps: float
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    first, shape = outputs[0], outputs[0].shape
    output_grads = first.new_empty((len(outputs), *shape))
    if output_grads.numel() == 0:
        return output_grads.unbind(), [torch.zeros_like(norm) for norm in norms]
    width = shape[-1]
    tokens, block_width = first.numel() // width, next_power_of_2(width)
    compute = torch.promote_types(first.dtype, torch.float32)
    _, block_tokens, num_warps = backward_tile(block_width, 1, compute)
    ranges, tokens_per_range = ranges_of_tokens(tokens, len(outputs), block_tokens, first.device)
    parts = first.new_empty((ranges, len(outputs), width), dtype=compute)
    with torch.cuda.device_of(first):
        norm_backward_kernel[(len(outputs), ranges)](
            padded([aligned(output) for output in outputs]),
            None if first_grad is None else aligned(first_grad),
            padded([aligned(grad) for grad in grads]),
            padded([aligned(norm) for norm in norms]),
            output_grads,
            parts,
            eps,
            tokens,
            tokens_per_range,
            WIDTH=width,
            OUTPUTS=len(outputs),
            COMPUTE=tl.float64 if compute == torch.float64 else tl.float32,
            BLOCK_TOKENS=block_tokens,
            BLOCK_WIDTH=block_width,
            num_warps=num_warps,
        )
    return output_grads.unbind(), parts.sum(0).to(norms[0].dtype).unbind()


@torch.compiler.assume_constant_result
def compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def obstacle(device: torch.device) -> str | None:
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on {device}, and Triton needs a GPU"
    if device.type == "cuda" and (capability := compute_capability(device)) < (8, 0):
        return "the GPU has compute capability {}.{}, and Triton needs 8.0".format(*capability)
    return None


generalized_residual_triton = FusedGeneralizedResidual("triton", forward, backward, norm_backward, obstacle)
ALL_GRN_FUNCTIONS.register("triton", generalized_residual_triton)


__all__ = ["generalized_residual_triton"]
