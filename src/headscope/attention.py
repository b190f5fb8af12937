"""The maths of attention on plain arrays: weights from what entered the softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

LIMIT_EXACT = 1e-4
LIMIT_16_BITS = 2e-2
_CHECKED_ROWS = 16

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


def logits(
    q: Floats,
    k: Floats,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Floats | None = None,
    rounding: np.dtype[Any] | None = None,
) -> Floats:
    """Attention logits of every head before the mask, softcap(scale · q kᵀ) + bias.

    Where a kernel keeps its scores in 16 bits between these operations, `rounding` is that dtype.

    Shapes:
        q: (batch, heads, queries, dim)
        k: (batch, kv_heads, keys, dim), kv_heads divides heads
        bias: broadcasts to (batch, heads, queries, keys)
        returns: (batch, heads, queries, keys) float32
    Raises:
        ValueError: q and k differ in batch or dim, or kv_heads does not divide heads.
    Source:
        Vaswani et al. 2017, eq. 1; shared keys as in Ainslie et al. 2023; softcap as in Gemma 2, 2024, section 2.
    """
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q must be (batch, heads, queries, dim) and k (batch, kv_heads, keys, dim) with equal batch and dim and "
            f"kv_heads a divisor of heads; got q {q.shape} and k {k.shape}"
        )
    groups = q.shape[1] // k.shape[1]
    grouped = q.astype(np.float32).reshape(q.shape[0], k.shape[1], groups * q.shape[2], q.shape[3])
    scores = grouped @ k.astype(np.float32).swapaxes(-1, -2)
    scores = scores.reshape(q.shape[0], q.shape[1], q.shape[2], k.shape[2])

    def rounded(scores: Floats) -> Floats:
        return scores if rounding is None else scores.astype(rounding).astype(np.float32)

    scores = rounded(rounded(scores) * np.float32(scale))
    if softcap is not None:
        scores = rounded(np.float32(softcap) * rounded(np.tanh(rounded(scores / np.float32(softcap)))))
    if bias is not None:
        scores = rounded(scores + bias.astype(np.float32))
    return scores


def rounding_of(route: str, dtype: str) -> np.dtype[Any] | None:
    """The dtype that a kernel rounds its scores to between operations; None where it keeps them in float32.

    Source:
        transformers 5 `eager_attention_forward`: matmul, scale and mask run one by one in the dtype of q. Fused
        kernels keep scores in float32.
    """
    kept = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
    return kept.get(dtype) if route == "transformers:eager" else None


def allowed(
    queries: int,
    keys: int,
    *,
    mask: Bools | None = None,
    causal: bool = False,
    offset: int = 0,
    window: int | None = None,
    rows: NDArray[np.int64] | None = None,
) -> Bools | None:
    """Where a query may attend, or None if everywhere.

    Shapes:
        mask: broadcasts to (batch, heads, queries, keys); true means may attend
        rows: (chosen,) the query indices that are wanted; all, if None
        returns: broadcasts to (batch, heads, queries or chosen, keys)
    Args:
        causal: query i sees keys up to i + offset.
        window: and of those only the last `window`.
    """
    if mask is not None and rows is not None and mask.shape[2] != 1:
        mask = mask[:, :, rows]
    if not causal and window is None:
        return mask
    last = (np.arange(queries) if rows is None else rows)[:, None] + offset
    key = np.arange(keys)[None, :]
    seen = key <= last if causal else np.ones((len(last), keys), bool)
    if window is not None:
        seen = seen & (key > last - window)
    return seen[None, None] if mask is None else mask & seen


@np.errstate(invalid="ignore", over="ignore")
def weights(
    q: Floats,
    k: Floats,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Floats | None = None,
    sinks: Floats | None = None,
    mask: Bools | None = None,
    causal: bool = False,
    offset: int = 0,
    window: int | None = None,
    rows: NDArray[np.int64] | None = None,
    rounding: np.dtype[Any] | None = None,
) -> Floats:
    """Attention weights of every head, before dropout.

    A query that may attend to nothing has a row of zeros. Other rows sum to 1, or with sinks to less.

    Shapes:
        q, k, bias: as in `logits`; mask and rows: as in `allowed`
        sinks: (heads,) a logit per head that takes part in the softmax and gets no value
        returns: (batch, heads, queries or chosen rows, keys) float32
    Source:
        Vaswani et al. 2017, eq. 1; sinks as in gpt-oss, transformers 5 `modeling_gpt_oss.eager_attention_forward`.
    """
    queries, keys = q.shape[2], k.shape[2]
    if rows is not None:
        q = q[:, :, rows]
        if bias is not None and bias.shape[2] != 1:
            bias = bias[:, :, rows]
    scores = logits(q, k, scale=scale, softcap=softcap, bias=bias, rounding=rounding)
    seen = allowed(queries, keys, mask=mask, causal=causal, offset=offset, window=window, rows=rows)
    if seen is not None:
        scores = np.where(seen, scores, np.float32(-np.inf))
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(np.float32).reshape(1, -1, 1, 1)
        top = np.maximum(top, sink)
    top = np.where(np.isneginf(top), np.float32(0), top)
    scores = np.exp(scores - top)
    total = scores.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sink - top)
    return np.asarray(np.divide(scores, total, out=np.zeros_like(scores), where=total != 0), np.float32)


@np.errstate(invalid="ignore", over="ignore")
def disagreement(attended: Floats, v: Floats, output: Floats) -> float:
    """How far weights · v is from what the kernel returned, relative, worst head.

    Shapes:
        attended: (batch, heads, rows, keys) weights
        v: (batch, kv_heads, keys, dim)
        output: (batch, heads, rows, dim)
    Returns:
        The largest over heads of max |weights · v - output| / max |output|; inf where a number is not finite, nan
        where no row attends to anything.
    """
    batch, heads, rows, keys = attended.shape
    grouped = attended.reshape(batch, v.shape[1], -1, keys)
    rebuilt = (grouped @ v.astype(np.float32)).reshape(batch, heads, rows, v.shape[3])
    output = output.astype(np.float32)
    live = attended.any(axis=-1, keepdims=True)
    if not live.any():
        return float("nan")
    size = np.abs(np.where(live, output, 0)).max(axis=(0, 2, 3))
    # For rows that attend to nothing kernels return zeros, NaN, or the mean over keys; anything else was attention.
    mean = np.repeat(v.astype(np.float32).mean(axis=2, keepdims=True), heads // v.shape[1], axis=1)
    slack = LIMIT_16_BITS * np.maximum(size[:, None, None], np.abs(mean))
    idle = np.isnan(output) | (np.abs(output) <= slack) | (np.abs(output - mean) <= slack)
    off = np.abs(np.where(live, rebuilt - output, np.where(idle, 0, np.inf))).max(axis=(0, 2, 3))
    error = float((off / np.maximum(size, np.float32(1e-30))).max())
    return error if np.isfinite(error) else float("inf")


def heaviest(attended: Floats, top: int) -> tuple[NDArray[np.int32], Floats]:
    """The `top` heaviest keys of each row and their weights, heaviest first.

    Shapes:
        attended: (..., keys)
        returns: two arrays (..., min(top, keys)); key is -1 where the weight is 0
    """
    top = min(top, attended.shape[-1])
    if top < attended.shape[-1]:
        key = np.argpartition(-attended, top - 1, axis=-1)[..., :top]
    else:
        key = np.broadcast_to(np.arange(top), attended.shape)
    weight = np.take_along_axis(attended, key, axis=-1)
    order = np.argsort(-weight, axis=-1, kind="stable")
    weight = np.take_along_axis(weight, order, axis=-1)
    key = np.take_along_axis(key, order, axis=-1)
    return np.where(weight > 0, key, -1).astype(np.int32), weight


def rows_to_check(queries: int) -> NDArray[np.int64]:
    """Query rows for the self-check: evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, queries - 1, min(queries, _CHECKED_ROWS)).round().astype(np.int64))


def self_check(call: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> float:
    """How far rebuilt weights · v are from the kernel's own output on the checked rows; relative, worst head.

    Shapes:
        tensors: q, k, v, output and, where the call has them, mask, bias, sinks, as `docs/format.md` has them
    Args:
        call: its facts, as in `docs/format.md`.
        tensors: by kind.
    """
    example = call["check"]["example"]
    picked: dict[str, Any] = {}
    for kind in ("mask", "bias"):
        tensor = tensors.get(kind)
        picked[kind] = tensor if tensor is None or tensor.shape[0] == 1 else tensor[example : example + 1]
    attended = weights(
        tensors["q"][example : example + 1],
        tensors["k"][example : example + 1],
        sinks=tensors.get("sinks"),
        rows=np.array(call["check"]["rows"], np.int64),
        rounding=rounding_of(call.get("route", ""), call.get("dtype", "")),
        **{name: call[name] for name in ("scale", "softcap", "causal", "offset", "window")},
        **picked,
    )
    return disagreement(attended, tensors["v"], tensors["output"])
