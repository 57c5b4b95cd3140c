"""Named sets of XLA options by platform: options that are not yet defaults, or were measured to be faster."""

from collections.abc import Mapping, Sequence
from typing import Any

Options = Mapping[str, bool | int]

# Options by name and platform. Sources: MaxText's benchmarks/xla_flags_library.py for TPUs, JAX's GPU performance tips
# and NVIDIA's JAX-Toolbox for GPUs; sizes are those of their dense models.
SETTINGS: Mapping[str, Mapping[str, Options]] = {
    # Overlap collectives with independent computation.
    "overlap": {
        "tpu": {
            "xla_tpu_enable_async_collective_fusion": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
            "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
            "xla_tpu_overlap_compute_collective_tc": True,
            "xla_enable_async_all_gather": True,
        },
        "gpu": {
            "xla_gpu_enable_latency_hiding_scheduler": True,
            "xla_gpu_enable_pipelined_all_gather": True,
            "xla_gpu_enable_pipelined_reduce_scatter": True,
            "xla_gpu_enable_pipelined_all_reduce": True,
        },
    },
    # Few large collectives instead of many small ones; each has at least a layer's weights.
    "combine": {
        "gpu": {
            "xla_gpu_all_reduce_combine_threshold_bytes": 1 << 30,
            "xla_gpu_all_gather_combine_threshold_bytes": 1 << 30,
            "xla_gpu_reduce_scatter_combine_threshold_bytes": 1 << 27,
        },
    },
    # Matrix products in cuBLAS instead of Triton.
    "cublas": {"gpu": {"xla_gpu_enable_triton_gemm": False}},
    # More of a TPU core's vector memory (VMEM) per fusion.
    "vmem": {"tpu": {"xla_tpu_scoped_vmem_limit_kib": 98_304}},
}


def options(names: Sequence[str], platform: str) -> dict[str, Any]:
    """The compiler options of the named settings on a platform. Raises KeyError for an unknown name."""
    return {option: value for name in names for option, value in SETTINGS[name].get(platform, {}).items()}
