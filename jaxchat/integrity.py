"""Whether the files and arrays of a checkpoint are those that were saved.

sizes.json has the size of each file and the hash of small ones; the arrays have checksums.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.data.cache import read_json, write_text

SIZES = "sizes.json"
CHECKSUMS = "checksums"  # Entry of a checkpoint's facts: those of the arrays of params and rest.
LARGE_TREE = 1 << 30  # Bytes of arrays from which checksums are computed one by one.
LARGE = 1 << 20  # Bytes from which a file is not hashed, because it holds arrays, which have checksums.

Files = dict[str, tuple[int, str | None]]  # Size and hash of a checkpoint's files, by relative name.


def record_files(directory: Path, steps: list[int], *, fresh: int) -> None:
    """Writes sizes.json for the checkpoints in `steps`; reads only the files of `fresh` and of unrecorded steps."""
    known = read_sizes(directory)
    recorded = {str(step): known.get(str(step)) for step in steps if step != fresh}
    sizes = {str(step): recorded.get(str(step)) or measure(directory / str(step)) for step in steps}
    write_text(directory.parent / SIZES, json.dumps(sizes, indent=1) + "\n")


def check_files(directory: Path, step: int, *, part: str = "") -> None:
    """Raises ValueError naming a file whose size, or whose hash if its name starts with `part`, has changed."""
    recorded = read_sizes(directory).get(str(step))
    if recorded is None:  # The run was killed between finishing the checkpoint and recording it.
        return
    paths = files_of(directory / str(step))
    digests = {}
    for name, entry in recorded.items():
        # Earlier versions recorded only the size.
        wanted, digests[name] = entry if isinstance(entry, list) else (entry, None)
        size = paths[name].stat().st_size if name in paths else 0
        if size != wanted:
            raise ValueError(f"{name} has {size} bytes, not {wanted}")
    checked = [name for name, digest in digests.items() if digest and name.startswith(part)]
    for name, digest in hashes({name: paths[name] for name in checked}).items():
        if digest != digests[name]:
            raise ValueError(f"{name} does not match its recorded hash")


def measure(directory: Path) -> Files:
    paths = files_of(directory)
    digests = hashes({name: path for name, path in paths.items() if path.stat().st_size < LARGE})
    return {name: (path.stat().st_size, digests.get(name)) for name, path in paths.items()}


def checksums(tree: Any) -> list[int]:
    """A checksum of the bits of each array of a tree; it does not depend on the sharding.

    Those of large trees are computed one at a time, because each takes as much memory as its array.
    """
    leaves = jax.tree.leaves(tree)
    if sum(leaf.nbytes for leaf in leaves) < LARGE_TREE:
        return [int(one) for one in np.asarray(_checksums(leaves))]
    return [int(np.asarray(_checksums([leaf]))[0]) for leaf in leaves]


def all_finite(params: Any) -> jax.Array:
    """Whether all parameters are finite, and the sum of the squares of each array is in float32.

    Larger ones are infinity in a norm, which then makes zeros of everything: all tokens are equally likely.
    """
    sums = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(params)]
    return jnp.all(jnp.isfinite(jnp.stack(sums)))


@jax.jit
def _checksums(leaves: list[jax.Array]) -> jax.Array:
    """Sums of bits * (2 * index + 1) modulo 2^32, (leaves,): a change of one element never leaves a sum the same."""

    def add(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        weight, stride = jnp.ones(x.shape, jnp.uint32), 2
        for axis in reversed(range(x.ndim)):
            weight += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= x.shape[axis]
        return jnp.sum(bits.astype(jnp.uint32) * weight, dtype=jnp.uint32)

    return jnp.stack([add(x) for x in leaves])


def verify(facts: dict[str, Any], **parts: Any) -> None:
    """Raises ValueError naming an array of params or rest that differs from what was saved with checksums."""
    for part, tree in parts.items():
        if (saved := facts.get(CHECKSUMS, {}).get(part)) is not None:
            paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
            for path, before, now in zip(paths, saved, checksums(tree), strict=True):
                if before != now:
                    raise ValueError(f"{part}{path} does not match its recorded checksum")


def files_of(directory: Path) -> dict[str, Path]:
    """Every file below a directory, by its relative name."""
    return {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}


def hashes(paths: dict[str, Path]) -> dict[str, str]:
    """BLAKE2b hashes of files, by name."""
    digests = {}
    for name, path in paths.items():
        with path.open("rb") as file:
            digests[name] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return digests


def read_sizes(directory: Path) -> dict[str, Any]:
    value = read_json(directory.parent / SIZES)
    return value if isinstance(value, dict) else {}
