from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import AttentionInterface

import models
from headscope import attention
from headscope.boundary import Call, Catch, catching
from headscope.errors import NotSupported

EXACT = 1e-4

FAMILIES: dict[str, Callable[[str], Any]] = {
    "bert": models.bert,
    "distilbert": models.distilbert,
    "roberta": models.roberta,
    "gpt2": models.gpt2,
    "llama": models.llama,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def array(t: Tensor | None) -> Any:
    if t is None:
        return None
    return t.numpy() if t.dtype == torch.bool else t.float().numpy()


def scoring(call: Call) -> dict[str, Any]:
    named = ("scale", "softcap", "causal", "offset", "window")
    return {name: getattr(call, name) for name in named} | {
        name: array(getattr(call, name)) for name in ("mask", "bias", "sinks")
    }


def rebuilt(call: Call, **changed: Any) -> NDArray[np.float32]:
    return attention.weights(array(call.q), array(call.k), **{**scoring(call), **changed})


def error(call: Call, **changed: Any) -> float:
    return attention.disagreement(rebuilt(call, **changed), array(call.v), array(call.output))


def caught_in(model: nn.Module, **inputs: Any) -> Catch:
    with catching(model) as caught, torch.no_grad():
        model(**inputs)
    return caught


def furthest_from_uniform(weights: NDArray[np.float32]) -> float:
    live = weights > 0
    uniform = live / np.maximum(live.sum(-1, keepdims=True), 1)
    return float(np.abs(weights - uniform).max())


def own(model: Any, inputs: dict[str, Any], kind: str = "attentions") -> list[Tensor]:
    """The weights that the model itself gives, under eager."""
    with torch.no_grad():
        return list(getattr(model(**inputs, output_attentions=True), kind))


# Weights rebuilt from what was caught are the model's own.


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_models_own(family: str, implementation: str, padding: str) -> None:
    oracle, model = FAMILIES[family]("eager"), FAMILIES[family](implementation)
    model.load_state_dict(oracle.state_dict())
    inputs = models.tokens(padding=padding, pad=1 if family == "roberta" else models.PAD)
    caught = caught_in(model, **inputs)
    truth = own(oracle, inputs)
    assert not caught.refused
    assert [call.route for call in caught.calls] == [f"transformers:{implementation}"] * 2
    for call, wanted in zip(caught.calls, truth, strict=True):
        weights = rebuilt(call)
        assert furthest_from_uniform(weights) > 0.3
        # A query that may attend to nothing is a row of zeros here; eager spreads it over all keys, sdpa gives 0.
        live = np.broadcast_to(weights.any(-1, keepdims=True), weights.shape)
        assert live.all() or (padding == "left" and family in ("gpt2", "llama"))
        np.testing.assert_allclose(weights[live], wanted.numpy()[live], atol=1e-5)
        assert error(call) < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_plain_sdpa_modules_are_caught(causal: bool) -> None:
    model = models.Plain(causal=causal).eval()
    inputs = models.tokens()
    mask = None if causal else models.tokens(padding="right")["attention_mask"]
    caught = caught_in(model, ids=inputs["input_ids"], mask=mask)
    assert [(call.path, call.call, call.route) for call in caught.calls] == [
        ("layers.0", 0, "sdpa"),
        ("layers.1", 0, "sdpa"),
    ]
    first: Any = model.layers[0]
    x = model.embed(inputs["input_ids"])
    q, k, _ = (part.detach() for part in first.parts(x))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None] == 0, -torch.inf)
    if causal:
        logits = logits.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    weights = rebuilt(caught.calls[0])
    assert furthest_from_uniform(weights) > 0.3
    np.testing.assert_allclose(weights, logits.softmax(-1).numpy(), atol=1e-5)
    assert max(map(error, caught.calls)) < 1e-5


def test_heads_of_keys_are_not_repeated() -> None:
    for implementation in ("sdpa", "eager"):
        (call, _) = caught_in(models.llama(implementation), **models.tokens()).calls
        assert (call.q.shape, call.k.shape, call.v.shape) == ((3, 4, 12, 8), (3, 2, 12, 8), (3, 2, 12, 8))
        assert call.output.shape == call.q.shape


@pytest.mark.parametrize("padding", ["none", "left"])
def test_softcap_and_window_of_gemma2(padding: str) -> None:
    model, inputs = models.gemma2(), models.tokens(padding=padding)
    caught = caught_in(model, **inputs)
    assert [call.softcap for call in caught.calls] == [3.0, 3.0]
    # The window lies in the mask, so the argument must not be applied again.
    assert [call.window for call in caught.calls] == [None, None]
    assert caught.calls[0].mask is not caught.calls[1].mask
    for call, wanted in zip(caught.calls, own(model, inputs), strict=True):
        weights = rebuilt(call)
        live = np.broadcast_to(weights.any(-1, keepdims=True), weights.shape)
        assert furthest_from_uniform(weights) > 0.3
        np.testing.assert_allclose(weights[live], wanted.numpy()[live], atol=1e-5)


def test_sinks_of_gpt_oss() -> None:
    model, inputs = models.gpt_oss(), models.tokens()
    caught = caught_in(model, **inputs)
    for call, wanted in zip(caught.calls, own(model, inputs), strict=True):
        assert call.sinks is not None and call.sinks.shape == (4,) and call.facts()["sinks"] is True
        weights = rebuilt(call)
        assert weights.sum(-1).min() < 0.9
        np.testing.assert_allclose(weights, wanted.numpy(), atol=1e-5)
        assert error(call) < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_learnt_bias_and_cross_attention_of_t5(implementation: str) -> None:
    oracle, model = models.t5("eager"), models.t5(implementation)
    inputs = {**models.tokens(padding="right"), "decoder_input_ids": models.tokens(length=7)["input_ids"]}
    caught = {call.path: call for call in caught_in(model, **inputs).calls}
    assert len(caught) == 6
    paths = {
        "encoder_attentions": "encoder.block.{}.layer.0.SelfAttention",
        "decoder_attentions": "decoder.block.{}.layer.0.SelfAttention",
        "cross_attentions": "decoder.block.{}.layer.1.EncDecAttention",
    }
    for kind, path in paths.items():
        for layer, wanted in enumerate(own(oracle, inputs, kind)):
            call = caught[path.format(layer)]
            assert furthest_from_uniform(rebuilt(call)) > 0.3
            np.testing.assert_allclose(rebuilt(call), wanted.numpy(), atol=5e-5)
            assert error(call) < EXACT
    encoder = [caught[paths["encoder_attentions"].format(layer)] for layer in (0, 1)]
    assert encoder[0].bias is encoder[1].bias is not None and encoder[0].mask is encoder[1].mask is not None
    assert array(encoder[0].bias).shape == (1, 4, 12, 12) and array(encoder[0].mask).shape == (3, 1, 1, 12)
    assert caught[paths["cross_attentions"].format(0)].bias is None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_one_query_over_a_cache(implementation: str) -> None:
    model, inputs = models.llama(implementation), models.tokens(padding="left")
    with torch.no_grad():
        cache = model(input_ids=inputs["input_ids"][:, :-1], attention_mask=inputs["attention_mask"][:, :-1])
    last = {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": cache.past_key_values}
    caught = caught_in(model, attention_mask=inputs["attention_mask"], **last)
    assert not caught.refused
    for call in caught.calls:
        assert (call.q.shape[2], call.k.shape[:3]) == (1, (3, 2, 12)) and not call.causal
        assert error(call) < 1e-5


def test_keys_are_cut_for_an_empty_static_cache() -> None:
    model, ids = models.llama(), models.tokens()["input_ids"]
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    caught = caught_in(model, input_ids=ids, past_key_values=cache)
    assert [call.k.shape[2] for call in caught.calls] == [12, 12] and all(call.causal for call in caught.calls)
    assert max(map(error, caught.calls)) < 1e-5


# Masks.


def test_one_small_mask_for_all_layers() -> None:
    for implementation in ("sdpa", "eager"):
        first, second = caught_in(models.bert(implementation), **models.tokens(padding="right")).calls
        assert first.mask is second.mask is not None and first.bias is second.bias is None
        padding = models.tokens(padding="right")["attention_mask"].bool()
        assert np.array_equal(array(first.mask), padding[:, None, None])
    assert [call.mask for call in caught_in(models.bert("sdpa"), **models.tokens()).calls] == [None, None]
    (call, _) = caught_in(models.gpt2("sdpa"), input_ids=models.tokens()["input_ids"]).calls
    assert (call.mask, call.causal, call.offset) == (None, True, 0)
    (call, _) = caught_in(models.gpt2("eager"), input_ids=models.tokens()["input_ids"]).calls
    assert call.mask is not None and call.mask.shape == (1, 1, 12, 12) and not call.causal


class One(nn.Module):
    """A module that calls SDPA once, with whatever it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(*args, **kwargs)


def random(*shape: int, seed: int = 0, by: float = 2.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * by


def one(*args: Any, **kwargs: Any) -> Call:
    with catching(module := One()) as caught:
        module(*args, **kwargs)
    assert caught.refused == {}
    (call,) = caught.calls
    return call


def test_a_float_mask_is_a_mask_a_bias_or_both() -> None:
    q, k, v = (random(2, 4, 5, 8, seed=seed) for seed in range(3))
    low = torch.finfo(torch.float32).min
    forbidding = torch.zeros(1, 1, 5, 5)
    forbidding[..., 3:] = low
    assert (call := one(q, k, v, forbidding)).mask is not None and call.bias is None
    assert call.mask.tolist() == [[[[True, True, True, False, False]]]] and error(call) < 1e-5
    some = torch.zeros(2, 1, 5, 5)
    some[1, ..., 3:] = low
    call = one(q, k, v, random(1, 4, 5, 5) + some)
    assert call.bias is not None and call.bias.shape == (1, 4, 5, 5) and error(call) < 1e-5
    slope = -torch.arange(5.0).view(1, 1, 1, 5)
    assert (call := one(q, k, v, slope)).mask is None and torch.equal(call.bias, slope) and error(call) < 1e-5  # type: ignore[arg-type]
    both = (slope + forbidding).masked_fill(forbidding < 0, -torch.inf)
    call = one(q, k, v, both)
    assert call.mask is not None and call.bias is not None
    assert call.bias.tolist() == [[[[0.0, -1.0, -2.0, 0.0, 0.0]]]] and error(call) < 1e-5
    assert one(q, k, v, torch.zeros(5, 5)).bias is None
    # Half of the lowest number is where forbidding begins; what lies above is a number like any other.
    assert one(q, k, v, forbidding * 0.5).bias is None
    assert one(q, k, v, forbidding * 0.4).mask is None


def test_masks_of_two_and_three_axes_broadcast() -> None:
    q, k, v = (random(2, 4, 5, 8, seed=seed) for seed in range(3))
    lower = torch.ones(5, 5).tril().bool()
    for mask in (lower, lower[None], lower.expand(2, 4, 5, 5)):
        call = one(q, k, v, mask)
        assert call.mask is not None and call.mask.shape == (1, 1, 5, 5) and error(call) < 1e-5


def test_a_mask_changed_in_place_is_another_mask() -> None:
    class Two(nn.Module):
        def forward(self, q: Tensor, mask: Tensor) -> None:
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
            mask[..., 0] = False
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    mask = torch.ones(5, 5).tril().bool()
    mask[0, 1] = True
    first, second = caught_in(Two(), q=random(1, 2, 5, 8), mask=mask).calls
    assert first.mask is not None and second.mask is not None
    assert bool(first.mask[0, 0, 0, 0]) and not bool(second.mask[0, 0, 0, 0])
    assert max(error(first), error(second)) < 1e-5


# SDPA's own arguments.


def test_queries_of_three_axes_are_one_head() -> None:
    q, k, v = (random(6, 5, 8, seed=seed) for seed in range(3))
    mask = torch.ones(6, 5, 5).tril().bool()
    mask[2, :, 0] = False
    call = one(q, k, v, mask)
    assert (
        call.q.shape == call.output.shape == (6, 1, 5, 8) and call.mask is not None and call.mask.shape == (6, 1, 5, 5)
    )
    assert error(call) < 1e-5


def test_scale_causality_shared_keys_and_dropout() -> None:
    q, k, v = random(2, 4, 5, 8), random(2, 2, 9, 8, seed=1), random(2, 2, 9, 6, seed=2)
    call = one(q, k, v, is_causal=True, scale=0.7, enable_gqa=True)
    assert call.facts() == {
        **{
            "path": "",
            "call": 0,
            "route": "sdpa",
            "heads": 4,
            "kv_heads": 2,
            "scale": 0.7,
            "causal": True,
            "offset": 0,
        },
        **{"window": None, "softcap": None, "sinks": False, "dropout": 0.0, "dtype": "float32"},
    }
    assert error(call) < 1e-5
    call = one(query=q, key=k, value=v, dropout_p=0.5, enable_gqa=True)
    assert (call.scale, call.dropout, call.causal) == (8**-0.5, 0.5, False)


def test_early_bound_sdpa_is_caught() -> None:
    early = F.scaled_dot_product_attention

    class Early(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return early(q, q, q)

    assert len(caught_in(Early(), q=random(1, 2, 5, 8)).calls) == 1


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (
            [(1, 4, 5, 8), (2, 4, 5, 8), (2, 4, 5, 8)],
            "its q, k, v have batches of 1, 2, 2; only equal ones are captured",
        ),
        (
            [(2, 2, 2, 5, 8)] * 3,
            "its query has 5 axes; calls of scaled_dot_product_attention with 3 or 4 are caught",
        ),
        ([(2, 1, 5, 8), (2, 4, 5, 8), (2, 4, 5, 8)], "its 1 heads cannot share 4 heads of keys and 4 of values evenly"),
    ],
)
def test_shapes_that_have_no_record_are_refused(shapes: list[tuple[int, ...]], reason: str) -> None:
    parts = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    with catching(module := One()) as caught:
        output = module(*parts)
    assert (caught.calls, caught.refused) == ([], {"": reason})
    assert torch.equal(output, module(*parts))


def test_autocast_gives_what_the_kernel_saw() -> None:
    for implementation in ("sdpa", "eager"):
        model = models.llama(implementation)
        with torch.autocast("cpu", torch.bfloat16):
            caught = caught_in(model, **models.tokens(padding="right"))
        assert not caught.refused
        assert {(call.dtype, call.q.dtype) for call in caught.calls} == {("bfloat16", torch.bfloat16)}
        assert max(map(error, caught.calls)) < 2e-2


# What is caught once, and when.


class Repeated(nn.Module):
    """One layer that runs twice, as in ALBERT; it changes the output of attention in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = models.PlainAttention()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.layer(x).mul_(2))
        return out.zero_()


def test_calls_of_a_shared_layer_are_counted() -> None:
    caught = caught_in(Repeated(), x=random(2, 5, 32))
    assert [(call.path, call.call) for call in caught.calls] == [("layer", 0), ("layer", 1)]


def test_on_call_gets_tensors_before_the_model_goes_on() -> None:
    errors: list[float] = []

    class InPlace(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q).zero_()

    with catching(module := InPlace(), lambda call: errors.append(error(call))) as caught:
        module(random(1, 2, 5, 8))
    assert len(errors) == 1 and errors[0] < 1e-5
    assert caught.calls == [] and caught.count == 1


def test_route_a_and_its_inner_sdpa_are_one_call() -> None:
    caught = caught_in(models.bert(layers=5), **models.tokens(padding="left"))
    assert [call.path for call in caught.calls] == [f"bert.encoder.layer.{n}.attention.self" for n in range(5)]
    assert {call.route for call in caught.calls} == {"transformers:sdpa"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_not_caught(reentrant: bool) -> None:
    model = models.bert()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    with catching(model) as caught:
        model(**models.tokens(), labels=torch.tensor([0, 1, 0])).loss.backward()
    assert [call.call for call in caught.calls] == [0, 0]
    assert not caught.refused
    assert {call.dropout for call in caught.calls} == {0.1}
    assert not any(call.q.requires_grad or call.output.requires_grad for call in caught.calls)


def test_other_threads_and_other_models_are_left_alone() -> None:
    model, other = models.bert(), models.bert()
    with catching(model) as caught, torch.no_grad():
        thread = threading.Thread(target=lambda: model(**models.tokens()))
        thread.start()
        thread.join()
        other(**models.tokens())
        models.PlainAttention()(random(1, 2, 32))
    assert caught.count == 0 and not caught.refused


# Nothing is left behind, and nothing of ours reaches the model.


def installed(model: nn.Module) -> Any:
    hooks = [
        {name: list(value) for name, value in vars(m).items() if "hooks" in name and value} for m in model.modules()
    ]
    modes: Any = torch.overrides._get_current_function_mode_stack
    return dict(vars(AttentionInterface)), hooks, modes()


def test_nothing_is_left_installed() -> None:
    model = models.bert()
    before = installed(model)
    caught_in(model, **models.tokens())
    assert installed(model) == before
    with pytest.raises(IndexError, match="out of range"), catching(model):
        model(input_ids=torch.tensor([[models.VOCABULARY + 1]]))
    assert installed(model) == before


def test_a_function_that_was_kept_still_works_and_is_caught_again() -> None:
    kept: list[Any] = []

    class Keeping(nn.Module):
        def forward(self, q: Tensor) -> Any:
            if not kept:
                kept.append(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", print))
            return kept[0](self, q, q, q, None, is_causal=False)[0]

    model, q = Keeping(), random(1, 2, 5, 8)
    assert [call.route for call in caught_in(model, q=q).calls] == ["transformers:sdpa"]
    assert torch.equal(model(q), F.scaled_dot_product_attention(q, q, q).transpose(1, 2))
    assert [call.route for call in caught_in(model, q=q).calls] == ["sdpa"]


def test_captures_cannot_be_nested() -> None:
    model = models.Plain()
    with catching(model) as caught:
        with pytest.raises(NotSupported) as problem, catching(model):
            pass
        model(models.tokens()["input_ids"])
    assert str(problem.value) == (
        "attention of Plain was to be caught while another capture is running in this process; captures cannot be "
        "nested or run in two threads: leave the first one before"
    )
    assert caught.count == 2
    with catching(model):
        pass


@pytest.mark.parametrize("family", ["bert", "plain"])
def test_errors_of_on_call_stay_with_us(family: str) -> None:
    model = models.bert() if family == "bert" else models.Plain().eval()
    inputs = models.tokens() if family == "bert" else {"ids": models.tokens()["input_ids"]}

    def full(call: Call) -> None:
        raise torch.OutOfMemoryError("no room")

    with torch.no_grad():
        plain = model(**inputs)
        with catching(model, full) as caught:
            output = model(**inputs)
    assert torch.equal(getattr(output, "logits", output), getattr(plain, "logits", plain))
    assert caught.count == 0
    assert set(caught.refused.values()) == {"the call was not recorded: OutOfMemoryError: no room"}
    assert len(caught.refused) == 2


def test_errors_of_the_kernel_are_the_models() -> None:
    with (
        pytest.raises(RuntimeError, match="Expected size for first two dimensions"),
        catching(module := One()) as caught,
    ):
        module(random(1, 2, 5, 8), random(1, 2, 5, 7), random(1, 2, 5, 8))
    assert not caught.calls and not caught.refused


@pytest.fixture
def registered() -> Iterator[Callable[[Callable[..., Any]], str]]:
    """Registers an attention function as "ours" for one test."""

    def register(fn: Callable[..., Any]) -> str:
        AttentionInterface.register("ours", fn)
        transformers.AttentionMaskInterface.register("ours", transformers.masking_utils.sdpa_mask)
        return "ours"

    yield register
    AttentionInterface._global_mapping.pop("ours", None)
    transformers.AttentionMaskInterface._global_mapping.pop("ours", None)


def test_other_implementations_run_once_and_are_named(registered: Callable[[Callable[..., Any]], str]) -> None:
    ran: list[str] = []

    def linear(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        ran.append("x")
        return value.transpose(1, 2).contiguous(), None

    caught = caught_in(models.bert(registered(linear)), **models.tokens())
    assert ran == ["x", "x"] and caught.count == 0
    assert caught.refused["bert.encoder.layer.0.attention.self"] == (
        "its attention implementation 'ours' is not captured; 'sdpa' and 'eager' are: load the model with "
        "attn_implementation='sdpa'"
    )


def test_implementations_built_on_sdpa_are_caught_there(registered: Callable[[Callable[..., Any]], str]) -> None:
    def ours(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        query = query * 2
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return y.transpose(1, 2).contiguous(), None

    caught = caught_in(models.bert(registered(ours)), **models.tokens(padding="right"))
    assert [call.route for call in caught.calls] == ["sdpa", "sdpa"] and not caught.refused
    assert [call.path for call in caught.calls] == [f"bert.encoder.layer.{n}.attention.self" for n in (0, 1)]
    assert max(map(error, caught.calls)) < 1e-5


def test_flex_attention_is_refused_by_name() -> None:
    from transformers.integrations.flex_attention import flex_attention_forward

    class Flex(nn.Module):
        def forward(self, q: Tensor) -> Any:
            fn = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["flex_attention"]
            assert fn.__wrapped__ is flex_attention_forward
            return q

    assert caught_in(Flex(), q=random(1, 1, 2, 2)).calls == []


def test_multihead_attention_is_named() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    with catching(model) as caught:
        model(random(2, 5, 16))
    assert caught.count == 0
    assert caught.refused == {"self_attn": "torch's nn.MultiheadAttention is not captured yet"}


def test_sinks_that_differ_from_query_to_query_are_refused() -> None:
    class Sinking(nn.Module):
        def forward(self, q: Tensor) -> Any:
            def eager(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any) -> Any:
                return query.transpose(1, 2), None

            fn = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager)
            return fn(self, q, q, q, None, sinks=q[..., :1])

    caught = caught_in(Sinking(), q=random(1, 2, 5, 8))
    assert caught.refused == {"": "its sinks differ from query to query; sinks of one number a head are captured"}


# The proof: rebuilt weights times v against the kernel's output. It passes where all is right, and bites where not.


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_proof_bites(family: str, implementation: str) -> None:
    call = caught_in(FAMILIES[family](implementation), **models.tokens(padding="right")).calls[0]
    assert call.mask is not None and error(call) < EXACT
    assert error(call, scale=call.scale * 1.2) > EXACT
    assert error(call, mask=None) > EXACT
    assert error(call, mask=np.roll(array(call.mask), 1, axis=-1)) > EXACT
    swapped = attention.weights(array(call.q[:, [1, 0, 2, 3]]), array(call.k), **scoring(call))
    assert attention.disagreement(swapped, array(call.v), array(call.output)) > EXACT


def test_the_proof_bites_on_softcap_sinks_bias_and_causality() -> None:
    call = caught_in(models.gemma2(), **models.tokens()).calls[0]
    assert error(call) < EXACT < error(call, softcap=None)
    call = caught_in(models.gpt_oss(), **models.tokens()).calls[0]
    assert error(call) < EXACT < error(call, sinks=None)
    call = caught_in(models.t5(), **models.tokens(), decoder_input_ids=models.tokens()["input_ids"]).calls[0]
    assert error(call) < EXACT < error(call, bias=None)
    call = caught_in(models.gpt2(), input_ids=models.tokens()["input_ids"]).calls[0]
    assert error(call) < EXACT < min(error(call, causal=False), error(call, offset=1))


def test_importing_it_does_not_import_transformers() -> None:
    code = """import sys, torch, headscope.boundary as boundary
model = torch.nn.Linear(1, 1)
with boundary.catching(model):
    model(torch.ones(1, 1))
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
