# Generated from book/chapters/31_server.md, book/chapters/98_server_details.md by `make sync`; edit the chapters.
"""The engine of the last chapter answers whoever holds a Python object.
Other programs have a socket, and many of them speak OpenAI's protocol.
By the end of this chapter `annotated-moe serve` speaks it, too: text
goes out as it is written, a client that hangs up frees its row, a crowd
is told when to come back, and OpenAI's own client library works with it
unchanged (a test of this repository asks with it).
"""

import asyncio
import contextlib
import json
import math
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import starlette.requests as web
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from annotated_moe.chat import named_templates
from annotated_moe.generate import Model
from annotated_moe.lens import expert_layers
from annotated_moe.serving.engine import Engine
from annotated_moe.serving.protocol import (
    Refusal,
    Wish,
    answer_of,
    choice_of,
    dump,
    read_body,
    usage_of,
)
from annotated_moe.serving.requests import (
    Event,
    Handle,
    QueueFull,
    Request,
)


# %% book/chapters/31_server.md, cell 11
class Ticket:
    """A request on its way, as a client's coroutine sees it.

    Must be made in a running event loop. After the service's `seconds`
    the request is cancelled, and was `late`; events from before count.
    """

    def __init__(self, service: "Service", request: Request) -> None:
        self.service, loop = service, asyncio.get_running_loop()
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        self.late = self.gone = False

        def pass_on(event: Event) -> None:  # in the engine's thread
            loop.call_soon_threadsafe(self.queue.put_nowait, event)

        self.handle = service.engine.submit(request, pass_on)
        self.timer = loop.call_later(service.seconds, self.expire)

    def expire(self) -> None:
        self.late = True
        self.handle.cancel()                # and do not wait for it
        self.queue.put_nowait(Event(
            self.handle, 0, finish_reason="cancelled"))

    def close(self) -> None:
        """Nobody listens any more."""
        self.timer.cancel()
        self.handle.cancel()
        for listen in self.service.listeners:
            listen(self.handle)

    async def batches(self) -> AsyncIterator[list[Event]]:
        """All events to the end, as many at a time as have come."""
        over = False
        while not over:
            events: list[Event] = []
            while not over and not (events and self.queue.empty()):
                events.append(await self.queue.get())
                over = events[-1].finish_reason is not None
            yield events


# %% book/chapters/31_server.md, cell 12
class Service:
    """An engine in a thread, for an event loop to ask.

    `name` is what clients call the model. A request may take `seconds`
    and `max_tokens`, and its body `max_bytes`. Each of `listeners` is
    told of a request when it is over, as far as it came.
    """

    def __init__(
        self, engine: Engine, name: str = "annotated-moe",
        seconds: float | int = 600, max_tokens: int | None = None,
        max_bytes: int = 2**20,
    ) -> None:
        self.engine, self.name = engine, name
        self.seconds, self.max_bytes = seconds, max_bytes
        self.max_tokens = max_tokens or engine.context
        self.usual = 1.0                    # seconds a request takes
        self.listeners: list[Callable[[Handle], None]] = [self.note]
        self.stopping = threading.Event()
        self.thread = threading.Thread(
            target=engine.run, args=[self.stopping], daemon=True)

    @property
    def model(self) -> Model:
        return self.engine.model

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """End all that runs, and the thread."""
        self.stopping.set()
        self.thread.join()

    def note(self, handle: Handle) -> None:
        """Learn from a request that has ended how long they take."""
        times = handle.times
        if "started" in times and "ended" in times:
            spent = times["ended"] - times["started"]
            self.usual += 0.1 * (spent - self.usual)

    def patience(self) -> int:
        """Seconds until somebody who is sent away may come again."""
        turns = (self.engine.stats.waiting + 1) / self.engine.slots
        return min(max(math.ceil(turns * self.usual), 1), 60)


# %% book/chapters/31_server.md, cell 35
def line_of(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + dump(data) + b"\n\n"


# %% book/chapters/31_server.md, cell 36
async def lines_of(
    service: Service, wish: Wish, ticket: Ticket
) -> AsyncIterator[bytes]:
    """The whole of a streamed answer, as it comes."""
    count, wants = 0, {"usage": None} if wish.usage else {}
    if wish.chat:
        first = {"index": 0, "finish_reason": None,
                 "delta": {"role": "assistant", "content": ""}}
        yield line_of(answer_of(wish, [first], True) | wants)
    async for events in ticket.batches():
        if wrong := failed(ticket, events[-1]):
            events.pop()                    # the rest is good text
        count += sum(event.token is not None for event in events)
        one_by_one = wish.options.get("experts")
        runs = [[e] for e in events] if one_by_one else [events]
        for some in filter(None, runs):
            choice = choice_of(wish, some, True)
            yield line_of(answer_of(wish, [choice], True) | wants)
        if wrong:
            yield line_of(wrong.body)
            return
    if wish.usage:
        usage = {"usage": usage_of(wish, count)}
        yield line_of(answer_of(wish, [], True) | usage)
    yield b"data: [DONE]\n\n"


# %% book/chapters/31_server.md, cell 37
def failed(ticket: Ticket, end: Event) -> Refusal | None:
    """Why a request did not end well, if it ended, and did not."""
    if end.finish_reason == "error":
        return Refusal(end.error or "the model failed", status=500)
    if end.finish_reason != "cancelled":
        return None
    if ticket.late:
        text = "it took longer than this server lets a request take"
        return Refusal(text, status=504)
    if ticket.gone:
        return Refusal("the client has gone", status=499)
    return Refusal("the server is going down", status=503)


# %% book/chapters/31_server.md, cell 38
@contextlib.asynccontextmanager
async def while_there(
    receive: Any, ticket: Ticket
) -> AsyncIterator[None]:
    """Within it, a client that goes away takes its request along."""
    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ticket.gone = True
        ticket.handle.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        ticket.close()


# %% book/chapters/31_server.md, cell 39
class Streamed:
    """An answer in lines; an ASGI application, as answers are."""

    def __init__(self, lines: AsyncIterator[bytes], ticket: Ticket):
        self.lines, self.ticket = lines, ticket

    async def __call__(
        self, scope: Any, receive: Any, send: Any
    ) -> None:
        headers = [(b"content-type", b"text/event-stream"),
                   (b"cache-control", b"no-store"),
                   (b"x-accel-buffering", b"no")]
        async with while_there(receive, self.ticket):
            await send({"type": "http.response.start", "status": 200,
                        "headers": headers})
            async for line in self.lines:
                await send({"type": "http.response.body",
                            "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


# %% book/chapters/31_server.md, cell 40
def as_json(
    data: Any, status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    return Response(dump(data), status, headers, "application/json")


# %% book/chapters/31_server.md, cell 41
async def whole(
    service: Service, wish: Wish, ticket: Ticket, receive: Any
) -> Response:
    """The answer in one piece."""
    events: list[Event] = []
    async with while_there(receive, ticket):
        async for some in ticket.batches():
            events += some
    if wrong := failed(ticket, events[-1]):
        raise wrong
    count = sum(event.token is not None for event in events)
    answer = answer_of(wish, [choice_of(wish, events, False)], False)
    return as_json(answer | {"usage": usage_of(wish, count)})


# %% book/chapters/31_server.md, cell 42
BODY_SECONDS = 30


async def read_json(http: web.Request, most: int) -> Any:
    """The body; Refusal if it is no JSON, too long or too slow."""
    kind = http.headers.get("content-type", "").split(";")[0].strip()
    if kind.lower() != "application/json":
        raise Refusal(
            "the body must be JSON: send the header Content-Type: "
            "application/json", status=415)
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http.stream():
                data += part
                if len(data) > most:
                    raise Refusal(
                        f"the body is larger than {most:,} bytes",
                        status=413)
        return json.loads(data, parse_constant=no_number)
    except TimeoutError:
        raise Refusal("the body did not come", status=408) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, Refusal):
            raise
        why = (str(error) or "nested too deeply").splitlines()[0]
        raise Refusal(f"the body is no JSON: {why:.100}") from None


# %% book/chapters/31_server.md, cell 43
def no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number")


# %% book/chapters/31_server.md, cell 44
async def answer(kind: str, http: web.Request) -> Any:
    """What a POST of a completion or a chat gets."""
    service: Service = http.app.state.service
    body = await read_json(http, service.max_bytes)
    wish = Wish(kind, service.model, service.name,
                service.engine.context, service.max_tokens)
    wish = await run_in_threadpool(read_body, body, wish)
    ticket = take(service, wish)
    if wish.stream:
        return Streamed(lines_of(service, wish, ticket), ticket)
    return await whole(service, wish, ticket, http.receive)


# %% book/chapters/31_server.md, cell 45
def take(service: Service, wish: Wish) -> Ticket:
    """Its place in the line, or Refusal."""
    if not service.thread.is_alive():
        raise Refusal("the engine has stopped", status=503)
    try:
        ticket = Ticket(service, wish.request)
    except QueueFull as error:
        raise Refusal(
            str(error), status=429, code="queue_full",
            retry_after=service.patience()) from None
    except (ValueError, TypeError) as error:
        raise Refusal(str(error)) from None
    return ticket


# %% book/chapters/31_server.md, cell 46
async def health(http: web.Request) -> Response:
    """Whether requests would be answered."""
    service: Service = http.app.state.service
    good, stats = service.thread.is_alive(), service.engine.stats
    said = {"status": "ok" if good else "the engine has stopped",
            "running": stats.running, "waiting": stats.waiting}
    return as_json(said, 200 if good else 503)


# %% book/chapters/31_server.md, cell 47
ROUTES: list[Route] = [
    Route("/v1/completions", partial(answer, "completions"),
          methods=["POST"]),
    Route("/v1/chat/completions", partial(answer, "chat"),
          methods=["POST"]),
    Route("/health", health),
]


# %% book/chapters/31_server.md, cell 48
def refusal(error: Refusal) -> Response:
    """OpenAI's form of an error."""
    after = error.retry_after
    headers = {} if after is None else {"retry-after": str(after)}
    return as_json(error.body, error.status, headers)


# %% book/chapters/31_server.md, cell 49
async def refuse(http: web.Request, error: Exception) -> Response:
    """The answer to a request that went wrong."""
    if isinstance(error, Refusal):
        return refusal(error)
    if isinstance(error, HTTPException):
        there = ", ".join(
            f"{min(r.methods or '')} {r.path}" for r in ROUTES)
        return refusal(Refusal(
            f"{http.method} {http.url.path:.60}: "
            f"{error.detail.lower()}; there are {there}",
            status=error.status_code))
    return refusal(Refusal("the server failed; its log says how",
                           status=500))


# %% book/chapters/31_server.md, cell 50
def make_app(
    service: Service, more: Sequence[Route] = ()
) -> Starlette:
    """The application; its engine runs while it does."""
    @contextlib.asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        await run_in_threadpool(service.stop)

    app = Starlette(
        routes=[*ROUTES, *more], lifespan=running,
        exception_handlers={Refusal: refuse, HTTPException: refuse,
                            Exception: refuse},
    )
    app.state.service = service
    return app


# %% book/chapters/98_server_details.md, cell 15
def about(service: Service) -> dict[str, Any]:
    """The model, in OpenAI's words and in some of ours."""
    config, tokenizer = service.model.config, service.model.tokenizer
    files = {} if tokenizer is None else tokenizer.companions
    layers: list[int] = []
    with contextlib.suppress(ValueError):
        layers = expert_layers(config)
    spec: Any = config.layer(layers[0]).feed_forward if layers else None
    return {
        "id": service.name, "object": "model", "created": 0,
        "owned_by": "annotated-moe", "context": service.engine.context,
        "max_tokens": service.max_tokens,
        "chat": "default" in named_templates(files),
        "expert_layers": layers,
        "num_experts": spec.num_experts if layers else 0,
    }


async def models(http: web.Request) -> Response:
    """The one that there is."""
    found = about(http.app.state.service)
    name = http.path_params.get("name")
    if name is None:
        return as_json({"object": "list", "data": [found]})
    if name != found["id"]:
        raise Refusal(f"there is no model {name!r:.60} here", "model",
                      404, "model_not_found")
    return as_json(found)


ROUTES += [Route("/v1/models", models),
           Route("/v1/models/{name:path}", models)]
