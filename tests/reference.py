"""Float64 NumPy references, written from the equations and not from jaxchat: the oracles of test_parity.py.

Letters: B batch  T query  S key  M width  H heads  K kv heads  D head  V vocab  N tokens. `*_OI` matrices are stored
(out, in) as torch stores them. Loops are plain on purpose. tests/golden/README.md says how each was itself checked.
"""

import math
from typing import NamedTuple

import numpy as np

Array = np.ndarray

POLAR_EXPRESS = (  # arXiv:2505.16932, five iterations, safety factor 2e-2, cushion 2
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def sees(q_position: int, k_position: int, q_segment: int, k_segment: int, window: int | None) -> bool:
    """The one mask rule: same segment, 0 <= k <= q, and with a window of W the last W + 1 keys."""
    if q_segment != k_segment or not 0 <= k_position <= q_position:
        return False
    return window is None or k_position > q_position - 1 - window


def attention(
    q_BTHD: Array,
    k_BSKD: Array,
    v_BSKD: Array,
    *,
    q_positions_BT: Array,
    k_positions_BS: Array,
    q_segments_BT: Array | None = None,
    k_segments_BS: Array | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Array:
    """Softmax attention one query at a time; a query that sees no key (position -1) gives zeros."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTHD, k_BSKD, v_BSKD))
    rows, length, heads, size = q.shape
    group = heads // k.shape[2]
    scale = size**-0.5 if scale is None else scale
    q_segments = np.zeros((rows, length), int) if q_segments_BT is None else q_segments_BT
    k_segments = np.zeros(k.shape[:2], int) if k_segments_BS is None else k_segments_BS
    out = np.zeros((rows, length, heads, v.shape[-1]))
    for b in range(rows):
        for t in range(length):
            query = (q_positions_BT[b, t], q_segments[b, t])
            visible = [
                s for s in range(k.shape[1]) if sees(query[0], k_positions_BS[b, s], query[1], k_segments[b, s], window)
            ]
            for h in range(heads if visible else 0):
                scores = np.array([scale * (q[b, t, h] @ k[b, s, h // group]) for s in visible])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[b, t, h] = sum(w * v[b, s, h // group] for w, s in zip(weights, visible, strict=True))
    return out


def rms_norm(x: Array, eps: float) -> Array:
    """Norm over the last axis without a weight."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def rotate(x_TD: Array, positions_T: Array, base: float) -> Array:
    """RoPE with halves as pairs, turning by minus the angle as nanochat does."""
    half = x_TD.shape[-1] // 2
    out = np.empty_like(x_TD)
    for i in range(half):
        angle_T = positions_T * base ** (-i / half)
        first, second = x_TD[:, i], x_TD[:, half + i]
        out[:, i] = np.cos(angle_T) * first + np.sin(angle_T) * second
        out[:, half + i] = np.cos(angle_T) * second - np.sin(angle_T) * first
    return out


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


class HeadConfig(NamedTuple):
    """What a nanochat HEAD checkpoint does not say by its shapes. A window of W sees W + 1 keys."""

    heads: int
    kv_heads: int
    windows: tuple[int | None, ...]
    rope_base: float = 100_000.0
    qk_scale: float = 1.2
    softcap: float = 15.0
    eps: float = 2.0**-23


def head_attention(w: dict[str, Array], i: int, x_TM: Array, tokens_T: Array, config: HeadConfig) -> Array:
    """Layer i's attention on its normed input: value embedding, RoPE then norm, both q and k scaled."""
    length, prefix = len(tokens_T), f"transformer.h.{i}.attn."
    q_THD = (x_TM @ w[prefix + "c_q.weight"].T).reshape(length, config.heads, -1)
    k_TKD = (x_TM @ w[prefix + "c_k.weight"].T).reshape(length, config.kv_heads, -1)
    v_TKD = (x_TM @ w[prefix + "c_v.weight"].T).reshape(length, config.kv_heads, -1)
    if f"value_embeds.{i}.weight" in w:
        embedding_TKD = w[f"value_embeds.{i}.weight"][tokens_T].reshape(v_TKD.shape)
        gate_TK = 3 * sigmoid(x_TM[:, :12] @ w[prefix + "ve_gate.weight"].T)
        v_TKD = v_TKD + gate_TK[:, :, None] * embedding_TKD
    positions_T = np.arange(length)
    for x in (q_THD, k_TKD):
        for h in range(x.shape[1]):
            x[:, h] = config.qk_scale * rms_norm(rotate(x[:, h], positions_T, config.rope_base), config.eps)
    positions_1T = positions_T[None]
    y_THD = attention(
        q_THD[None],
        k_TKD[None],
        v_TKD[None],
        q_positions_BT=positions_1T,
        k_positions_BS=positions_1T,
        window=config.windows[i],
    )[0]
    return y_THD.reshape(length, -1) @ w[prefix + "c_proj.weight"].T


def head_forward(weights: dict[str, Array], tokens_BT: Array, config: HeadConfig) -> Array:
    """Logits (B, T, V) of nanochat HEAD (92d63d4) after the softcap; weights under nanochat's state-dict names."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    depth = len(w["resid_lambdas"])
    rows = []
    for tokens_T in np.asarray(tokens_BT):
        x = rms_norm(w["transformer.wte.weight"][tokens_T], config.eps)
        smeared = x.copy()
        for t in range(1, len(tokens_T)):
            gate = w["smear_lambda"][0] * sigmoid(x[t, :24] @ w["smear_gate.weight"][0])
            smeared[t] = x[t] + gate * x[t - 1]
        x = x0 = smeared
        middle = np.zeros_like(x)
        for i in range(depth):
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
            x = x + head_attention(w, i, rms_norm(x, config.eps), tokens_T, config)
            hidden = np.maximum(rms_norm(x, config.eps) @ w[f"transformer.h.{i}.mlp.c_fc.weight"].T, 0) ** 2
            x = x + hidden @ w[f"transformer.h.{i}.mlp.c_proj.weight"].T
            if i == depth // 2:
                middle = x
        x = rms_norm(x - w["backout_lambda"][0] * middle, config.eps)
        rows.append(config.softcap * np.tanh(x @ w["lm_head.weight"].T / config.softcap))
    return np.stack(rows)


class Loss(NamedTuple):
    """Weighted sum of nats and its gradients; divide by the sum of the weights for the mean."""

    total: float
    hidden_NM: Array
    head_MV: Array


def cross_entropy(hidden_NM: Array, head_MV: Array, targets_N: Array, weights_N: Array, softcap: float | None) -> Loss:
    """Cross-entropy of softcap*tanh(hidden @ head / softcap) token by token, with gradients by the chain rule."""
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden_NM, head_MV, weights_N))
    total, hidden_gradient, head_gradient = 0.0, np.zeros_like(hidden), np.zeros_like(head)
    for n, target in enumerate(targets_N):
        raw = hidden[n] @ head
        capped = raw if softcap is None else softcap * np.tanh(raw / softcap)
        slope = np.ones_like(raw) if softcap is None else 1 - np.tanh(raw / softcap) ** 2
        shifted = np.exp(capped - capped.max())
        probabilities = shifted / shifted.sum()
        total -= weights[n] * (capped[target] - capped.max() - math.log(shifted.sum()))
        gradient = probabilities.copy()
        gradient[target] -= 1
        gradient *= weights[n] * slope
        hidden_gradient[n] = head @ gradient
        head_gradient += np.outer(hidden[n], gradient)
    return Loss(total, hidden_gradient, head_gradient)


def orthogonalise(x_OI: Array, coefficients: tuple[tuple[float, float, float], ...] = POLAR_EXPRESS) -> Array:
    """Quintic iteration X <- aX + (bA + cA^2)X with A = XX^T, or its mirror image where X is tall."""
    tall = x_OI.shape[0] > x_OI.shape[1]
    x = x_OI.T if tall else x_OI
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class MuonState(NamedTuple):
    momentum_OI: Array
    second: Array  # (out, 1) where out >= in, else (1, in)


def muon_init(matrix_OI: Array) -> MuonState:
    rows, columns = matrix_OI.shape
    return MuonState(np.zeros((rows, columns)), np.zeros((rows, 1) if rows >= columns else (1, columns)))


def muon_step(
    matrix_OI: Array,
    gradient_OI: Array,
    state: MuonState,
    *,
    rate: float,
    momentum: float,
    decay: float,
    beta2: float = 0.9,
) -> tuple[Array, MuonState]:
    """One step of nanochat HEAD's Muon on one matrix: the new matrix and state. `rate` is before the shape factor.

    Nesterov; MuonEq row equilibration (arXiv:2603.28254); Polar Express; Muon+ (arXiv:2602.21545); NorMuon
    (arXiv:2510.05491); cautious decoupled weight decay.
    """
    rows, columns = matrix_OI.shape
    buffer = momentum * state.momentum_OI + (1 - momentum) * gradient_OI
    update = momentum * buffer + (1 - momentum) * gradient_OI

    mean_norm = np.linalg.norm(update) / math.sqrt(rows)
    update = update * (mean_norm / np.maximum(np.linalg.norm(update, axis=1, keepdims=True), 1e-6))
    update = orthogonalise(update / (1.01 * np.linalg.norm(update) + 1e-6))
    update = update * (math.sqrt(min(rows, columns)) / max(np.linalg.norm(update), 1e-6))

    axis = 1 if rows >= columns else 0
    mean_square = np.mean(update**2, axis=axis, keepdims=True)
    second = beta2 * state.second + (1 - beta2) * mean_square
    step = 1 / np.sqrt(np.maximum(second, 1e-10))
    before = math.sqrt(np.sum(mean_square) * update.shape[axis])
    after = math.sqrt(np.sum(mean_square * step**2) * update.shape[axis])
    update = update * step * (before / max(after, 1e-10))

    rate = rate * math.sqrt(max(1.0, rows / columns))
    shrink = rate * decay * matrix_OI * (update * matrix_OI >= 0)
    return matrix_OI - rate * update - shrink, MuonState(buffer, second)


class AdamState(NamedTuple):
    count: int
    first: Array
    second: Array


def adamw_init(value: Array) -> AdamState:
    return AdamState(0, np.zeros(np.shape(value)), np.zeros(np.shape(value)))


def adamw_step(
    value: Array,
    gradient: Array,
    state: AdamState,
    *,
    rate: float,
    betas: tuple[float, float],
    decay: float,
    eps: float = 1e-10,
) -> tuple[Array, AdamState]:
    """AdamW: decay applied before the update, both moments corrected for bias, eps outside the root."""
    count = state.count + 1
    first = betas[0] * state.first + (1 - betas[0]) * gradient
    second = betas[1] * state.second + (1 - betas[1]) * gradient**2
    decayed = value * (1 - rate * decay)
    root = np.sqrt(second / (1 - betas[1] ** count))
    return decayed - rate * (first / (1 - betas[0] ** count)) / (root + eps), AdamState(count, first, second)


class Group(NamedTuple):
    """Base rates of one AdamW group of nanochat HEAD; `width_scaled` ones are multiplied by (width / 768)^-0.5."""

    rate: float
    betas: tuple[float, float]
    decay: float
    width_scaled: bool
    batch_scaled: bool


GROUPS = {
    "lm_head": Group(0.008, (0.8, 0.96), 0.01, True, True),
    "wte": Group(0.3, (0.8, 0.995), 0.001, True, True),
    "value_embeds": Group(0.15, (0.8, 0.995), 0.01, True, True),
    "resid_lambdas": Group(0.005, (0.8, 0.95), 0.05, False, True),
    "x0_lambdas": Group(0.5, (0.96, 0.95), 0.0, False, True),
    "smear_gate": Group(0.2, (0.8, 0.95), 0.0, False, False),
    "smear_lambda": Group(0.2, (0.8, 0.95), 0.0, False, False),
    "backout_lambda": Group(0.2, (0.8, 0.95), 0.0, False, False),
}
MUON_RATE = 0.02


def learning_rate_factor(step: int, steps: int, warmup: int = 40, ratio: float = 0.65, final: float = 0.05) -> float:
    """Linear warm-up, constant, linear warm-down to `final` over the last `ratio` of the run; step counts from 0."""
    warmdown = round(ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if step <= steps - warmdown:
        return 1.0
    left = (steps - step) / warmdown
    return left + (1 - left) * final


def muon_momentum(step: int, steps: int, ratio: float = 0.65) -> float:
    """0.85 to 0.97 over 400 steps, then 0.97, then to 0.90 over the warm-down; short runs only rise."""
    warmdown = round(ratio * steps)
    start = steps - warmdown
    if step < 400:
        return 0.85 + (0.97 - 0.85) * step / 400
    if step >= start:
        return 0.97 - (0.97 - 0.90) * (step - start) / warmdown
    return 0.97


def muon_decay_factor(step: int, steps: int) -> float:
    """Cosine to zero over the run."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


class Size(NamedTuple):
    """Published or derived sizes of nanochat HEAD at vocabulary 32,768, head size 128 and rows of 2,048 tokens."""

    depth: int
    width: int
    heads: int
    parameters: int
    scaling_parameters: int
    flops_per_token: int


SIZES = (
    Size(4, 256, 2, 36_700_242, 11_534_384, 80_216_496),
    Size(8, 512, 4, 125_829_354, 41_943_232, 295_699_728),
    Size(12, 768, 6, 286_261_730, 110_100_912, 759_696_048),
    Size(16, 1024, 8, 536_871_738, 234_881_792, 1_585_451_664),
    Size(20, 1280, 10, 896_533_746, 435_160_240, 2_886_212_784),
    Size(24, 1536, 12, 1_384_122_122, 729_810_624, 4_775_225_616),
    Size(26, 1664, 13, 1_681_786_938, 918_423_532, 5_991_051_288),
    Size(32, 2048, 16, 2_818_575_450, 1_677_724_672, 10_770_991_248),
)


class Horizon(NamedTuple):
    """What the dial derives from depth and the ratio of training tokens to scaling parameters."""

    depth: int
    ratio: float
    batch_tokens: int
    steps: int
    rate_factor: float
    decay: float


HORIZONS = (
    Horizon(4, 8, 262_144, 352, 0.7071, 1.89),
    Horizon(4, 12, 262_144, 528, 0.7071, 1.89),
    Horizon(12, 8, 524_288, 1_680, 1.0, 0.28),
    Horizon(12, 12, 524_288, 2_520, 1.0, 0.28),
    Horizon(20, 8, 1_048_576, 3_320, 1.4142, 0.10019),
    Horizon(24, 8, 1_048_576, 5_568, 1.4142, 0.05974),
    Horizon(24, 12, 1_048_576, 8_352, 1.4142, 0.05974),
    Horizon(26, 8, 1_048_576, 7_007, 1.4142, 0.04747),
    Horizon(32, 12, 2_097_152, 9_600, 2.0, 0.03675),
)


def size(depth: int, vocab: int = 32_768, row_length: int = 2_048, head_size: int = 128) -> Size:
    """The sizes by formula: pattern SSSL, a quarter window rounded up to 128, last layer full, vocab not padded."""
    width = math.ceil(64 * depth / head_size) * head_size
    heads = width // head_size
    embeddings = (depth + 1) // 2
    matrices = 12 * width * width * depth + embeddings * 12 * heads
    head = vocab * width
    scalars = 2 * depth + 24 + 2
    short = math.ceil(row_length / 4 / 128) * 128
    windows = [row_length if i % 4 == 3 or i == depth - 1 else min(short, row_length) for i in range(depth)]
    flops = 6 * (matrices + head + 24) + sum(12 * width * window for window in windows)
    return Size(depth, width, heads, head * (2 + embeddings) + matrices + scalars, matrices + head, flops)


def horizon(depth: int, ratio: float, *, batch_tokens: int | None = None, **dial: int) -> Horizon:
    """nanochat HEAD's horizon, batch (arXiv:2505.13738), rate and weight decay (arXiv:2405.13698) from the dial."""
    target = int(ratio * size(depth, **dial).scaling_parameters)
    reference = ratio * size(12, **dial).scaling_parameters
    batch = batch_tokens or 2 ** round(math.log2(2**19 * (target / reference) ** 0.383))
    rate = math.sqrt(batch / 2**19)
    return Horizon(depth, ratio, batch, target // batch, rate, 0.28 * rate * reference / target)
