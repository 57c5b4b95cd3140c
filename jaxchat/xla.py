"""XLA's settings by platform, one table, taken by name: what is not a default yet, or was measured to be better."""

from collections.abc import Mapping, Sequence
from typing import Any

Options = Mapping[str, bool | int]

# Each row by platform. Sources: MaxText's benchmarks/xla_flags_library.py for TPUs, JAX's GPU performance tips and
# NVIDIA's JAX-Toolbox for GPUs; sizes are those of their dense models.
SETTINGS: Mapping[str, Mapping[str, Options]] = {
    # Collectives run beside the computation that does not need them.
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
    # Few large collectives and not many small ones; at least a layer's weights each.
    "combine": {
        "gpu": {
            "xla_gpu_all_reduce_combine_threshold_bytes": 1 << 30,
            "xla_gpu_all_gather_combine_threshold_bytes": 1 << 30,
            "xla_gpu_reduce_scatter_combine_threshold_bytes": 1 << 27,
        },
    },
    # Matrix products by cuBLAS, not by Triton.
    "cublas": {"gpu": {"xla_gpu_enable_triton_gemm": False}},
    # More of a TPU core's own memory for a fusion.
    "vmem": {"tpu": {"xla_tpu_scoped_vmem_limit_kib": 98_304}},
}


def options(names: Sequence[str], platform: str) -> dict[str, Any]:
    """The compiler's options of some rows on a platform; raises KeyError for a row that there is not."""
    return {name: value for row in names for name, value in SETTINGS[row].get(platform, {}).items()}
