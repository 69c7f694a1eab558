"""How long a training step of each variant of a study takes, measured in turns, apart from the runs."""

from collections.abc import Callable
from typing import Any

import torch

from training.run.training import model_and_callbacks
from training.studies.study import COMMANDS, Comparison, Member
from training.support.machine import describe_machine
from training.support.timing import interleave, seconds, summarize


#: Steps of each model before those that count.
WARMUP = 3


def random_batch(member: Member, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch as large as those that a process takes in the training of a run, of noise."""
    config, size = member.run.config, member.run.training.per_device_train_batch_size
    if COMMANDS[member.command].name == "text-generation":
        input_ids = torch.randint(config.vocab_size, (size, member.run.data.block_size), device=device)
        return {"input_ids": input_ids, "labels": input_ids, "use_cache": False}
    pixel_values = torch.randn(size, config.num_channels, *config.image_height_width, device=device)
    return {"pixel_values": pixel_values, "labels": torch.randint(config.num_labels, (size,), device=device)}


def training_step(member: Member, device: torch.device) -> Callable[[], None]:
    """Forward pass, backward pass, clipping and a step of AdamW, of the model of a run."""
    task = COMMANDS[member.command]
    model_class, _ = model_and_callbacks(member.run, task.model_class)
    model = model_class._from_config(member.run.config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = random_batch(member, device)

    def step():
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), member.run.training.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_step_times(comparison: Comparison, rounds: int) -> dict[str, Any]:
    """
    How long a training step of each variant takes, with random weights and batches of noise. The variants of a group take
    turns, and each is compared with the baseline in the same round. Needs a machine that does nothing else.

    Args:
        rounds: how many steps of each count.

    Returns:
        `rounds`, `machine`, and as `variants`, for each of each group, `group`, `variant`, `seconds` (the median), and
        `ratio` (the median of the rounds' ratios to the baseline), with its `spread`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = {(member.group, member.variant): member for member in reversed(comparison.members)}
    rows = []
    for group in dict.fromkeys(member.group for member in comparison.members):
        members = [member for (of, _), member in reversed(first.items()) if of == group]
        steps = {member.variant: training_step(member, device) for member in members}
        title = f"steps of {group}" if group else "steps"
        values = interleave(title, steps, lambda step: seconds(step, device), rounds, WARMUP)
        for variant, each in summarize(values, comparison.baseline, speed=False).items():
            figures = {"seconds": each["median"], "ratio": each["ratio"], "spread": each["spread"]}
            rows.append({"group": group, "variant": variant, **figures})
    return {"rounds": rounds, "machine": describe_machine(device), "variants": rows}


def timed(runs: list[dict[str, Any]], step_times: dict[str, Any] | None) -> list[dict[str, Any]]:
    """
    The runs with the time that their steps take by a measurement, in place of that which they took beside whatever else the
    machine did; as they are, where there is none, or not of all of their variants.

    Args:
        runs: what `read_member` made of them.
        step_times: of [`measure_step_times`].
    """
    measured = {(each["group"], each["variant"]): each["seconds"] for each in (step_times or {}).get("variants", ())}
    if not runs or any((run["group"], run["variant"]) not in measured for run in runs):
        return runs
    found = []
    for run in runs:
        time = run["steps"] * measured[run["group"], run["variant"]]
        found.append({**run, "seconds": time, "speed": run["examples"] / time})
    return found
