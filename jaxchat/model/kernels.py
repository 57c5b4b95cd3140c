"""Self-attention of whole rows: the backends of `BACKENDS` and their limits.

A backend takes q (B, T, H, D), k and v (B, T, K, D), segments (B, T) or None, and a window or None. It returns
(B, T, H, D) by the mask rule of `dense.visible`. Tokens must be in order, so that differences of indices equal
differences of positions, and a segment is one run of equal ids. Under a mesh each device computes its rows and heads.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as tpu

from jaxchat import sharding
from jaxchat.errors import UserError
from jaxchat.model.dense import Scores, attend_row

NAME = "attention"  # Checkpoint name of the outputs that the rematerialisation policy "attention" saves.
LANES = 128  # Width of a TPU's vectors; splash attention's blocks are multiples of it.
MOST_RUNS = 32  # Maximum documents per row for cuDNN: the memory it saves for the gradient grows with this number.
PACKED = ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type", "sliding_window_length")


Backend = Callable[..., jax.Array]


class AttentionCase(NamedTuple):
    """A backend's task and device; `capability` is an NVIDIA GPU's, e.g. 9.0; `present`, whether JAX has the device.

    `dense` and `dropout` are those of `part.Attends`.
    """

    platform: str
    dtype: Any
    head_dim: int
    segments: bool
    window: int | None = None
    capability: float = 0.0
    present: bool = True
    dense: str = ""
    dropout: bool = False


def unsupported(name: str, case: AttentionCase) -> str | None:
    """The reason why a backend cannot be used, as a clause for a message; None if it can."""
    if case.dense and name in _REASONS:
        return f"{name} cannot {case.dense}"
    if case.dropout and name in _REASONS and name != "filled":  # Decoding drops nothing.
        return f"{name} cannot drop attention weights"
    return _REASONS[name](name, case) if name in _REASONS else None


def _not_pallas(name: str, case: AttentionCase) -> str | None:
    if case.platform != "tpu":
        return f"{name} is a kernel for TPUs, but these devices are of platform {case.platform}"
    if jnp.dtype(case.dtype) not in (jnp.bfloat16, jnp.float32):
        return f"{name} computes in bfloat16 or float32, not in {jnp.dtype(case.dtype)}"
    return None


def _not_cudnn(name: str, case: AttentionCase) -> str | None:
    most = 256 if case.capability >= 9 else 128
    if case.platform != "gpu":
        return f"cudnn needs an NVIDIA GPU, but these devices are of platform {case.platform}"
    if not case.present:
        return "cudnn can only be compiled on a machine with the GPU"
    if jnp.dtype(case.dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cudnn computes in bfloat16 or float16, not in {jnp.dtype(case.dtype)}"
    if case.capability < 8:
        return f"cudnn needs an NVIDIA GPU of compute capability 8.0, but this one has {case.capability or 'none'}"
    if case.head_dim % 8 or case.head_dim > most:
        return f"cudnn needs a head_dim that is a multiple of 8 up to {most}, not {case.head_dim}"
    if case.segments and case.capability < 9:
        return f"cudnn isolates documents only from compute capability 9.0 on, but this GPU has {case.capability}"
    return _packing_problem() if case.segments else None


_REASONS: Mapping[str, Callable[[str, AttentionCase], str | None]] = {
    "splash": _not_pallas,
    "filled": _not_pallas,
    "cudnn": _not_cudnn,
}


def xla(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    segments_BT: jax.Array | None,
    window: int | None,
    *,
    scores: Scores | None = None,
    remat: bool = False,
) -> jax.Array:
    """Dense products, on any device, and the only backend that may change the `scores`.

    Float32 scores are saved for the gradient. With `remat` they are recomputed: memory plans use this for a fused
    kernel, which also saves no scores.
    """
    attend = functools.partial(_dense, window=window, scores=scores)
    return checkpoint_name((jax.checkpoint(attend) if remat else attend)(q_BTHD, k_BTKD, v_BTKD, segments_BT), NAME)


def _dense(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    segments_BT: jax.Array | None,
    window: int | None,
    scores: Scores | None = None,
) -> jax.Array:
    index_1T = jnp.arange(q_BTHD.shape[1], dtype=jnp.int32)[None]
    return attend_row(q_BTHD, k_BTKD, v_BTKD, index_1T, segments_BT, window=window, scores=scores)


def splash(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    segments_BT: jax.Array | None,
    window: int | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """JAX's Pallas kernel for TPUs, which skips blocks without visible keys; `interpret` runs it on any device.

    Rows are padded at the end to a multiple of 128 tokens; no real token sees the padding.
    """
    T, D = q_BTHD.shape[1], q_BTHD.shape[3]
    padding = -T % LANES

    def attend(q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array, *segments: jax.Array) -> jax.Array:
        heads_first = [jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2) for x in (k_BTKD, v_BTKD)]
        q_BHTD = jnp.pad(q_BTHD * D**-0.5, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)
        ids = [jnp.pad(ids_BT, ((0, 0), (0, padding)), constant_values=-1) for ids_BT in segments]
        kernel = _splash_kernel(q_BTHD.shape[2], T + padding, window, interpret)
        o_BHTD = jax.vmap(kernel)(q_BHTD, *heads_first, *(tpu.SegmentIds(ids_BT, ids_BT) for ids_BT in ids))
        return o_BHTD.swapaxes(1, 2)[:, :T]

    return _on_each_device(attend, q_BTHD, k_BTKD, v_BTKD, segments_BT)


@functools.cache
def _splash_kernel(heads: int, length: int, window: int | None, interpret: bool) -> Any:
    """The kernel for a mask. It holds host arrays, so that it can outlive the trace in which it is made."""
    whole = window is None or window >= length - 1
    shape = (length, length)
    mask = tpu.CausalMask(shape) if whole else tpu.LocalMask(shape, (window, 0), 0)
    make = functools.partial(
        tpu.make_splash_mha,
        mask=tpu.MultiHeadMask([mask] * heads),
        block_sizes=block_sizes(length, windowed=not whole),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=NAME,
        interpret=interpret,
    )
    return jax.tree.map(np.asarray, sharding.apart(make))


def block_sizes(length: int, *, windowed: bool) -> tpu.BlockSizes:
    """Splash attention's block sizes for rows of `length` tokens, a multiple of 128.

    Large blocks have less overhead per step; small ones compute less beyond the diagonal. The block is 1,024 from 4,096
    tokens on, otherwise 512, or the next smaller size that divides the row. Scores are computed for 512 keys at a time
    to fit a core's memory. The fused gradient computes scores once, but writes dq once per block of keys and visits
    blocks outside the window, so it is used for at most four blocks without a window.
    """
    most = 1024 if length >= 4096 else 512
    block = next(size for size in (most, 512, 256, LANES) if length % size == 0)
    compute = min(block, 512)
    fused = not windowed and length <= 4 * block
    own = None if fused else block
    return tpu.BlockSizes(block, block, compute, block, block, compute, own, own, use_fused_bwd_kernel=fused)


def cudnn(
    q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array, segments_BT: jax.Array | None, window: int | None
) -> jax.Array:
    """NVIDIA's fused attention: JAX's public function for whole rows, its packed layout for isolated documents."""

    def attend(q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array, *segments: jax.Array) -> jax.Array:
        if segments:
            return by_documents(_cudnn_packed, q_BTHD, k_BTKD, v_BTKD, *segments, window=window)
        local = None if window is None else (window, 0)
        return jax.nn.dot_product_attention(
            q_BTHD, k_BTKD, v_BTKD, is_causal=True, local_window_size=local, implementation="cudnn"
        )

    return checkpoint_name(_on_each_device(attend, q_BTHD, k_BTKD, v_BTKD, segments_BT), NAME)


def by_documents(
    packed: Callable[..., jax.Array],
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    segments_BT: jax.Array,
    *,
    window: int | None,
) -> jax.Array:
    """Calls `packed` with a batch and the starts and lengths of its documents.

    A batch with more than MOST_RUNS documents in a row is computed densely instead, row by row and recomputed for the
    gradient: slow, but with little memory and the same result.
    """
    runs = find_runs(segments_BT, MOST_RUNS)

    def fast(q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array) -> jax.Array:
        return packed(q_BTHD, k_BTKD, v_BTKD, runs.start_BN, runs.length_BN, window)

    @jax.checkpoint
    def row(arrays: tuple[jax.Array, ...]) -> jax.Array:
        q_1THD, k_1TKD, v_1TKD, segments_1T = (x[None] for x in arrays)
        return _dense(q_1THD, k_1TKD, v_1TKD, segments_1T, window)[0]

    def slow(q_BTHD: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array) -> jax.Array:
        return jax.lax.map(row, (q_BTHD, k_BTKD, v_BTKD, segments_BT))

    return jax.lax.cond(jnp.all(runs.count_B <= MOST_RUNS), fast, slow, q_BTHD, k_BTKD, v_BTKD)


class Runs(NamedTuple):
    """Runs of equal ids in each row: start and length, (B, most), -1 for unused entries, and their number, (B,)."""

    start_BN: jax.Array
    length_BN: jax.Array
    count_B: jax.Array


def find_runs(segments_BT: jax.Array, most: int) -> Runs:
    """Finds the first `most` runs of each row; `count_B` counts all of them."""
    T = segments_BT.shape[1]
    begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.vmap(lambda begins_T: jnp.nonzero(begins_T, size=most + 1, fill_value=T)[0])
    start_BN = first(begins_BT).astype(jnp.int32)
    length_BN = start_BN[:, 1:] - start_BN[:, :-1]
    exists_BN = length_BN > 0
    count_B = jnp.sum(begins_BT, axis=1)
    return Runs(jnp.where(exists_BN, start_BN[:, :-1], -1), jnp.where(exists_BN, length_BN, -1), count_B)


def _cudnn_packed(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    start_BN: jax.Array,
    length_BN: jax.Array,
    window: int | None,
) -> jax.Array:
    """cuDNN's attention within runs of tokens, which JAX offers only as a private function."""
    problem = _packing_problem()
    if problem is not None:
        raise UserError(f"{problem}: set --attention=xla")
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    # JAX before 0.12 computes wrong offsets for kv heads that are fewer than the heads, so they are repeated.
    G = q_BTHD.shape[2] // k_BTKD.shape[2]
    k_BTHD, v_BTHD = jnp.repeat(k_BTKD, G, axis=2), jnp.repeat(v_BTKD, G, axis=2)
    # One column more than lengths: JAX moves the starts of all rows together and appends the batch's end.
    offsets = jnp.pad(start_BN, ((0, 0), (0, 1)), constant_values=-1)
    return dot_product_attention(
        q_BTHD,
        k_BTHD,
        v_BTHD,
        q_seqlen=length_BN,
        kv_seqlen=length_BN,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=q_BTHD.shape[3] ** -0.5,
        mask_type=MaskType.PADDING_CAUSAL,
        sliding_window_length=None if window is None else window + 1,
    )


def _packing_problem() -> str | None:
    """The reason why JAX's private function for packed documents cannot be called; None if it can."""
    problem = f"JAX {jax.__version__} lacks the private function for packed cuDNN attention that jaxchat uses"
    try:
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention
    except ImportError as error:
        return f"{problem} ({error})"
    missing = set(PACKED) - set(inspect.signature(dot_product_attention).parameters)
    missing |= {"PADDING_CAUSAL"} - set(MaskType.__members__)
    return f"{problem} (without {', '.join(sorted(missing))})" if missing else None


def _on_each_device(
    attend: Callable[..., jax.Array],
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    segments_BT: jax.Array | None,
) -> jax.Array:
    """Runs `attend` on each device's rows and heads, with the segments if there are any."""
    G = q_BTHD.shape[2] // k_BTKD.shape[2]

    def own(q_BTHD: jax.Array, k_BTKD: jax.Array, *rest: jax.Array) -> jax.Array:
        if q_BTHD.shape[2] != G * k_BTKD.shape[2]:
            raise ValueError(f"{k_BTKD.shape[2]} kv heads cannot be split like the heads: set a smaller --mesh.tensor")
        return attend(q_BTHD, k_BTKD, *rest)

    each = ("batch", "length", "kv_heads", "head")
    segments = [] if segments_BT is None else [segments_BT]
    axes = [each, each, each, ("batch", "length")][: 3 + len(segments)]
    return sharding.on_each_device(own, [q_BTHD, k_BTKD, v_BTKD, *segments], axes)


BACKENDS: Mapping[str, Backend] = {
    "xla": xla,
    "xla_remat": functools.partial(xla, remat=True),
    "cudnn": cudnn,
    "splash": splash,
    "splash_interpreted": functools.partial(splash, interpret=True),
}
