"""The machine that a benchmark runs on."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch


#: The packages that results depend on; the last two are other implementations, which the benchmarks compare with.
PACKAGES = ("torch", "transformers", "triton", "deep-cross-attention", "fla-core")


def describe_machine(device: torch.device) -> dict[str, str | int | None]:
    """What results depend on, apart from the arguments."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        name = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
        cpu = name[1] if name else cpu
    machine = {
        "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "CPU": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "CUDA": torch.version.cuda,
        "Python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            machine[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            machine[package] = None
    return machine
