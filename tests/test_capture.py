from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput

import models
from headscope import attention
from headscope.boundary import Call, catching
from headscope.capture import Probe, quiet, run, unwrap
from headscope.errors import HeadscopeError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Training is never changed.


class Restless(nn.Module):
    """A classifier with everything that a careless probe would disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.bert: Any = models.bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        self.norm, self.frozen = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("latest", torch.zeros(2), persistent=False)
        self.seen: Tensor
        self.alias = self.seen
        self.forwards = 0
        self.history: Tensor | None = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        out = self.bert(input_ids, attention_mask=attention_mask).logits
        noise = torch.rand(2) + random.random() + float(np.random.rand())
        self.alias.add_(out.detach().mean(0))
        self.latest = out.detach().sum(0) * noise
        self.forwards += 1
        self.history = self.latest if self.history is None else self.history + self.latest
        lazy = f"lazy_{self.forwards % 3}"
        if lazy not in self._buffers:
            self.register_buffer(lazy, torch.ones(1) * self.forwards)
        lazily = torch.stack([buffer.sum() for name, buffer in self.named_buffers() if "lazy" in name]).sum()
        scaled = out * (1 + 0.1 * torch.sigmoid(noise + self.seen + self.history / self.forwards))
        logits = self.frozen(self.norm(scaled)) + lazily
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def hashed(*values: Any) -> str:
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            raw = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode() + raw)
        elif isinstance(value, dict):
            digest.update(hashed(*value.keys(), *value.values()).encode())
        elif isinstance(value, (list, tuple)):
            digest.update(hashed(*value).encode())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, str]:
    plain = [vars(m).get(name) for m in model.modules() for name in ("forwards", "history")]
    return {
        "parameters": hashed(dict(model.named_parameters())),
        "gradients": hashed([parameter.grad for parameter in model.parameters()]),
        "buffers": hashed(dict(model.named_buffers())),
        "saved": hashed(sorted(model.state_dict())),
        "flags": hashed([module.training for module in model.modules()]),
        "attributes": hashed(plain),
        "optimizer": hashed(optimizer.state_dict()) if optimizer else "",
        "torch": hashed(torch.get_rng_state()),
        "random": hashed(random.getstate()),
        "numpy": hashed(repr(np.random.get_state())),
    }


def trained(probing: bool, autocast: bool) -> tuple[dict[str, str], list[float], int]:
    """Twelve steps of AdamW, with or without probes in between; what they leave, the losses, the calls caught."""
    model = Restless().train()
    model.frozen.eval()
    model.bert.bert.embeddings.eval()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    probe = Probe.of(models.tokens(batch=2, padding="right"), None, model)
    losses, count = [], 0
    amp = ("cpu", torch.bfloat16) if autocast else None
    for step in range(12):
        ids = torch.randint(5, models.VOCABULARY, (4, 10))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids[:, 0] % 2).loss
            if probing and step == 5:
                count += len(run(model, probe, autocast=amp)[0].calls)
        loss.backward()
        if probing and step % 2:
            count += len(run(model, probe, autocast=amp)[0].calls)
        optimizer.step()
        if probing and step == 11:
            count += len(run(model, probe, autocast=amp)[0].calls)
        losses.append(loss.item())
        if step != 11:
            optimizer.zero_grad()
    return state(model, optimizer), losses, count


@pytest.mark.parametrize("autocast", [False, True])
def test_training_is_the_same_bit_for_bit(autocast: bool) -> None:
    without, with_probes = trained(False, autocast), trained(True, autocast)
    assert with_probes[2] == 16
    assert with_probes[:2] == without[:2]
    assert not np.isnan(without[1]).any() and len(set(without[1])) == 12


def test_each_of_these_would_have_been_noticed() -> None:
    """The test above can fail: a forward without `quiet` changes every kind of state that it compares."""
    model = Restless().train()
    before = state(model)
    model(**models.tokens(batch=2))
    after = state(model)
    same = {"parameters", "gradients", "flags", "optimizer"}
    assert {name for name in before if before[name] == after[name]} == same


def test_quiet_puts_all_back_when_the_model_raises() -> None:
    model = Restless().train()
    model.frozen.eval()
    buffers = dict(model.named_buffers())
    versions = {name: buffer._version for name, buffer in buffers.items() if name != "seen"}
    before = state(model)
    with pytest.raises(ZeroDivisionError), quiet(model):
        model(**models.tokens(batch=2))
        assert not any(module.training for module in model.modules())
        model.bert.train()
        model.bert.bert.register_buffer("position_ids", None)
        raise ZeroDivisionError
    assert state(model) == before
    after = dict(model.named_buffers())
    assert after.keys() == buffers.keys() and all(after[name] is buffers[name] for name in buffers)
    assert {name: buffers[name]._version for name in versions} == versions
    assert model.alias is model.seen


def test_quiet_has_no_gradients_and_the_autocast_of_training() -> None:
    model = models.Plain().train()
    with torch.autocast("cpu", torch.bfloat16), quiet(model):
        assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    with quiet(model, ("cpu", torch.bfloat16)):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()
    assert torch.is_grad_enabled() and torch.is_autocast_cache_enabled()


def test_shared_buffers_stay_shared_within() -> None:
    first, second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    second.running_mean = first.running_mean
    model = nn.Sequential(first, second)
    with quiet(model):
        assert first.running_mean is second.running_mean
    assert first.running_mean is second.running_mean


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_script_modules_are_put_into_eval_and_back() -> None:
    trace: Any = torch.jit.trace
    model = nn.Sequential(trace(nn.Linear(2, 2), torch.ones(1, 2)), nn.Linear(2, 2)).train()
    with quiet(model):
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


# The unwrapped model.


def test_unwrap() -> None:
    model = models.Plain()
    compiled: Any = torch.compile(model, backend="eager")
    assert unwrap(model) is model
    assert unwrap(compiled) is model
    assert unwrap(nn.DataParallel(compiled)) is model


# Dynamo looks at the gradient of tensors that have none.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_model_is_probed_uncompiled_under_its_own_names() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = models.Plain()
    model.layers[1] = torch.compile(model.layers[1], backend=backend)  # type: ignore[assignment]
    probe = Probe.of(models.tokens()["input_ids"])
    (caught,) = run(model, probe)
    assert [call["path"] for call in caught.calls] == ["layers.0", "layers.1"] and graphs == []
    model(models.tokens()["input_ids"])
    assert len(graphs) == 1
    assert len(run(model, probe)[0].calls) == 2
    model(models.tokens()["input_ids"])
    assert len(graphs) == 1


# What a probe may be.


class Words:
    """A tokenizer of words, with the names that transformers' have."""

    model_max_length = 10**30
    padding_side = "right"
    bos_token_id, eos_token_id = 1, 2
    all_special_ids = (1, 2)
    pad_token_id: int | None = None
    calls = 0

    def __call__(self, text: str, truncation: bool = False, max_length: int | None = None) -> BatchEncoding:
        ids = [1, *(5 + len(word) for word in text.split())]
        ids = [*ids[: None if max_length is None else max_length - 1], 2]
        self.calls += 1
        return BatchEncoding({"input_ids": ids, "token_type_ids": [0] * len(ids), "attention_mask": [1] * len(ids)})

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return ["<s>" if i == 1 else "</s>" if i == 2 else "x" * (i - 5) for i in ids]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(t for t in self.convert_ids_to_tokens(ids) if t[0] != "<" or not skip_special_tokens)


def test_texts_are_tokenised_padded_and_named() -> None:
    tokenizer = Words()
    before = copy.deepcopy(vars(tokenizer))
    probe = Probe.of(["a bb ccc", "a"], tokenizer, models.gpt2())
    (batch,) = probe.batches
    assert set(batch.kwargs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert batch.ids is not None and batch.ids.dtype == np.int64 and batch.mask is not None and batch.mask.dtype == bool
    assert batch.ids.tolist() == [[1, 6, 7, 8, 2], [1, 6, 2, 2, 2]]
    assert batch.mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert batch.tokens == [["<s>", "x", "xx", "xxx", "</s>"], ["<s>", "x", "</s>", "</s>", "</s>"]]
    assert batch.texts == ["x xx xxx", "x"] and probe.special == [1, 2] and batch.labels is None and batch.examples == 2
    tokenizer.calls = 0
    assert {**vars(tokenizer), "calls": 0} == {**before, "calls": 0} and tokenizer.pad_token_id is None


def test_a_tokenizer_of_transformers_is_left_as_it_was() -> None:
    vocabulary = {word: n for n, word in enumerate(["[UNK]", "</s>", "the", "cat", "sat"])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    kind: Any = PreTrainedTokenizerFast
    tokenizer = kind(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]")
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.pad_token
    (batch,) = Probe.of(["the cat sat " * 30, "the dog"], tokenizer, models.gpt2()).batches
    assert batch.ids is not None and batch.ids.shape == (2, 40) and batch.mask is not None
    assert batch.tokens[1][:3] == ["the", "[UNK]", "</s>"] and batch.mask[1].sum() == 2 and batch.texts[1] == "the"
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.pad_token) == before
    assert len(run(models.gpt2(), Probe.of(["the cat sat", "the dog"], tokenizer, models.gpt2()))[0].calls) == 2


def test_left_padding_own_padding_token_and_sixteen_a_batch() -> None:
    tokenizer = Words()
    tokenizer.padding_side, tokenizer.pad_token_id = "left", 0
    probe = Probe.of(["a", *["a bb"] * 16], tokenizer, models.distilbert())
    assert [batch.examples for batch in probe.batches] == [16, 1]
    assert set(probe.batches[0].kwargs) == {"input_ids", "attention_mask"}
    assert probe.batches[0].kwargs["input_ids"][0].tolist() == [0, 1, 6, 2]
    assert probe.batches[0].kwargs["attention_mask"][0].tolist() == [0, 1, 1, 1]


def test_texts_are_cut_to_what_the_model_has_positions_for() -> None:
    tokenizer = Words()
    text = "word " * 100
    assert Probe.of(text, tokenizer, models.bert()).batches[0].kwargs["input_ids"].shape == (1, 40)
    tokenizer.model_max_length = 20
    assert Probe.of([text], tokenizer, models.bert()).batches[0].kwargs["input_ids"].shape == (1, 20)


def test_labels_go_to_a_forward_that_takes_them() -> None:
    pairs = [("a bb", 1), ("a", 0)]
    (batch,) = Probe.of(pairs, Words(), models.bert()).batches
    assert batch.kwargs["labels"].tolist() == [1, 0] and batch.labels is not None and batch.labels.tolist() == [1, 0]
    (batch,) = Probe.of(pairs, Words(), models.bert().bert).batches
    assert "labels" not in batch.kwargs
    assert batch.labels is not None and batch.labels.tolist() == [1, 0]


def test_ready_batches() -> None:
    model, inputs = models.bert(), models.tokens(padding="right")
    for given in (inputs, BatchEncoding(inputs), [inputs]):
        (batch,) = Probe.of({**given, "texts": ["x"] * 3} if given is inputs else given, None, model).batches
        assert set(batch.kwargs) == {"input_ids", "attention_mask"}
        assert batch.mask is not None and np.array_equal(batch.mask, inputs["attention_mask"].bool().numpy())
        assert batch.tokens[0][:2] == [str(i) for i in inputs["input_ids"][0, :2].tolist()]
        assert batch.texts[2] == " ".join(batch.tokens[2][:8])
    assert len(Probe.of([inputs, inputs["input_ids"]], None, model).batches) == 2
    (batch,) = Probe.of(inputs["input_ids"]).batches
    assert batch.kwargs == {} and batch.mask is not None and batch.mask.all()
    inputs["input_ids"].zero_()
    assert batch.args[0].any()


def test_a_batch_without_ids_is_named_by_position() -> None:
    (batch,) = Probe.of({"inputs_embeds": torch.ones(2, 3, 32)}, None, models.bert()).batches
    assert (batch.ids, batch.tokens, batch.texts) == (None, [["0", "1", "2"]] * 2, ["0 1 2"] * 2)
    (batch,) = Probe.of({"pixel_values": torch.ones(2, 3, 8, 8)}).batches
    assert (batch.ids, batch.mask, batch.tokens, batch.examples) == (None, None, [[], []], 2)


class Loader:
    def __iter__(self) -> Iterator[int]:
        return iter(())


@pytest.mark.parametrize(
    ("probe", "start"),
    [
        (
            Loader(),
            "the probe is Loader; what can be probed is a list of texts, a list of (text, label) pairs with",
        ),
        ([], "the probe is an empty list; what can be probed"),
        ([("a", 0.5)], "the probe is a list of tuple of (str, float); what can be probed"),
        (["a", 3], "the probe is a list of str, int; what can be probed"),
        (
            ["a"],
            "the probe has 1 texts and the tokenizer is NoneType; pass tokenizer= (such as "
            "AutoTokenizer.from_pretrained(...)), or a batch that is tokenised already",
        ),
        (
            {"words": torch.ones(1, 2)},
            "the probe's batch has words, and no tensor of it is taken by the forward of Plain (ids, mask); tokenise "
            "with return_tensors='pt'",
        ),
    ],
)
def test_what_cannot_be_probed_is_said(probe: Any, start: str) -> None:
    with pytest.raises(HeadscopeError) as problem:
        Probe.of(probe, None, models.Plain())
    assert str(problem.value).startswith(start)


def test_texts_for_a_model_that_takes_no_input_ids() -> None:
    with pytest.raises(HeadscopeError) as problem:
        Probe.of(["a"], Words(), models.Plain())
    assert str(problem.value) == (
        "the probe has 1 texts, and the forward of Plain takes ids, mask, no input_ids; pass batches as the model "
        "takes them"
    )


# The probe made of the first training forward.


def test_the_first_examples_of_a_training_batch() -> None:
    inputs = models.tokens(batch=12, length=26, padding="right")
    kwargs = {**inputs, "labels": torch.arange(12), "position_ids": torch.arange(26)[None], "num_items_in_batch": 12}
    probe = Probe.first((), {**kwargs, "use_cache": False, "extra": (torch.ones(12), {"a": torch.ones(12, 2)})})
    (batch,) = probe.batches
    assert batch.examples == 8 and batch.labels is not None and batch.labels.tolist() == list(range(8))
    assert (
        batch.kwargs["input_ids"].equal(inputs["input_ids"][:8])
        and batch.ids is not None
        and batch.ids.shape == (8, 26)
    )
    assert batch.kwargs["position_ids"].shape == (1, 26) and batch.kwargs["use_cache"] is False
    assert batch.kwargs["extra"][0].shape == (8,) and batch.kwargs["extra"][1]["a"].shape == (8, 2)
    assert "num_items_in_batch" not in batch.kwargs
    assert batch.mask is not None and np.array_equal(batch.mask, inputs["attention_mask"][:8].bool().numpy())
    kwargs["input_ids"].zero_()
    assert batch.kwargs["input_ids"].any()


def test_a_positional_mask_counts() -> None:
    inputs = models.tokens(batch=3, padding="left")
    (batch,) = Probe.first((inputs["input_ids"], inputs["attention_mask"]), {}, Words(), most=2).batches
    assert batch.mask is not None and batch.mask.tolist() == inputs["attention_mask"][:2].bool().tolist()
    (batch,) = Probe.first((torch.ones(4, 5, 32),), {}).batches
    assert (batch.ids, batch.examples, batch.tokens[0]) == (None, 4, ["0", "1", "2", "3", "4"])


def test_a_batch_given_as_one_mapping() -> None:
    inputs = BatchEncoding(models.tokens(batch=3, padding="left"))
    (batch,) = Probe.first((inputs,), {}, most=2).batches
    assert batch.args[0].input_ids.shape == (2, 12) and inputs.input_ids.shape == (3, 12)
    assert batch.ids is not None and batch.ids.shape == (2, 12) and batch.mask is not None
    assert batch.mask.tolist() == inputs["attention_mask"][:2].bool().tolist()


def test_a_forward_without_tensors_is_said() -> None:
    with pytest.raises(HeadscopeError) as problem:
        Probe.first(("a",), {"texts": ["b"]})
    assert str(problem.value) == (
        "no probe was given, and the model's first forward has no tensor to make one of (it got str, texts); pass "
        "probe= to headscope.watch"
    )


# Running it.


def test_a_run_gives_calls_logits_predictions_and_loss() -> None:
    model = models.bert(hidden_dropout_prob=0.5).train()
    inputs = {**models.tokens(padding="right"), "labels": torch.tensor([0, 1, 0])}
    errors: list[float] = []

    def on_call(batch: int, call: Call) -> None:
        assert batch == len(errors) // 2
        mask = None if call.mask is None else call.mask.numpy()
        weights = attention.weights(call.q.numpy(), call.k.numpy(), scale=call.scale, mask=mask)
        errors.append(attention.disagreement(weights, call.v.numpy(), call.output.numpy()))

    passes = run(model, Probe.of([inputs, {**inputs, "input_ids": inputs["input_ids"] + 1}]), on_call=on_call)
    assert [done.batch for done in passes] == [0, 1] and len(errors) == 4 and max(errors) < 1e-5
    truth = model.eval()(**inputs)
    done = passes[0]
    assert [call["path"] for call in done.calls] == [f"bert.encoder.layer.{n}.attention.self" for n in (0, 1)]
    assert done.refused == {} and done.logits is not None and done.predictions is not None
    np.testing.assert_array_equal(done.logits, truth.logits.detach().numpy())
    assert done.logits.dtype == np.float32 and done.predictions.dtype == np.int32
    assert done.predictions.tolist() == truth.logits.argmax(-1).tolist()
    assert done.loss == pytest.approx(truth.loss.item()) and done.calls[0]["dropout"] == 0.0


class Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, ids: Tensor) -> Any:
        ids.zero_()
        return self.output


LOGITS = torch.tensor([[0.0, 1.0], [3.0, 2.0]])


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (LOGITS, ([1, 0], None)),
        ((LOGITS, None), ([1, 0], None)),
        ((torch.tensor(0.5), LOGITS), ([1, 0], 0.5)),
        ((LOGITS, torch.tensor(0.5)), ([1, 0], 0.5)),
        ({"logits": LOGITS.bfloat16()}, ([1, 0], None)),
        ({"last_hidden_state": LOGITS}, (None, None)),
        (torch.tensor([1, 0]), (None, None)),
        (None, (None, None)),
    ],
)
def test_whatever_a_model_returns(output: Any, expected: tuple[Any, Any]) -> None:
    probe = Probe.of(models.tokens()["input_ids"])
    for _ in range(2):
        (done,) = run(Returns(output), probe)
        assert (None if done.predictions is None else done.predictions.tolist(), done.loss) == expected
    assert probe.batches[0].args[0].any()


def test_large_logits_are_left_out_and_predictions_kept() -> None:
    probe = Probe.of(models.tokens()["input_ids"])
    (done,) = run(Returns(torch.zeros(2, 2, 1 << 16)), probe)
    assert done.logits is not None and done.logits.nbytes == 1 << 20
    (done,) = run(Returns(torch.zeros(2, 2, (1 << 16) + 1)), probe)
    assert done.logits is None and done.predictions is not None and done.predictions.shape == (2, 2)


def test_errors_of_on_call_are_reasons_and_those_of_the_model_are_raised() -> None:
    def on_call(batch: int, call: Call) -> None:
        raise OSError("disk full")

    model = models.bert()
    (done,) = run(model, Probe.of(models.tokens()), on_call=on_call)
    assert done.calls == [] and done.logits is not None
    assert done.refused["bert.encoder.layer.1.attention.self"] == "the call was not recorded: OSError: disk full"
    model.train()
    with pytest.raises(IndexError):
        run(model, Probe.of(models.tokens()["input_ids"] + models.VOCABULARY))
    assert model.training


def test_a_16_bit_eager_model_with_large_logits_passes_its_self_check() -> None:
    model = models.widened(models.llama("eager"), 6.0).to(torch.bfloat16)
    with catching(model) as caught, torch.no_grad():
        model(**models.tokens())
    for call in caught.calls:
        arrays = {name: getattr(call, name).float().numpy() for name in ("q", "k", "v", "output")}
        mask = None if call.mask is None else call.mask.numpy()
        terms: dict[str, Any] = {"mask": mask, "scale": call.scale, "causal": call.causal}
        rounding = attention.rounding_of(call.route, call.dtype)
        for rounded, passes in ((rounding, True), (None, False)):
            weights = attention.weights(arrays["q"], arrays["k"], rounding=rounded, **terms)
            error = attention.disagreement(weights, arrays["v"], arrays["output"])
            assert (error <= attention.LIMIT_16_BITS) == passes, error
