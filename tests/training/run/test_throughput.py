"""What a run says of its speed: counted by hand, with a clock that the test moves."""

import json

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

import training.run.throughput
from modeling_dca import DCAConfig, DCAForCausalLM, DCAForImageClassification, DCAVisionConfig
from tests.training.tiny import IMAGE_RUN, TEXT_RUN, call, write_images
from training import causal_lm, image_classification
from training.run.throughput import Throughput, peak_flops, training_flops


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is moved."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(training.run.throughput, "time", clock)
    return clock


class Meter:
    """A throughput as the trainer uses it."""

    def __init__(self, clock, **options):
        self.clock, self.throughput = clock, Throughput()
        self.arguments = TrainingArguments("unused", report_to="none", use_cpu=True)
        self.state, self.control = TrainerState(), TrainerControl()
        for name, value in options.items():
            setattr(self.throughput, name, value)
        self.model = DCAForCausalLM(DCAConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))

    def begin(self):
        self.throughput.on_train_begin(self.arguments, self.state, self.control, model=self.model)

    def batches(self, wait):
        while True:
            self.clock.now += wait
            yield {"input_ids": torch.zeros(2, 5, dtype=torch.long)}

    def step(self, wait, compute, processes=1):
        batch = next(self.throughput.waiting.over(self.batches(wait)))
        self.throughput.count(self.model, batch, processes)
        self.clock.now += compute
        self.throughput.on_step_end(self.arguments, self.state, self.control)


def test_tokens_a_second_and_waiting(clock):
    meter = Meter(clock)
    meter.begin()
    meter.step(wait=50, compute=50)  # the first step, which may compile, says nothing
    meter.step(wait=1, compute=3)
    meter.step(wait=0, compute=4)
    assert meter.throughput.measured(1, since_last_log=True) == {"tokens_per_second": 20 / 8, "data_wait": 1 / 8}
    assert meter.throughput.measured(1, since_last_log=True) == {}
    meter.step(wait=1, compute=1)
    assert meter.throughput.measured(1, since_last_log=True) == {"tokens_per_second": 5, "data_wait": 0.5}
    assert meter.throughput.measured(1, since_last_log=False) == {"tokens_per_second": 3, "data_wait": 0.2}


@pytest.mark.parametrize("event", ["on_evaluate", "on_save"])
def test_evaluation_and_saving_are_left_out(clock, event):
    meter = Meter(clock)
    meter.begin()
    meter.step(0, 1)
    meter.step(0, 1)
    clock.now += 1000
    getattr(meter.throughput, event)(meter.arguments, meter.state, meter.control)
    meter.step(0, 3)
    assert meter.throughput.measured(1, since_last_log=False)["tokens_per_second"] == 20 / 4


def test_resumed_run_goes_on_counting(clock):
    first = Meter(clock)
    first.begin()
    first.step(0, 1)
    first.step(2, 2)
    second = Meter(clock)
    second.state.stateful_callbacks = {"Throughput": json.loads(json.dumps(first.throughput.state()))}
    clock.now += 1000
    second.begin()
    assert second.throughput.measured(1, since_last_log=True) == {}
    second.step(0, 500)
    second.step(0, 1)
    assert second.throughput.measured(1, since_last_log=True) == {"tokens_per_second": 10, "data_wait": 0}
    assert second.throughput.measured(1, since_last_log=False) == {"tokens_per_second": 4, "data_wait": 0.4}


def test_utilisation_is_a_share_of_each_devices_peak(clock):
    meter = Meter(clock, peak=1000.0)
    meter.begin()
    meter.step(0, 1, processes=4)
    meter.step(0, 2, processes=4)
    flops = training_flops(meter.model, 5)
    assert meter.throughput.measured(4, since_last_log=False) == {
        "tokens_per_second": 20,
        "data_wait": 0,
        "mfu": pytest.approx(20 * flops / 4 / 1000),
    }


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_language_model(tied):
    shape = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = DCAForCausalLM(DCAConfig(**shape, residual_scheme="standard", tie_word_embeddings=tied))
    # Four projections of attention, two of the feed-forward module, which is 4 x as wide, and the norms.
    weights = 3 * (4 * 8 * 8 + 2 * 8 * 32 + 2 * 8) + 8 + 11 * 8
    assert training_flops(model, 10) == 6 * weights + 12 * 3 * 8 * 10


def test_flops_of_images(clock):
    config = DCAVisionConfig(
        image_size=(8, 12),
        patch_size=(4, 2),
        num_channels=1,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    meter = Meter(clock)
    meter.model = DCAForImageClassification(config)
    meter.begin()
    meter.throughput.peak = 1e6
    meter.throughput.count(meter.model, {"pixel_values": torch.zeros(3, 1, 8, 12)}, 1)
    assert meter.throughput.flops == 12 * training_flops(meter.model, 12)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H100 PCIe", 756e12),
                       ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA A40", 149.7e12),
                       ("NVIDIA L4", 121e12), ("NVIDIA L40", 181e12), ("NVIDIA L40S", 362e12), ("NVIDIA B200", 2250e12),
                       ("NVIDIA GeForce GTX 1080", None), ("NVIDIA RTX A4000", None), ("NVIDIA H100", None),
                       ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA L400", None), ("NVIDIA GB200", None)]
)  # fmt: skip
def test_peaks_of_gpus(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_peaks_of_tpus(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None and peak_flops(torch.device("xla")) is None
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    assert peak_flops(torch.device("xla")) == 197e12


def test_run_tells_its_speed(room, capsys):
    write_images(room / "images")
    for main, run, unit in (
        (causal_lm.main, TEXT_RUN, "tokens_per_second"),
        (image_classification.main, IMAGE_RUN, "images_per_second"),
    ):
        call(main, run, "--output_dir=run", "--overwrite")
        results = json.loads((room / "run" / "all_results.json").read_text())
        assert results[f"train_{unit}"] > 0 and 0 < results["train_data_wait"] < 1 and "train_mfu" not in results
        history = json.loads((room / "run" / "trainer_state.json").read_text())["log_history"]
        steps = [entry for entry in history if "loss" in entry]
        # The first step says nothing.
        assert unit not in steps[0] and all(entry[unit] > 0 for entry in steps[1:])
        bar = capsys.readouterr().err
        assert f" {unit.split('_')[0]}/s, " in bar and "waiting for data" in bar
        # What all of it took is what its parts took.
        seconds = sum(1 / entry[unit] for entry in steps[1:]) / len(steps[1:])
        assert results[f"train_{unit}"] == pytest.approx(1 / seconds, rel=1e-6)


def test_resumed_run_tells_the_speed_of_all_of_it(room):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run")
    saved = json.loads((room / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["Throughput"]["attributes"]["examples"] == 3 * 4 * 16
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--resume_from_checkpoint=run/checkpoint-4")
    results = json.loads((room / "run" / "all_results.json").read_text())
    seconds = saved["stateful_callbacks"]["Throughput"]["attributes"]["seconds"]
    assert results["train_tokens_per_second"] < 4 * 4 * 16 / seconds
