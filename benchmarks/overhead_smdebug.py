"""Run by overhead.py with smdebug's own interpreter: forwards with its hooks on the q and k linears, and without."""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification


def main(folder: str, size: str, examples: int, tokens: int, rounds: int) -> None:
    """Prints CPU seconds of this thread, hooked and plain in turns, and the size of one saved step."""
    import smdebug.pytorch as smd

    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = [
        BertForSequenceClassification(BertConfig())
        if size == "base"
        else BertForSequenceClassification.from_pretrained(folder)
        for _ in range(2)
    ]
    for model in models:
        model.train(mode=False)
    generator = torch.Generator().manual_seed(examples)
    batch = {"input_ids": torch.randint(1000, 20000, (examples, tokens), generator=generator)}
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        hook = smd.Hook(
            out_dir=str(out),
            include_regex=[r"attention\.self\.(query|key)_output"],
            save_config=smd.SaveConfig(save_interval=1),
        )
        hook.register_module(models[0])
        hook.set_mode(smd.modes.EVAL)
        times: list[list[float]] = [[], []]
        for turn in range(rounds + 1):
            for which in (0, 1):
                began = time.thread_time()
                with torch.no_grad():
                    models[which](**batch)
                if turn:
                    times[which].append(time.thread_time() - began)
        hook.close()
        saved = sum(file.stat().st_size for file in out.rglob("*.tfevents")) / (rounds + 1) / 1e6
    print(json.dumps({"hooked": times[0], "plain": times[1], "MB": saved}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
