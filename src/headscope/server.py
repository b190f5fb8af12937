"""The live page: answers over HTTP, new steps as server-sent events. Read only."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import secrets
import socket
import time
import webbrowser
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .answer import BadQuestion, answer, scalars, state
from .blob import Json
from .errors import HeadscopeError
from .trial import Trial

BUNDLE = Path(__file__).parent / "static" / "headscope.js"
PORT = 8265

_POLL_S = 0.1
_SIGN_OF_LIFE_S = 5.0
_PROBLEM_S = 2.0
_PORTS_TRIED = 20
_SCRIPT = (
    'import { mount, httpSource } from "./static/headscope.js";\n'
    'mount(document.getElementById("app"), httpSource("./"));'
)
_PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Headscope</title>
<link rel="icon" href="data:,">
<style>html, body {{ margin: 0; height: 100%; }} #app {{ height: 100%; }}</style>
</head>
<body>
<main id="app"></main>
<noscript>Headscope draws with JavaScript, which is switched off in this browser.</noscript>
<script type="module">{_SCRIPT}</script>
</body>
</html>
"""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
        f"script-src 'self' 'sha256-{base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()}'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def make_app(
    trial: Trial, *, token: str = "", hosts: list[str] | None = None, ending: Callable[[], bool] = lambda: False
) -> Starlette:
    """The page and its API for one run, as an ASGI application.

    Args:
        trial: the run; it need not exist yet.
        token: must come with the page and every question; none is asked for if empty.
        hosts: what the Host header may name; this machine only, if None.
        ending: event streams close when this is true.
    """

    def locked(request: Request) -> Response | None:
        if not token or secrets.compare_digest(request.query_params.get("token", "").encode(), token.encode()):
            return None
        return _problem(
            403, "Forbidden", "the token is missing or wrong; open the address that `headscope serve` printed"
        )

    async def page(request: Request) -> Response:
        refusal = locked(request)
        return HTMLResponse(_PAGE, headers=_HEADERS) if refusal is None else refusal

    async def bundle(request: Request) -> Response:
        return FileResponse(BUNDLE, media_type="text/javascript", headers={"Cache-Control": "no-cache"})

    async def reply(request: Request) -> Response:
        refusal = locked(request)
        if refusal is not None:
            return refusal
        return await run_in_threadpool(_reply, trial, request.query_params.get("q", ""))

    async def events(request: Request) -> Response:
        refusal = locked(request)
        return refusal or StreamingResponse(
            _events(trial, request.headers.get("last-event-id", ""), ending),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    return Starlette(
        routes=[
            Route("/", page),
            Route("/static/headscope.js", bundle),
            Route("/api/answer", reply),
            Route("/api/events", events),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts or ["127.0.0.1", "localhost"])],
    )


def _problem(status: int, kind: str, message: str) -> Response:
    return JSONResponse({"error": kind, "message": message}, status, headers=_HEADERS)


def _reply(trial: Trial, text: str) -> Response:
    try:
        question = json.loads(text)
        if not isinstance(question, dict):
            raise BadQuestion(f"a question is a JSON object, not {text!r}")
        return Response(answer(trial, question), media_type="application/octet-stream", headers=_HEADERS)
    except (BadQuestion, json.JSONDecodeError, RecursionError) as problem:
        return _problem(400, type(problem).__name__, str(problem))
    except LookupError as problem:
        return _problem(404, type(problem).__name__, str(problem.args[0]))
    except Exception as problem:
        return _problem(500, type(problem).__name__, str(problem))


@dataclass
class _Sent:
    """What one page has been told; its text form is the event's id."""

    run: str = ""
    attempt: int = -1
    step: int = -1
    rows: dict[str, int] = field(default_factory=dict)
    state: Json = field(default_factory=dict)
    at: float = 0.0

    @classmethod
    def of(cls, text: str) -> _Sent:
        try:
            raw = json.loads(text)
            return cls(
                str(raw["run"]), int(raw["attempt"]), int(raw["step"]), {str(k): int(v) for k, v in raw["rows"].items()}
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            return cls()

    def news(self, trial: Trial) -> str:
        """The next event, or nothing if nothing has changed."""
        steps, attempt, now = trial.steps("probe"), trial.attempt or 0, state(trial)
        run = trial.identity
        if (run, attempt) != (self.run, self.attempt):
            self.run, self.attempt, self.step, self.rows = run, attempt, -1, {}
        fresh = [step for step in steps if step > self.step]
        rows = scalars(trial, self.rows)
        visible = {key: value for key, value in now.items() if key != "age_s"}
        quiet = time.monotonic() - self.at < _SIGN_OF_LIFE_S
        if not fresh and not rows and visible == self.state and quiet:
            return ""
        self.state, self.at = visible, time.monotonic()
        self.step = max([self.step, *fresh])
        self.rows |= {name: found["step"][-1] for name, found in rows.items()}
        mark = json.dumps({"run": run, "attempt": attempt, "step": self.step, "rows": self.rows})
        data = json.dumps({"run": run, "attempt": attempt, "steps": fresh, "state": now, "scalars": rows})
        return f"event: trial\nid: {mark}\ndata: {data}\n\n"


async def _events(trial: Trial, last: str, ending: Callable[[], bool]) -> AsyncIterator[str]:
    sent = _Sent.of(last)
    yield "retry: 1000\n\n"
    while not ending():
        began, least_s = time.monotonic(), _POLL_S
        try:
            event = await run_in_threadpool(sent.news, trial)
        except HeadscopeError as problem:
            said = json.dumps({"error": type(problem).__name__, "message": str(problem)})
            event, least_s = f"event: problem\ndata: {said}\n\n", _PROBLEM_S
        if event:
            yield event
        # A slow listing is not asked for more than a twentieth of the time.
        await anyio.sleep(least_s if event else max(least_s, 20 * (time.monotonic() - began)))


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket on that port, or on one of the next ones if it is taken.

    Raises:
        HeadscopeError: none of them is free, or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    problem: OSError | None = None
    for candidate in range(port, min(65536, port + (_PORTS_TRIED if port else 1))):
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, candidate))
            return sock
        except OSError as error:
            sock.close()
            problem = error
    raise HeadscopeError(
        f"cannot listen on {host} port {port} or the next {_PORTS_TRIED - 1}: {problem}; choose another with --port"
    )


def serve(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    browser: bool = False,
    say: Callable[[str], Any] = print,
) -> None:
    """Serves the live page of a run until it is interrupted.

    Args:
        path: the run; need not exist yet.
        host: where to listen. Beyond this machine, the address that is said carries a token.
        port: the first to try; 0 takes any that is free.
        browser: open the page.
        say: gets the address, once the socket listens.
    """
    sock = listen(host, port)
    token = "" if _loopback(host) else secrets.token_urlsafe(16)
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    shown = f"[{name}]" if ":" in name else name
    address = f"http://{shown}:{sock.getsockname()[1]}/" + (f"?token={token}" if token else "")
    hosts = ["127.0.0.1", "localhost", "[::1]", host] if _loopback(host) else ["*"]
    trial = Trial(path, refresh_s=_POLL_S / 2)
    app = make_app(trial, token=token, hosts=hosts, ending=lambda: server.should_exit)
    # An open event stream would keep uvicorn from ending: it waits for it without a limit of its own.
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    sock.listen()
    say(f"Headscope shows {path} at {address}")
    if browser:
        webbrowser.open(address)
    try:
        server.run(sockets=[sock])
    except KeyboardInterrupt:
        pass
    finally:
        sock.close()
