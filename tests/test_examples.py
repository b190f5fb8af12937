import re
import subprocess
import sys
from pathlib import Path

import transformers

from headscope import demo, open_trial

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_sst2_trains_a_saved_bert_and_prints_accuracy_beside_the_majority_class(tmp_path: Path) -> None:
    rows = [(f"a {word} film number {n}", label) for n in range(24) for word, label in (("fine", 1), ("dull", 0))]
    dev = [*rows[:12], ("not bad", 1), ("bad", 1)]
    for name, part in (("train.tsv", rows), ("dev.tsv", dev)):
        (tmp_path / name).write_text("".join(f"{text}\t{label}\n" for text, label in part))
    tokenizer = demo.make_tokenizer(rows)
    tokenizer.save_pretrained(tmp_path / "bert")
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")

    command = [sys.executable, "-W", "error", str(EXAMPLES / "sst2.py"), "--data", str(tmp_path), "--model"]
    options = ["--out", str(tmp_path / "run"), "--batch", "8", "--every", "2", "--limit", "40"]
    done = subprocess.run([*command, str(tmp_path / "bert"), *options], capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    found = re.search(r"dev accuracy (0\.\d{4}|1\.0000), majority class 0\.5714 \(14 sentences\)", done.stdout)
    assert found, done.stdout
    assert 0 <= float(found[1]) <= 1
    assert "5 steps in" in done.stdout
    assert f"headscope serve {tmp_path / 'run'}" in done.stdout
    assert open_trial(tmp_path / "run").steps() == [0, 2, 4, 5]
