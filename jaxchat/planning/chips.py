"""Accelerators that launch.plan supports, and their topologies."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxchat.devices import PEAKS
from jaxchat.errors import UserError, first_line, missing

GiB = 1 << 30
SAME_ON_ALL = (  # Fields of every GPU's description.
    "threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 shared_memory_per_block: 49152 "
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 "
    "registers_per_core_limit: 65536 registers_per_block_limit: 65536"
)


@dataclass(frozen=True)
class Gpu:
    """Properties of a GPU for XLA's compiler, from data sheets and device queries; sizes are in bytes."""

    capability: int
    cores: int
    fpus: int
    memory: int
    bandwidth: float
    l2: int
    clock_ghz: float
    shared_per_core: int = 233_472
    shared_per_block: int = 232_448

    def target(self, name: str) -> str:
        """A GpuTargetConfigProto in text form."""
        return (
            f"gpu_device_info {{ {SAME_ON_ALL} shared_memory_per_core: {self.shared_per_core} "
            f"shared_memory_per_block_optin: {self.shared_per_block} core_count: {self.cores} "
            f"fpus_per_core: {self.fpus} memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.l2} "
            f"clock_rate_ghz: {self.clock_ghz} device_memory_size: {self.memory} "
            f"cuda_compute_capability {{ major: {self.capability} }} }} "
            'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 8 } '
            f'device_description_str: "{name}"'
        )


@dataclass(frozen=True)
class Chip:
    """A kind of chip.

    Attributes:
        kind: its key in devices.PEAKS.
        memory: bytes available to a program; for a GPU 75 percent of its memory, JAX's default preallocation.
        dollars: approximate on-demand price per hour in 2026; --dollars_per_chip_hour overrides it.
        cores: how much a chip adds to the number in a topology's name: v5p-16 has 8 chips of 2 cores.
    """

    kind: str
    memory: float
    dollars: float
    cores: int = 1
    gpu: Gpu | None = None

    @property
    def peak_flops(self) -> float:
        return PEAKS[self.kind][0]


def _gpu(kind: str, dollars: float, gpu: Gpu) -> Chip:
    return Chip(kind, 0.75 * gpu.memory, dollars, gpu=gpu)


CHIPS: Mapping[str, Chip] = {
    "v4": Chip("TPU v4", 31.75 * GiB, 3.22, cores=2),
    "v5e": Chip("TPU v5e", 15.75 * GiB, 1.20),
    "v5p": Chip("TPU v5p", 95.74 * GiB, 4.20, cores=2),
    "v6e": Chip("TPU v6e", 31.25 * GiB, 2.70),
    "a100": _gpu("NVIDIA A100", 1.8, Gpu(8, 108, 64, 85_100_068_864, 2.039e12, 40 << 20, 1.41, 167_936, 166_912)),
    "h100": _gpu("NVIDIA H100", 3.0, Gpu(9, 132, 128, 84_929_347_584, 3.352e12, 50 << 20, 1.98)),
    "h200": _gpu("NVIDIA H200", 3.8, Gpu(9, 132, 128, 151_397_597_184, 4.8e12, 50 << 20, 1.98)),
    "b200": _gpu("NVIDIA B200", 5.0, Gpu(10, 148, 128, 191_514_411_008, 7.672e12, 132_644_864, 1.965)),
}
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}


@dataclass(frozen=True)
class Topology:
    """A number of chips of one kind, named like v5e-8, v5p-16 or h100x8."""

    name: str
    chip: Chip
    chips: int

    @property
    def exact(self) -> bool:
        """Whether the compiled memory equals that of a real run. It does not on GPUs, where other kernels run."""
        return self.chip.gpu is None

    def devices(self) -> list[Any]:
        """Abstract devices to compile for; the chips need not be present.

        Raises:
            UserError: the compiler for these devices is not installed.
        """
        from jax.experimental import topologies

        kind, gpu = re.split("[-x]", self.name)[0], self.chip.gpu
        try:
            if gpu is not None:
                target = gpu.target(self.chip.kind)
                description = topologies.get_topology_desc(
                    platform="cuda", target_config=target, topology=f"1x1x{self.chips}"
                )
            else:
                grid = (CUBES if self.chip.cores == 2 else FLAT)[self.chips]
                more: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if self.chips == 1 else {}
                more |= {"chip_config_name": "megacore"} if kind == "v4" else {}
                description = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{grid}", **more)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            extra = "tpu" if gpu is None else "cuda"
            raise missing(f"no compiler for {self.name} is installed ({first_line(error)})", extra) from None
        return list(description.devices)


def topology(name: str) -> Topology:
    """Parses a topology name; raises `UserError` if it is unknown."""
    match = re.fullmatch(r"([a-z]\w*?)[-x](\d+)", name)
    if not match or match[1] not in CHIPS:
        raise UserError(f"unknown topology {name!r}: use a name such as v5e-8, v6e-64, v5p-16 or h100x8")
    chip, number = CHIPS[match[1]], int(match[2])
    chips = number // chip.cores
    if chip.gpu is None and (number % chip.cores or chips not in (CUBES if chip.cores == 2 else FLAT)):
        sizes = (n * chip.cores for n in (CUBES if chip.cores == 2 else FLAT))
        raise UserError(f"unknown topology {name!r}: the sizes of {match[1]} are {', '.join(map(str, sizes))}")
    if not chips:
        raise UserError(f"{name} has no chips: use at least one, such as {match[1]}x8")
    return Topology(name, chip, chips)
