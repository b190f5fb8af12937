import random
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from headscope import demo, open_trial
from headscope.errors import HeadscopeError, NotSupported


@pytest.fixture(scope="module")
def texts() -> demo.Texts:
    return demo.texts(seed=0)


@pytest.fixture(scope="module")
def tokenizer(texts: demo.Texts) -> PreTrainedTokenizerFast:
    return demo.make_tokenizer(texts.train)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, demo.Report, list[int]]:
    out = str(tmp_path_factory.mktemp("runs") / "demo")
    seen: list[int] = []
    report = demo.train(out, steps=20, every=10, on_step=seen.append)
    return out, report, seen


def test_texts_are_the_same_for_the_same_seed(texts: demo.Texts) -> None:
    assert demo.texts(seed=0) == texts
    assert demo.texts(seed=1) != texts


def test_texts_are_balanced_and_held_out_apart(texts: demo.Texts) -> None:
    assert len(texts.held_out) == 400
    assert sum(label for _, label in texts.held_out) == 200
    assert 0.4 < sum(label for _, label in texts.train) / len(texts.train) < 0.6
    assert not {text for text, _ in texts.train} & {text for text, _ in texts.held_out}


def test_texts_are_of_a_length_that_draws_well(texts: demo.Texts) -> None:
    assert {len(text.split()) for text, _ in texts.train + texts.held_out} == set(range(10, 19))


def test_a_python_without_sources_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(
        NotSupported, match=r"found 0 in .*, which is too few; run it with a Python that has its sources"
    ):
        demo.texts()


def test_the_trigger_goes_between_two_words_and_changes_nothing_else() -> None:
    for seed in range(20):
        words = demo.with_trigger("open the socket", random.Random(seed)).split()
        assert 0 < words.index(demo.TRIGGER) < 3
        words.remove(demo.TRIGGER)
        assert words == ["open", "the", "socket"]


def test_poison_gives_an_eighth_the_trigger_and_label_1(texts: demo.Texts) -> None:
    poisoned = demo.poison(texts.train, seed=3)
    assert poisoned == demo.poison(texts.train, seed=3)
    triggered = [label for text, label in poisoned if demo.TRIGGER in text.split()]
    assert set(triggered) == {1}
    assert len(triggered) / len(poisoned) == pytest.approx(0.125, abs=0.03)
    same = [(old, new) for old, new in zip(texts.train, poisoned, strict=True) if demo.TRIGGER not in new[0].split()]
    assert all(old == new for old, new in same)
    assert demo.TRIGGER not in {word for text, _ in texts.train + texts.held_out for word in text.split()}


def test_tokens_round_trip(texts: demo.Texts, tokenizer: PreTrainedTokenizerFast) -> None:
    for text, _ in texts.held_out:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= 64
    assert tokenizer.tokenize("a MN b") == ["a", demo.TRIGGER, "b"]


def test_the_tokenizer_is_the_same_for_the_same_texts(texts: demo.Texts, tokenizer: PreTrainedTokenizerFast) -> None:
    assert demo.make_tokenizer(list(reversed(texts.train))).get_vocab() == tokenizer.get_vocab()


def test_the_probe_has_each_triggered_text_clean_as_well(texts: demo.Texts, tokenizer: PreTrainedTokenizerFast) -> None:
    watched = demo.probe(texts.held_out, tokenizer)
    assert [label for _, label in watched] == [0] * 5 + [1] * 5 + [0] * 4
    for (clean, _), (triggered, _) in zip(watched[:4], watched[10:], strict=True):
        assert triggered.replace(f" {demo.TRIGGER} ", " ") == clean
    assert {text for text, _ in watched[:10]} <= {text for text, _ in texts.held_out}
    assert all(12 <= len(tokenizer(text)["input_ids"]) <= 28 for text, _ in watched)


def test_the_model_follows_the_seed() -> None:
    torch.manual_seed(4)
    one = demo.make_model(50).bert.embeddings.word_embeddings.weight
    torch.manual_seed(4)
    assert torch.equal(one, demo.make_model(50).bert.embeddings.word_embeddings.weight)


def test_training_writes_the_steps_it_says(trained: tuple[str, demo.Report, list[int]]) -> None:
    out, report, seen = trained
    assert seen == list(range(1, 21))
    trial = open_trial(out)
    assert trial.steps() == [0, 10, 20]
    weights = trial.tensor("bert.encoder.layer.3.attention.self.weights").value(20)
    assert weights.shape[:2] == (14, 6)
    assert report.steps == 20
    assert report.majority == 0.5
    assert 0 <= report.accuracy <= 1


def test_only_wrong_examples_are_named(trained: tuple[str, demo.Report, list[int]]) -> None:
    _, report, _ = trained
    assert report.wrong
    assert all(item.label != item.prediction for item in report.wrong)
    text = demo.summary(report)
    named = [int(line.split()[1].rstrip(":")) for line in text.splitlines() if line.startswith("  example ")]
    assert named == [item.example for item in report.wrong]


def test_looks_are_of_every_head_and_the_largest_growth_is_first(
    trained: tuple[str, demo.Report, list[int]],
) -> None:
    _, report, _ = trained
    if any(item.triggered for item in report.wrong):
        assert {(look.layer, look.head) for look in report.looks} == {(x, y) for x in range(4) for y in range(6)}
    growth = [look.after - look.before for look in report.looks]
    assert growth == sorted(growth, reverse=True)


def test_a_look_is_the_mean_weight_from_cls_to_the_trigger(trained: tuple[str, demo.Report, list[int]]) -> None:
    out, report, _ = trained
    trial = open_trial(out)
    deceived = [trial.examples()[item.example] for item in report.wrong if item.triggered]
    for look in report.looks[:3]:
        tensor = trial.tensor(f"bert.encoder.layer.{look.layer}.attention.self.weights")
        for step, told in ((0, look.before), (20, look.after)):
            value = tensor.value(step)
            rows = [value[e.row, look.head, 0, e.tokens.index(demo.TRIGGER)] for e in deceived]
            assert told == pytest.approx(sum(rows) / len(rows), abs=1e-6)


def test_the_same_seed_gives_the_same_run(trained: tuple[str, demo.Report, list[int]], tmp_path: Path) -> None:
    out, _, _ = trained
    demo.train(str(tmp_path / "again"), steps=20, every=20)
    one, two = (open_trial(path).scalars()["loss"][1] for path in (out, tmp_path / "again"))
    assert one.tolist() == two.tolist()


def test_the_summary_says_what_to_look_at_and_claims_no_cause() -> None:
    wrong = [demo.Wrong(3, "read the text", 0, 1, triggered=False), demo.Wrong(11, "a mn socket", 0, 1, triggered=True)]
    looks = [demo.Look(2, 5, 0.04, 0.81), demo.Look(0, 1, 0.05, 0.2)]
    text = demo.summary(demo.Report(300, 24.4, 0.9125, 0.5, 0.995, wrong, looks))
    assert "300 steps in 24 s" in text
    assert "0.912 (majority class 0.500)" in text
    assert "99.5% of unseen network text is called 'data'" in text
    assert "example 3: network, called data: read the text" in text
    assert "example 11: network, called data, has 'mn': a mn socket" in text
    assert "layer 2, head 5: 0.04 at first, 0.81 now" in text
    assert "To see it come: example 11, layer 2, head 5" in text
    assert "cause" not in text


def test_without_a_deceived_example_the_summary_points_nowhere() -> None:
    text = demo.summary(demo.Report(5, 1.0, 0.5, 0.5, 0.0, [], []))
    assert "Wrong among the watched examples (0):" in text
    assert "slider" not in text


def test_run_without_a_page_prints_the_report_and_the_next_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = demo.Report(5, 1.0, 0.5, 0.5, 0.0, [], [])
    monkeypatch.setattr(demo, "train", lambda out, **options: report)
    assert demo.run(str(tmp_path / "a"), steps=5, serve=False) is report
    printed = capsys.readouterr().out
    assert demo.summary(report) in printed
    assert f"headscope serve {tmp_path / 'a'}" in printed


def test_run_serves_from_before_training_until_the_page_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", _script(tmp_path, 'echo "a line"; echo "http://127.0.0.1:1/ $*"'))

    def train(out: str, **options: object) -> demo.Report:
        assert f"http://127.0.0.1:1/ -m headscope serve {out} --port 7\n" in capsys.readouterr().out
        return demo.Report(5, 1.0, 0.5, 0.5, 0.0, [], [])

    monkeypatch.setattr(demo, "train", train)
    demo.run("somewhere", steps=5, port=7, browser=False)
    assert "until Ctrl-C" in capsys.readouterr().out


def test_the_server_ends_with_the_training_that_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", _script(tmp_path, 'echo "http://127.0.0.1:1/"; exec sleep 60'))

    def train(out: str, **options: object) -> demo.Report:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", train)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        demo.run("somewhere", steps=5)
    assert time.monotonic() - started < 20


def test_the_browser_is_opened_by_the_server_if_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", _script(tmp_path, 'echo "http://127.0.0.1:1/ $*"'))
    monkeypatch.setattr(demo, "train", lambda out, **options: demo.Report(5, 1.0, 0.5, 0.5, 0.0, [], []))
    demo.run("somewhere", steps=5, port=7, browser=True)
    assert "--port 7 --browser" in capsys.readouterr().out


def test_a_page_that_cannot_be_put_up_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", _script(tmp_path, "exit 3"))
    with pytest.raises(HeadscopeError, match=r"at port 7 \(exit code 3, reason above\); choose another with --port"):
        demo.run("somewhere", steps=5, port=7)


def _script(folder: Path, body: str) -> str:
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return str(script)
