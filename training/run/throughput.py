"""The speed of a run: examples per second, the utilization of the device, and the share of time spent waiting for data."""

import os
import time
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState


#: Dense 16-bit FLOPs per second of matrix products, as the vendors state them, by the name of the device. Other devices, and
#: parts of a device, have no MFU.
PEAK_FLOPS = {
    "Tesla V100-PCIE-16GB": 112e12,
    "Tesla V100-PCIE-32GB": 112e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "Tesla V100-SXM3-32GB": 125e12,
    "Tesla V100S-PCIE-32GB": 130e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
    "AMD Instinct MI210": 181e12,
    "AMD Instinct MI250": 181e12,  # one of its two dies, each of which is a device
    "AMD Instinct MI250X": 191.5e12,
    "AMD Instinct MI300X": 1307e12,
}
#: The same for a chip of Google's TPUs, by the start of `TPU_ACCELERATOR_TYPE`.
TPU_PEAK_FLOPS = {"v4": 275e12, "v5litepod": 197e12, "v5p": 459e12, "v6e": 918e12}


def peak_flops(device: torch.device) -> float | None:
    """The dense 16-bit FLOPs per second of a device, or `None` if not known."""
    if device.type == "cuda":
        return PEAK_FLOPS.get(torch.cuda.get_device_name(device))
    if device.type == "xla":
        return TPU_PEAK_FLOPS.get(os.environ.get("TPU_ACCELERATOR_TYPE", "").partition("-")[0])
    return None


def training_flops(model: PreTrainedModel, sequence_length: int) -> float:
    """
    The floating-point operations per token of a training step: 6 for each weight that a token is multiplied with, and
    12 x layers x width x length for attention, without the saving of a causal mask (Chowdhery et al., 2022, "PaLM",
    appendix B). Weights of generalized residuals count as any other.
    """
    config = model.config
    used = model.num_parameters(exclude_embeddings=True)
    output = model.get_output_embeddings()
    if output is not None and config.tie_word_embeddings:
        used += output.weight.numel()  # left out above as an embedding
    return 6 * used + 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * sequence_length


class Waiting:
    """Measures in `seconds` how long the training waits for an iterator."""

    def __init__(self):
        self.seconds = 0.0

    def over(self, batches: Iterator) -> Iterator:
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield batch


class Throughput(TrainerCallback, ExportableState):
    """
    Counts the training examples of a run and the time they take. It leaves out evaluation, saving, and the first step, which
    may compile. A resumed run continues to count.
    """

    def __init__(self):
        self.waiting = Waiting()
        self.examples = self.seconds = self.waited = 0.0
        self.flops = 0.0
        self.logged = (0.0, 0.0, 0.0)
        self.unit = self.clock = self.peak = None

    def state(self) -> dict:
        return {"args": {}, "attributes": {name: getattr(self, name) for name in ("examples", "seconds", "waited")}}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.unit = "tokens" if model.main_input_name == "input_ids" else "images"
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        for name, value in saved["attributes"].items():
            setattr(self, name, value)
        self.logged = (self.examples, self.seconds, self.waited)
        if args.bf16 or args.fp16:
            self.peak = peak_flops(args.device)

    def count(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], data_parallel_size: int) -> None:
        """Count a batch of this size in each of `data_parallel_size` processes, or groups of processes."""
        if self.unit == "tokens":
            number, (_, length), tokens = inputs["input_ids"].numel(), inputs["input_ids"].shape, 1
        else:
            number, (*_, height, width) = len(inputs["pixel_values"]), inputs["pixel_values"].shape
            patch_height, patch_width = model.config.patch_height_width
            tokens = length = (height // patch_height) * (width // patch_width)
        if self.clock is not None:
            self.examples += number * data_parallel_size
        if self.peak and not self.flops:
            self.flops = training_flops(model, length) * tokens

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda" and (control.should_log or control.should_evaluate or control.should_save):
            torch.cuda.synchronize(args.device)  # the step may only be queued
        now = time.perf_counter()
        if self.clock is not None:
            self.seconds += now - self.clock
            self.waited += self.waiting.seconds
        self.clock, self.waiting.seconds = now, 0.0

    def on_save(self, args, state, control, **kwargs):
        self.clock = time.perf_counter()

    on_evaluate = on_save

    def measured(self, world_size: int, since_last_log: bool) -> dict[str, float]:
        """
        `tokens_per_second` or `images_per_second`, `data_wait` (the share of the time spent waiting for data) and, in
        16 bits on a device whose peak is known, `mfu` (the share of the peak that is used), over the whole training or since
        the last log.
        """
        now = (self.examples, self.seconds, self.waited)
        before = self.logged if since_last_log else (0.0, 0.0, 0.0)
        self.logged = now
        examples, seconds, waited = (new - old for new, old in zip(now, before))
        if seconds <= 0:
            return {}
        measured = {f"{self.unit}_per_second": examples / seconds, "data_wait": waited / seconds}
        if self.flops:
            measured["mfu"] = self.flops * examples / seconds / world_size / self.peak
        return measured


class SpeedProgress(ProgressCallback):
    """The Trainer's progress bar, with the speed of the run."""

    def on_train_begin(self, args, state, control, **kwargs):
        if self.training_bar is not None:  # of an attempt that ran out of memory
            self.training_bar.close()
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs, **kwargs)
        unit = next((name for name in logs if name in ("tokens_per_second", "images_per_second")), None)
        if self.training_bar is not None and unit is not None:
            text = f"{logs[unit]:,.0f} {unit.split('_')[0]}/s, {logs['data_wait']:.0%} waiting for data"
            self.training_bar.set_postfix_str(text + (f", MFU {logs['mfu']:.0%}" if "mfu" in logs else ""))
