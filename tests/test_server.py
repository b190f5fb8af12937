from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from headscope.blob import decode
from headscope.errors import HeadscopeError
from headscope.server import _Sent, listen, make_app
from headscope.trial import Trial
from runs import make, put_probe, put_step, writer


def client(path: Path, **options: Any) -> TestClient:
    return TestClient(make_app(Trial(path), **options), base_url="http://127.0.0.1")


def test_page_names_the_bundle_and_keeps_to_itself(tmp_path: Path) -> None:
    reply = client(tmp_path).get("/")
    assert './static/headscope.js"' in reply.text and '<main id="app">' in reply.text
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "http://" not in reply.text and "https://" not in reply.text
    assert client(tmp_path).get("/static/headscope.js").text.startswith("// headscope web bundle")


def test_answers_are_the_protocols_bytes(tmp_path: Path) -> None:
    ask = {"ask": "lines", "step": 2, "layer": 1, "example": 0, "heads": [0, 3], "first": 0, "count": 5, "top": 2}
    reply = client(make(tmp_path, [0, 2])).get("/api/answer", params={"q": json.dumps(ask)})
    tensors, header = decode(reply.content)
    assert reply.headers["cache-control"] == "no-store"
    assert tensors["weight"].shape == (2, 5, 2)
    assert json.loads(header.metadata["facts"])["check"]["passed"] is True


@pytest.mark.parametrize(
    ("question", "status", "says"),
    [
        ("nonsense", 400, "Expecting value"),
        ("[1]", 400, "a question is a JSON object, not '[1]'"),
        ('{"ask": "weather"}', 400, "cannot answer ask='weather'; known are trial, step, lines, first_look"),
        ('{"ask": "step", "step": 7}', 404, "no step 7 in"),
        ('{"ask": "step", "step": "7"}', 400, "step must be a whole number from 0 on, not '7'"),
    ],
)
def test_problems_say_what_to_do(tmp_path: Path, question: str, status: int, says: str) -> None:
    reply = client(make(tmp_path, [0, 2])).get("/api/answer", params={"q": question})
    assert reply.status_code == status
    assert says in reply.json()["message"]


def test_other_hosts_are_refused(tmp_path: Path) -> None:
    assert client(tmp_path).get("/", headers={"host": "evil.example"}).status_code == 400
    assert client(tmp_path).get("/", headers={"host": "localhost:8265"}).status_code == 200


def test_nothing_can_be_written(tmp_path: Path) -> None:
    page = client(tmp_path)
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert page.request(method, "/api/answer").status_code == 405


def test_token_is_asked_for_everywhere_but_at_the_bundle(tmp_path: Path) -> None:
    page = client(make(tmp_path, [0]), token="secret", hosts=["*"])
    question = json.dumps({"ask": "trial"})
    for path in ("/", "/api/answer", "/api/events"):
        assert page.get(path, params={"q": question}).status_code == 403
        assert (
            page.get(path, params={"q": question, "token": "wrong"})
            .json()["message"]
            .startswith("the token is missing")
        )
    assert page.get("/", params={"token": "secret"}).status_code == 200
    assert page.get("/api/answer", params={"q": question, "token": "secret"}).status_code == 200


def news(sent: _Sent, trial: Trial) -> dict[str, Any]:
    text = sent.news(trial)
    match = re.search(r"^data: (.*)$", text, re.MULTILINE)
    return json.loads(match[1]) if match else {}


def test_events_tell_what_is_new_and_nothing_twice(tmp_path: Path) -> None:
    trial, sent = Trial(tmp_path), _Sent()
    assert news(sent, trial)["state"]["state"] == "waiting"
    assert news(sent, trial) == {}
    run = writer(tmp_path)
    put_probe(run)
    put_step(run, 0)
    run.log(0, {"loss": 1.0})
    trial.wait(0, timeout=10)
    first = news(sent, trial)
    assert (first["attempt"], first["steps"], first["state"]["state"]) == (0, [0], "training")
    put_step(run, 4)
    run.log(4, {"loss": 0.5, "lr": 0.1})
    run.close()
    second = news(sent, trial)
    assert second["steps"] == [4] and second["state"]["state"] == "ended"
    rows = {**first["scalars"], **second["scalars"]}
    assert rows["lr"] == {"step": [4], "value": [0.1]} and rows["loss"]["step"][-1] == 4
    assert news(sent, trial) == {}


def test_a_page_that_comes_back_gets_only_the_rest(tmp_path: Path) -> None:
    trial = Trial(make(tmp_path, [0, 2]))
    text = _Sent().news(trial)
    match = re.search(r"^id: (.*)$", text, re.MULTILINE)
    assert match is not None
    again = _Sent.of(match[1])
    assert news(again, trial)["steps"] == [] and again.step == 2
    assert news(_Sent.of("rubbish"), trial)["steps"] == [0, 2]


def test_a_restart_is_told_whole(tmp_path: Path) -> None:
    trial, sent = Trial(make(tmp_path, [0, 2])), _Sent()
    assert news(sent, trial)["steps"] == [0, 2]
    make(tmp_path, [0, 3])
    event = news(sent, trial)
    assert (event["attempt"], event["steps"]) == (1, [0, 3])


def test_port_that_is_taken_gives_the_next(tmp_path: Path) -> None:
    one = listen("127.0.0.1", 0)
    one.listen()
    port = one.getsockname()[1]
    two = listen("127.0.0.1", port)
    assert two.getsockname()[1] > port
    one.close()
    two.close()
    with pytest.raises(HeadscopeError, match=r"cannot listen on 192\.0\.2\.1 port 0 .*; choose another with --port"):
        listen("192.0.2.1", 0)


def test_serving_a_run_that_comes_later_and_stopping_with_a_page_open(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "headscope", "serve", str(tmp_path / "later"), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        match = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())
        assert match is not None
        with urllib.request.urlopen(match[0] + "api/events", timeout=20) as stream:
            lines = [stream.readline().decode() for _ in range(5)]
            assert any('"state": "waiting"' in line for line in lines)
            make(tmp_path / "later", [0])
            while '"steps": [0]' not in lines[-1]:
                lines.append(stream.readline().decode())
            server.send_signal(signal.SIGINT)
            began = time.monotonic()
            server.wait(10)
        assert time.monotonic() - began < 5
    finally:
        server.kill()
        server.communicate()


def test_another_run_under_the_same_name_is_told_whole(tmp_path: Path) -> None:
    trial, sent = Trial(tmp_path / "run"), _Sent()
    make(tmp_path / "run", [0, 2, 30])
    first = news(sent, trial)
    shutil.rmtree(tmp_path / "run")
    gone = news(sent, trial)
    assert (gone["run"], gone["steps"], gone["state"]["state"]) == ("", [], "waiting")
    make(tmp_path / "run", [0, 3])
    again = news(sent, trial)
    assert (again["attempt"], again["steps"]) == (0, [0, 3])
    assert again["run"] not in ("", first["run"])
