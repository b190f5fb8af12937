import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from headscope import attention

torch.set_num_threads(1)

Array = NDArray[Any]
BATCH, HEADS, QUERIES, KEYS, DIM = 2, 4, 7, 9, 8


def arrays(
    kv_heads: int = HEADS, queries: int = QUERIES, keys: int = KEYS, seed: int = 0
) -> tuple[Array, Array, Array]:
    """q, k, v with attention far from uniform."""
    rng = np.random.default_rng(seed)
    q = 2 * rng.standard_normal((BATCH, HEADS, queries, DIM)).astype(np.float32)
    k = 2 * rng.standard_normal((BATCH, kv_heads, keys, DIM)).astype(np.float32)
    v = rng.standard_normal((BATCH, kv_heads, keys, DIM)).astype(np.float32)
    return q, k, v


def oracle(
    q: Array,
    k: Array,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Array | None = None,
    sinks: Array | None = None,
    seen: Array | None = None,
) -> Array:
    """Weights by torch in float64, heads one by one, sinks as a column of their own."""
    rows = []
    groups = q.shape[1] // k.shape[1]
    full = np.ones((q.shape[0], q.shape[1], q.shape[2], k.shape[2]), bool)
    full = full if seen is None else full & seen
    added = np.zeros(full.shape) if bias is None else np.broadcast_to(bias, full.shape)
    for head in range(q.shape[1]):
        one = torch.from_numpy(q[:, head]).double() @ torch.from_numpy(k[:, head // groups]).double().transpose(1, 2)
        one = one * scale
        if softcap is not None:
            one = torch.tanh(one / softcap) * softcap
        one = one + torch.from_numpy(added[:, head].astype(np.float64))
        one = one.masked_fill(~torch.from_numpy(full[:, head].copy()), -math.inf)
        if sinks is not None:
            column = torch.full((*one.shape[:2], 1), float(sinks[head]), dtype=torch.float64)
            one = torch.cat([one, column], dim=-1)
        one = torch.nan_to_num(torch.softmax(one, dim=-1), nan=0.0)
        rows.append(one[..., : k.shape[2]].numpy())
    return np.stack(rows, axis=1)


def kernel_of(*tensors: Array, **named: Any) -> Array:
    """What torch's own kernel returns."""
    kernel: Any = F.scaled_dot_product_attention
    found: Array = kernel(*map(torch.from_numpy, tensors), **named).numpy()
    return found


def far_from_uniform(found: Array) -> bool:
    return bool(np.abs(found - 1 / found.shape[-1]).max() > 0.3)


@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
def test_weights_equal_torch_softmax_and_the_kernels_output(kv_heads: int) -> None:
    q, k, v = arrays(kv_heads)
    found = attention.weights(q, k, scale=DIM**-0.5)
    assert found.dtype == np.float32
    assert found.shape == (BATCH, HEADS, QUERIES, KEYS)
    assert far_from_uniform(found)
    np.testing.assert_allclose(found, oracle(q, k, scale=DIM**-0.5), atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
    kernel = kernel_of(q, k, v, enable_gqa=kv_heads != HEADS)
    assert attention.disagreement(found, v, kernel) < 1e-5


def test_a_scale_of_its_own_and_16_bit_inputs() -> None:
    q, k, v = arrays()
    found = attention.weights(q.astype(np.float16), k.astype(np.float16), scale=0.5)
    assert found.dtype == np.float32
    rounded = oracle(q.astype(np.float16).astype(np.float32), k.astype(np.float16).astype(np.float32), scale=0.5)
    np.testing.assert_allclose(found, rounded, atol=1e-6)
    kernel = kernel_of(q, k, v, scale=0.5)
    assert attention.disagreement(attention.weights(q, k, scale=0.5), v, kernel) < 1e-5


@pytest.mark.parametrize(
    "shape", [(BATCH, 1, 1, KEYS), (1, HEADS, QUERIES, KEYS), (1, 1, 1, 1), (BATCH, 1, QUERIES, 1)]
)
def test_a_mask_that_broadcasts(shape: tuple[int, ...]) -> None:
    q, k, v = arrays()
    mask = np.random.default_rng(1).random(shape) < 0.6
    mask.reshape(-1)[0] = True
    found = attention.weights(q, k, scale=0.3, mask=mask)
    np.testing.assert_allclose(found, oracle(q, k, scale=0.3, seen=mask), atol=1e-6)
    assert not found[~np.broadcast_to(mask, found.shape)].any()
    kernel = kernel_of(q, k, v, attn_mask=torch.from_numpy(mask.copy()).expand(found.shape), scale=0.3)
    live = np.broadcast_to(mask, found.shape).any(-1)
    rebuilt = found @ v
    np.testing.assert_allclose(rebuilt[live], kernel[live], atol=1e-5)


def test_causal_equals_the_kernels_own_causal() -> None:
    q, k, v = arrays(queries=KEYS)
    found = attention.weights(q, k, scale=DIM**-0.5, causal=True)
    kernel = kernel_of(q, k, v, is_causal=True)
    assert attention.disagreement(found, v, kernel) < 1e-5
    assert not np.triu(found, 1).any()


@pytest.mark.parametrize("offset", [0, 2, -1])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_causal_with_offset_and_window(offset: int, window: int | None, causal: bool) -> None:
    q, k, _ = arrays()
    seen = np.zeros((QUERIES, KEYS), bool)
    for query in range(QUERIES):
        for key in range(KEYS):
            last = query + offset
            seen[query, key] = (not causal or key <= last) and (window is None or key > last - window)
    found = attention.weights(q, k, scale=0.3, causal=causal, offset=offset, window=window)
    np.testing.assert_allclose(found, oracle(q, k, scale=0.3, seen=seen), atol=1e-6)


def test_a_mask_narrows_causal() -> None:
    q, k, _ = arrays(queries=KEYS)
    mask = np.ones((BATCH, 1, 1, KEYS), bool)
    mask[1, ..., :3] = False
    seen = np.tril(np.ones((KEYS, KEYS), bool)) & mask
    found = attention.weights(q, k, scale=0.3, mask=mask, causal=True)
    np.testing.assert_allclose(found, oracle(q, k, scale=0.3, seen=seen), atol=1e-6)
    assert not found[1, :, :3].any(), "queries whose every key is padding attend to nothing"


def test_bias_is_added_after_the_softcap() -> None:
    q, k, v = arrays()
    bias = np.random.default_rng(2).standard_normal((1, HEADS, QUERIES, KEYS)).astype(np.float32) * 3
    found = attention.weights(q, k, scale=1.0, softcap=2.0, bias=bias)
    np.testing.assert_allclose(found, oracle(q, k, scale=1.0, softcap=2.0, bias=bias), atol=1e-6)
    inside = 2 * np.tanh((attention.logits(q, k, scale=1.0) + bias) / 2)
    assert np.abs(found - np.exp(inside) / np.exp(inside).sum(-1, keepdims=True)).max() > 0.1
    plain = attention.weights(q, k, scale=1.0, bias=bias)
    kernel = kernel_of(q, k, v, attn_mask=torch.from_numpy(bias).expand(BATCH, -1, -1, -1), scale=1.0)
    assert attention.disagreement(plain, v, kernel) < 1e-5


def test_sinks_take_part_and_get_nothing() -> None:
    q, k, _ = arrays(kv_heads=2)
    sinks = np.array([-60, 0, 3, 60], np.float32)
    found = attention.weights(q, k, scale=0.3, sinks=sinks)
    np.testing.assert_allclose(found, oracle(q, k, scale=0.3, sinks=sinks), atol=1e-6)
    np.testing.assert_allclose(found[:, 0].sum(-1), 1, atol=1e-6)
    assert found[:, 3].sum() < 1e-10
    assert (found[:, 2].sum(-1) < 0.999).all()


def test_a_query_that_may_attend_to_nothing_has_a_row_of_zeros() -> None:
    q, k, _ = arrays()
    mask = np.ones((BATCH, 1, QUERIES, KEYS), bool)
    mask[1, 0, 2] = False
    for sinks in (None, np.zeros(HEADS, np.float32)):
        found = attention.weights(q, k, scale=0.3, mask=mask, sinks=sinks)
        assert not found[1, :, 2].any()
        assert (np.delete(found.sum(-1), 2, axis=2) > 0.1).all()


def test_large_logits_do_not_overflow() -> None:
    q, k, _ = arrays()
    found = attention.weights(q * 100, k * 100, scale=1.0)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("axis", [1, QUERIES])
def test_chosen_rows_equal_those_of_all(axis: int) -> None:
    q, k, _ = arrays(kv_heads=2)
    rng = np.random.default_rng(3)
    terms: dict[str, Any] = {
        "scale": 0.4,
        "softcap": 5.0,
        "bias": rng.standard_normal((1, HEADS, axis, KEYS)).astype(np.float32),
        "mask": rng.random((BATCH, 1, axis, KEYS)) < 0.7,
        "sinks": rng.standard_normal(HEADS).astype(np.float32),
        "causal": True,
        "offset": 2,
        "window": 6,
    }
    rows = np.array([6, 0, 3])
    full = attention.weights(q, k, **terms)
    np.testing.assert_allclose(attention.weights(q, k, rows=rows, **terms), full[:, :, rows], atol=1e-7)


def test_nothing_forbidden_needs_no_mask() -> None:
    assert attention.allowed(3, 4) is None
    mask = np.ones((1, 1, 1, 4), bool)
    assert attention.allowed(3, 4, mask=mask) is mask


@pytest.mark.parametrize(
    ("q", "k"),
    [((2, 4, 3, 8), (1, 4, 3, 8)), ((2, 4, 3, 8), (2, 4, 3, 7)), ((2, 4, 3, 8), (2, 3, 3, 8)), ((4, 3, 8), (4, 3, 8))],
)
def test_shapes_that_do_not_fit_are_named(q: tuple[int, ...], k: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"kv_heads a divisor of heads; got q \(.*\) and k \(") as problem:
        attention.weights(np.zeros(q, np.float32), np.zeros(k, np.float32), scale=1.0)
    assert str(q) in str(problem.value)
    assert str(k) in str(problem.value)


@pytest.mark.parametrize("top", [1, 3, 8, 9, 50])
def test_heaviest_against_a_full_sort(top: int) -> None:
    rng = np.random.default_rng(4)
    whole = np.stack([rng.permutation(9 * 7).reshape(7, 9) for _ in range(6)]).reshape(2, 3, 7, 9)
    weight = (whole / 63).astype(np.float32)
    key, heavy = attention.heaviest(weight, top)
    order = np.argsort(-weight, axis=-1)[..., :top]
    assert key.dtype == np.int32
    assert key.shape == heavy.shape == (2, 3, 7, min(top, 9))
    assert np.array_equal(heavy, np.take_along_axis(weight, order, -1))
    assert np.array_equal(key, np.where(heavy > 0, order, -1))
    assert (key == -1).sum() == (6 if top >= 9 else 0), "each permutation has one weight of 0"


def test_heaviest_of_ties_and_zeros() -> None:
    key, heavy = attention.heaviest(np.array([[0.25, 0.25, 0.5, 0.0], [0, 0, 0, 0]], np.float32), 3)
    assert heavy.tolist() == [[0.5, 0.25, 0.25], [0, 0, 0]]
    assert key[0, 0] == 2
    assert sorted(key[0, 1:]) == [0, 1]
    assert key[1].tolist() == [-1, -1, -1]
    key, heavy = attention.heaviest(np.zeros((2, 0), np.float32), 1)
    assert key.shape == heavy.shape == (2, 0)


@pytest.mark.parametrize(("queries", "count"), [(1, 1), (2, 2), (16, 16), (17, 16), (512, 16)])
def test_rows_to_check_are_spread_from_first_to_last(queries: int, count: int) -> None:
    rows = attention.rows_to_check(queries)
    assert rows.dtype == np.int64
    assert len(rows) == count
    assert rows[0] == 0
    assert rows[-1] == queries - 1
    assert (np.diff(rows) > 0).all()
    assert np.diff(rows).max(initial=1) <= np.diff(rows).min(initial=99) + 1


def call_of(**changes: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    """A call with every term, its tensors, and the output by the oracle."""
    q, k, v = arrays(kv_heads=2, queries=KEYS)
    rng = np.random.default_rng(5)
    mask = np.tril(np.ones((KEYS, KEYS), bool), 1)[None, None] & (rng.random((BATCH, 1, 1, KEYS)) < 0.8)
    mask[..., 0] = True
    bias = rng.standard_normal((1, HEADS, KEYS, KEYS)).astype(np.float32)
    sinks = rng.standard_normal(HEADS).astype(np.float32)
    seen = mask & np.tril(np.ones((KEYS, KEYS), bool))
    rows = attention.rows_to_check(KEYS)
    truth = oracle(q, k, scale=0.4, softcap=4.0, bias=bias, sinks=sinks, seen=seen)[1:2, :, rows]
    output = truth @ np.repeat(v[1:2], 2, axis=1)
    call: dict[str, Any] = {"scale": 0.4, "softcap": 4.0, "causal": True, "offset": 0, "window": None}
    call |= {"check": {"example": 1, "rows": rows.tolist()}}
    tensors = {"q": q, "k": k, "v": v[1:2], "output": output.astype(np.float32)}
    tensors |= {"mask": mask, "bias": bias, "sinks": sinks}
    for name, value in changes.items():
        (tensors if name in tensors else call)[name] = value
    return call, {name: tensor for name, tensor in tensors.items() if tensor is not None}


def test_self_check_passes_what_is_right() -> None:
    assert attention.self_check(*call_of()) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": 0.42},
        {"softcap": None},
        {"softcap": 4.4},
        {"causal": False},
        {"offset": 1},
        {"window": KEYS - 2},
        {"sinks": None},
        {"bias": None},
        {"mask": None},
        {"check": {"example": 0, "rows": list(range(KEYS))}},
        {"check": {"example": 1, "rows": [1, *range(1, KEYS)]}},
    ],
    ids=str,
)
def test_self_check_bites_on_one_changed_term(changes: dict[str, Any]) -> None:
    assert attention.self_check(*call_of(**changes)) > attention.LIMIT_16_BITS


@pytest.mark.parametrize("kind", ["q", "k", "v", "output", "bias"])
def test_self_check_bites_on_swapped_heads(kind: str) -> None:
    call, tensors = call_of()
    tensors[kind] = tensors[kind][:, ::-1]
    assert attention.self_check(call, tensors) > 0.1


def test_self_check_bites_on_a_mask_off_by_one() -> None:
    call, tensors = call_of()
    tensors["mask"] = np.roll(tensors["mask"], 1, axis=-1)
    assert attention.self_check(call, tensors) > attention.LIMIT_16_BITS


def test_disagreement_is_of_the_worst_head_and_relative() -> None:
    weight = np.full((1, 2, 1, 2), 0.5, np.float32)
    v = np.array([[[[100.0], [100]], [[1], [1]]]], np.float32)
    output = np.array([[[[100.0]], [[1.5]]]], np.float32)
    assert attention.disagreement(weight, v, output) == pytest.approx(0.5 / 1.5)


def test_disagreement_leaves_rows_without_keys_out() -> None:
    weight = np.array([[[[0.0, 0], [1, 0]]]], np.float32)
    v = np.array([[[[2.0], [4]]]], np.float32)
    for dead in (0, 3, np.nan):
        assert attention.disagreement(weight, v, np.array([[[[dead], [2.0]]]], np.float32)) == 0


def test_disagreement_of_what_is_not_finite_is_infinite() -> None:
    weight = np.ones((1, 1, 1, 1), np.float32)
    one, bad = np.ones((1, 1, 1, 1), np.float32), np.full((1, 1, 1, 1), np.nan, np.float32)
    assert attention.disagreement(weight, one, bad) == math.inf
    assert attention.disagreement(weight, bad, one) == math.inf
    assert attention.disagreement(bad, one, one) == math.inf


def test_the_check_of_a_diverged_model_is_infinite_and_quiet() -> None:
    for number in (np.nan, np.inf):
        q, k, v = arrays()
        q[1, 0, 0, 0] = number
        call: dict[str, Any] = {"scale": 1.0, "softcap": None, "causal": False, "offset": 0, "window": None}
        call |= {"check": {"example": 1, "rows": [0, 1]}}
        output = np.ones((1, HEADS, 2, DIM), np.float32)
        assert attention.self_check(call, {"q": q, "k": k, "v": v[1:2], "output": output}) == math.inf


def test_rows_that_attend_to_nothing_may_only_give_what_kernels_give_there() -> None:
    rng = np.random.default_rng(0)
    v = rng.standard_normal((1, 2, 5, 3)).astype(np.float32)
    attended = np.zeros((1, 4, 2, 5), np.float32)
    attended[..., 0, :] = 0.2
    live = np.repeat(v.mean(2, keepdims=True), 2, 1)
    for dead in (np.zeros_like(live), np.full_like(live, np.nan), live):
        assert attention.disagreement(attended, v, np.concatenate([live, dead], 2)) < 1e-6
    assert attention.disagreement(attended, v, np.concatenate([live, live + 9], 2)) == float("inf")
    assert np.isnan(attention.disagreement(np.zeros_like(attended), v, np.concatenate([live, live], 2)))


def test_scores_are_rounded_where_the_kernel_rounds_them() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 6, 16, dtype=torch.bfloat16) * 4 for _ in range(2))
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25
    wanted = torch.softmax(scores, -1, dtype=torch.float32).numpy()
    arrays = [t.float().numpy() for t in (q, k)]
    rounding = attention.rounding_of("transformers:eager", "bfloat16")
    assert np.abs(attention.weights(*arrays, scale=0.25, rounding=rounding) - wanted).max() < 1e-6
    assert np.abs(attention.weights(*arrays, scale=0.25) - wanted).max() > 1e-3
    assert attention.rounding_of("transformers:sdpa", "bfloat16") is None
    assert attention.rounding_of("transformers:eager", "float32") is None
