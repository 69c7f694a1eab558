"""Memory, bandwidth and interconnect of devices, as their vendors state them."""

from typing import NamedTuple

from training.run.throughput import PEAK_FLOPS


class Device(NamedTuple):
    """A device: memory in GB, its bandwidth in TB/s, and the link to other devices of the machine in GB/s, one way."""

    memory: float
    bandwidth: float
    link: float
    source: str


#: By the name of the device. Links are all lanes of NVLink or Infinity Fabric together, or PCIe if there is no other.
DEVICES = {
    "NVIDIA A100-SXM4-40GB": Device(40, 1.555, 300, "NVIDIA A100 Tensor Core GPU, data sheet, 2021"),
    "NVIDIA A100-SXM4-80GB": Device(80, 2.039, 300, "NVIDIA A100 Tensor Core GPU, data sheet, 2021"),
    "NVIDIA A100 80GB PCIe": Device(80, 1.935, 32, "NVIDIA A100 Tensor Core GPU, data sheet, 2021"),
    "NVIDIA L4": Device(24, 0.3, 32, "NVIDIA L4 Tensor Core GPU, data sheet"),
    "NVIDIA L40S": Device(48, 0.864, 32, "NVIDIA L40S GPU, data sheet"),
    "NVIDIA H100 PCIe": Device(80, 2.0, 64, "NVIDIA H100 Tensor Core GPU, data sheet, 2022"),
    "NVIDIA H100 NVL": Device(94, 3.9, 300, "NVIDIA H100 Tensor Core GPU, data sheet"),
    "NVIDIA H100 80GB HBM3": Device(80, 3.35, 450, "NVIDIA H100 Tensor Core GPU, data sheet"),
    "NVIDIA H200": Device(141, 4.8, 450, "NVIDIA H200 Tensor Core GPU, data sheet"),
    "NVIDIA B200": Device(180, 7.7, 900, "NVIDIA DGX B200, data sheet: 1,440 GB and 62 TB/s of eight, rounded down"),
    "AMD Instinct MI250X": Device(64, 1.6, 200, "AMD Instinct MI250X, data sheet; one of its two dies"),
    "AMD Instinct MI300X": Device(192, 5.3, 448, "AMD Instinct MI300X, data sheet"),
}


def peak_flops_of(name: str) -> float:
    """The dense 16-bit FLOPs per second of a device of `DEVICES`."""
    return PEAK_FLOPS[name]
