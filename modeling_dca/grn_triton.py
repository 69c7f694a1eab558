"""Generalized residuals on a GPU: Triton kernels that read each entry of the stack once, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .grn import ALL_GRN_FUNCTIONS, GATE_NORM_EPS, output_dtype
from .grn_fused import FusedGeneralizedResidual


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
    """The sums over `d` of a power of two of tiles, `(BLOCK_TOKENS, 1)` each, for which threads exchange data once."""
    joined = tiles
    for _ in tl.static_range(4):
        if len(joined) > 1:
            pairs = ()
            for j in tl.static_range(len(joined) // 2):
                pairs = pairs + (tl.join(joined[j], joined[j + len(joined) // 2]),)
            joined = pairs
    sums = (tl.sum(joined[0], axis=1, keep_dims=True),)
    for _ in tl.static_range(4):
        if len(sums) < len(tiles):
            first = ()
            second = ()
            for j in tl.static_range(len(sums)):
                left, right = tl.split(sums[j])
                first = first + (left,)
                second = second + (right,)
            sums = first + second
    return sums


@jit()
def inverse_rms(sum_of_squares, WIDTH: tl.constexpr):
    """The scale of the norm through which a gate sees an entry."""
    return 1 / tl.sqrt(sum_of_squares / WIDTH + NORM_EPS)


@jit()
def pre_activations(entry, gates, WIDTH: tl.constexpr):
    """`w . n(f)` of each gate, `(BLOCK_TOKENS, 1)` each, for which the entry is summed over `d` once."""
    products = (entry * entry,)
    for output in tl.static_range(len(gates)):
        products = products + (entry * gates[output],)
    for _ in tl.static_range(8):
        if (len(products) & (len(products) - 1)) != 0:
            products = products + (entry,)
    sums = sum_over_width(products)
    scale = inverse_rms(sums[0], WIDTH)
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
    may be of another type; with `ACCUMULATE` they are added to what `outputs` holds.
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
    for output in tl.static_range(OUTPUTS):
        tl.store(outputs + output * tokens.to(tl.int64) * WIDTH + tile, totals[output], mask=mask)


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
            squares = ()
            for k in tl.static_range(GROUP):
                squares = squares + (entry_tiles[k] * entry_tiles[k],)
                along = along + (0.0,)
            sums_of_squares = sum_over_width(squares)
            for k in tl.static_range(GROUP):
                scales = scales + (inverse_rms(sums_of_squares[k], WIDTH),)
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


INTERPRETED = triton is not None and not isinstance(forward_kernel, triton.JITFunction)


def runs_of_one_type(stack: Sequence[Tensor]) -> list[slice]:
    """Cuts the stack where the type changes: under autocast the model's input is wider than what blocks return."""
    starts = []
    for i, entry in enumerate(stack):
        if i == 0 or entry.dtype != stack[i - 1].dtype or i - starts[-1] == MAX_ENTRIES:
            starts.append(i)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(stack)])]


def aligned(tensor: Tensor) -> Tensor:
    """The tensor as kernels take it; a variant for each pattern of pointers that are aligned or not would be too many."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def padded(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """As many tensors as a power of two, so that there is one variant of a kernel for many numbers of entries."""
    size = max(4, triton.next_power_of_2(len(tensors))) if tensors else 0
    return (*tensors, *tensors[:1] * (size - len(tensors)))


def constants(stack: Sequence[Tensor], delta: Tensor) -> dict:
    width = stack[0].shape[-1]
    return {
        "WIDTH": width,
        "OUTPUTS": len(delta),
        "ELEMENTWISE": delta.shape[-1] == width,
        "COMPUTE": tl.float64 if output_dtype(stack) == torch.float64 else tl.float32,
        "BLOCK_WIDTH": triton.next_power_of_2(width),
    }


def loop_stages(tile_bytes: int, device: torch.device) -> int:
    """How many entries the forward pass has in flight: the next two wait in half of the shared memory, or none does."""
    if device.type != "cuda":
        return 1
    # (ROCm does not say; its devices have as much as this.)
    room = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 2**16)
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
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    ranges = min(triton.cdiv(tokens, 64), triton.cdiv(8 * processors, groups))
    tokens_per_range = triton.cdiv(triton.cdiv(tokens, ranges), block_tokens) * block_tokens
    return triton.cdiv(tokens, tokens_per_range), tokens_per_range


def forward(stack: Sequence[Tensor], delta: Tensor, gate: Tensor | None) -> Tensor:
    dtype = output_dtype(stack)
    runs = runs_of_one_type(stack)
    # Outputs that another launch adds to are not to be rounded.
    total_dtype = dtype if len(runs) <= 2 else torch.promote_types(dtype, torch.float32)
    outputs = stack[0].new_empty((len(delta), *stack[0].shape), dtype=total_dtype)
    if outputs.numel() == 0:
        return outputs.to(dtype)
    stack = [aligned(entry) for entry in stack]
    delta, gate = aligned(delta), None if gate is None else aligned(gate)
    options = constants(stack, delta)
    width, block_width = options["WIDTH"], options["BLOCK_WIDTH"]
    tokens = stack[0].numel() // width
    block_tokens, num_warps = forward_tile(block_width)
    tile_bytes = block_width * (block_tokens * dtype.itemsize + len(delta) * delta.itemsize)
    with torch.cuda.device_of(stack[0]):
        for head, tail in zip(runs[::2], [*runs[1::2], slice(0)]):
            forward_kernel[(triton.cdiv(tokens, block_tokens),)](
                padded(stack[head]),
                padded(stack[tail]),
                delta,
                gate,
                outputs,
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
    return outputs.to(dtype)


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
    stack_grads = [torch.empty_like(entry) for entry in stack]
    delta, gate = aligned(delta), None if gate is None else aligned(gate)
    options = constants(stack, delta)
    width, block_width = options["WIDTH"], options["BLOCK_WIDTH"]
    tokens = stack[0].numel() // width
    sum_dtype = torch.promote_types(output_dtype(stack), torch.float32)
    group, block_tokens, num_warps = backward_tile(block_width, len(delta), sum_dtype)
    b_grads, gate_grads = [], []
    with torch.cuda.device_of(stack[0]):
        for run in runs_of_one_type(stack):
            entries = len(stack[run])
            groups = triton.cdiv(entries, group)
            ranges, tokens_per_range = ranges_of_tokens(tokens, groups, block_tokens, stack[0].device)
            b_parts = gate_parts = None
            if of_delta:
                b_parts = delta.new_empty((ranges, len(delta), entries, delta.shape[-1]), dtype=sum_dtype)
                b_grads.append(b_parts)
            if of_gate:
                gate_parts = delta.new_empty((ranges, groups, len(delta), width), dtype=sum_dtype)
                gate_grads.append(gate_parts)
            backward_kernel[(groups, ranges)](
                output_grads,
                padded(entry_grads[run]),
                padded(stack[run]),
                padded(stack_grads[run]),
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
    # (The gradients of entries that need none are written, too: they are few.)
    delta_grad = torch.cat([parts.sum(0) for parts in b_grads], dim=1) if of_delta else None
    gate_grad = sum(parts.sum((0, 1)) for parts in gate_grads) if of_gate else None
    grads = (*stack_grads, delta_grad, gate_grad)
    return [grad.to(tensor.dtype) for grad, tensor, own in zip(grads, inputs, needed) if own]


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


generalized_residual_triton = FusedGeneralizedResidual("triton", forward, backward, obstacle)
ALL_GRN_FUNCTIONS.register("triton", generalized_residual_triton)


__all__ = ["generalized_residual_triton"]
