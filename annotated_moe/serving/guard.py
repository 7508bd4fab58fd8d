# Generated from book/chapters/98_server_details.md by `make sync`; edit the chapter.
"""Who may call a server, and how often it was called.
"""

import base64
import hashlib
import hmac
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import starlette.requests as web
from starlette.responses import Response
from starlette.routing import Route

from annotated_moe.serving.http import Service, make_app, refusal
from annotated_moe.serving.protocol import Refusal
from annotated_moe.serving.requests import Handle

# %% book/chapters/98_server_details.md, cell 16
OPEN = "/", "/health"


class Guard:
    """An ASGI application that asks who is there, before another.

    `key`: what must come as `Authorization: Bearer ...`; `hosts`: the
    names under which it may be called. Empty: anyone, anyhow.
    """

    def __init__(
        self, app: Any, key: str, hosts: Iterable[str]
    ) -> None:
        self.app, self.key = app, key.encode()
        self.hosts = frozenset(hosts)

    async def __call__(
        self, scope: Any, receive: Any, send: Any
    ) -> None:
        no = self.wrong(scope) if scope["type"] == "http" else None
        if no is None:
            await self.app(scope, receive, send)
        else:
            await refusal(no)(scope, receive, send)

    def wrong(self, scope: Any) -> Refusal | None:
        """Why not."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        host = re.sub(r":\d+$", "", host).lower()
        if self.hosts and host not in self.hosts:
            return Refusal(
                f"this server is not called {host!r:.60}: start it "
                "with --host to be called from elsewhere", status=403)
        if not self.key or scope["path"] in OPEN:
            return None
        said = headers.get(b"authorization", b"")
        kind, _, shown = said.partition(b" ")
        same = hmac.compare_digest(shown.strip(), self.key)
        if kind.lower() == b"bearer" and same:
            return None
        return Refusal(
            "the header Authorization must be Bearer and the API key",
            status=401, code="invalid_api_key")


# %% book/chapters/98_server_details.md, cell 17
BOUNDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Histogram:
    """Counts of seconds, up to each of `BOUNDS` and beyond."""

    def __init__(self, name: str, about: str) -> None:
        self.name, self.about = name, about
        self.counts, self.total = [0] * (len(BOUNDS) + 1), 0.0

    def note(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def lines(self) -> Iterator[str]:
        yield f"# HELP {self.name} {self.about}"
        yield f"# TYPE {self.name} histogram"
        below = 0
        for bound, count in zip([*BOUNDS, "+Inf"], self.counts):
            below += count
            yield f'{self.name}_bucket{{le="{bound}"}} {below}'
        yield f"{self.name}_sum {self.total:.6f}"
        yield f"{self.name}_count {below}"


# %% book/chapters/98_server_details.md, cell 18
class Meter:
    """Counts what a service does; `app` is asked through it."""

    def __init__(self, service: Service, app: Any = None) -> None:
        self.service, self.app = service, app
        self.answers: Counter[tuple[str, int]] = Counter()
        self.first = Histogram("annotated_moe_first_token_seconds",
                               "From the request to its first token.")
        self.whole = Histogram("annotated_moe_request_seconds",
                               "From the request to its end.")
        service.listeners.append(self.note)

    def note(self, handle: Handle) -> None:
        times = handle.times
        for name, histogram in (("first", self.first),
                                ("ended", self.whole)):
            if name in times:
                histogram.note(times[name] - times["submitted"])

    async def __call__(
        self, scope: Any, receive: Any, send: Any
    ) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"]
                path = path if path in self.known else "other"
                self.answers[path, message["status"]] += 1
            await send(message)

        http = scope["type"] == "http"
        await self.app(scope, receive, counted if http else send)

    known = ("/", "/health", "/metrics", "/v1/models",
             "/v1/completions", "/v1/chat/completions")


# %% book/chapters/98_server_details.md, cell 19
NOW = {"slots": "Rows that decode together.",
       "running": "Requests that have a row.",
       "waiting": "Requests in the line."}
EVER = {"submitted": "Requests taken into the line.",
        "refused": "Requests sent away by a full line.",
        "prompt_tokens": "Tokens of prompts.",
        "prefix_tokens": "Of these, tokens that a row had read.",
        "new_tokens": "Tokens written.",
        "steps": "Steps of the engine that wrote a token."}


def metric_lines(meter: Meter) -> Iterator[str]:
    """All that is known, as Prometheus reads it."""
    stats = meter.service.engine.stats
    for kind, table in (("gauge", NOW), ("counter", EVER)):
        for name, about in table.items():
            full = "annotated_moe_" + name
            full += "_total" * (kind == "counter")
            yield f"# HELP {full} {about}"
            yield f"# TYPE {full} {kind}"
            yield f"{full} {getattr(stats, name)}"
    yield "# HELP annotated_moe_ended_total Requests, by their end."
    yield "# TYPE annotated_moe_ended_total counter"
    for reason, count in sorted(stats.ended.items()):
        yield f'annotated_moe_ended_total{{reason="{reason}"}} {count}'
    yield "# HELP annotated_moe_answers_total Answers, by status."
    yield "# TYPE annotated_moe_answers_total counter"
    for (path, status), count in sorted(meter.answers.items()):
        labels = f'path="{path}",status="{status}"'
        yield f"annotated_moe_answers_total{{{labels}}} {count}"
    yield from meter.first.lines()
    yield from meter.whole.lines()


# %% book/chapters/98_server_details.md, cell 20
def hash_of(kind: str, page: str) -> str:
    """What a policy calls the page's only element of a kind."""
    found = re.findall(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
    digest = hashlib.sha256(found[0].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def page_answer() -> Response:
    """The page, and what a browser may do with it."""
    page = Path(__file__).with_name("page.html").read_text("utf-8")
    policy = "; ".join([
        "default-src 'none'", "connect-src 'self'", "img-src data:",
        f"style-src {hash_of('style', page)}",
        f"script-src {hash_of('script', page)}",
        "base-uri 'none'", "form-action 'none'",
        "frame-ancestors 'none'",
    ])
    headers = {"content-security-policy": policy,
               "x-content-type-options": "nosniff",
               "referrer-policy": "no-referrer",
               "cache-control": "no-cache"}
    return Response(page, 200, headers, "text/html; charset=utf-8")


# %% book/chapters/98_server_details.md, cell 21
def guarded_app(
    service: Service, key: str = "", hosts: Iterable[str] = ()
) -> Guard:
    """The whole server: who may call, what is counted, the answers."""
    meter = Meter(service)

    async def metrics(http: web.Request) -> Response:
        text = "\n".join(metric_lines(meter)) + "\n"
        return Response(text, media_type="text/plain; version=0.0.4")

    async def page(http: web.Request) -> Response:
        return page_answer()

    meter.app = make_app(service, [
        Route("/metrics", metrics), Route("/", page)])
    return Guard(meter, key, hosts)
