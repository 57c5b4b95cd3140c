"""Every test runs on eight virtual CPU devices, with rank promotion an error and compiled programs kept on disk.

Programs are compiled without the compiler's costly passes, which saves more than half of the suite's time: tests hold
relations, and small programs run fast enough as they are. A test of what the compiler makes asks for `optimized`.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from jaxchat import devices

# Making machine code is half of the time of these tests without this; commands that tests start inherit it. XLA ends a
# process that names a flag it does not know, and JAX 0.12 brought one that does not know these.
if jax.__version_info__ < (0, 11):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")

# Read by the commands that tests start; here JAX is imported by now.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_disable_most_optimizations", True)

# A CPU's peak is measured by every run; once is enough for the many that a test process starts.
devices._measured_peak = functools.cache(devices._measured_peak)


def pytest_configure(config: pytest.Config) -> None:
    """Tests run on the CPU, whatever there is; those that `-m gpu` asks for, on a GPU."""
    jax.config.update("jax_platforms", None if config.option.markexpr == "gpu" else "cpu")


@pytest.fixture
def optimized() -> Iterator[None]:
    """Programs as users compile them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
