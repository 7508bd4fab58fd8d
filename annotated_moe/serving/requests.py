# Generated from book/chapters/30b_engine.md by `make sync`; edit the chapter.
"""What is asked of an engine, and what it answers.
"""

import itertools
import threading
import time
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from annotated_moe.tokenizer import Tokenizer


# %% book/chapters/30b_engine.md, cell 5
class RowText:
    """A row's tokens as text, up to a stop string and without it."""

    def __init__(
        self, tokenizer: Tokenizer | None, stop: Sequence[str]
    ) -> None:
        self.stream = None if tokenizer is None else tokenizer.stream()
        self.stop, self.held, self.stopped = stop, "", False

    def push(self, token: int) -> str:
        """The text that is certain now."""
        if self.stream is None or self.stopped:
            return ""
        return self.sift(self.stream.push(token))

    def flush(self) -> str:
        """The rest."""
        if self.stream is None or self.stopped:
            return ""
        return self.sift(self.stream.flush()) + self.held

    def sift(self, new: str) -> str:
        text = self.held + new
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        begun = [n for s in self.stop for n in range(1, len(s))
                 if text.endswith(s[:n])]
        certain = len(text) - max(begun, default=0)
        self.held = text[certain:]
        return text[:certain]


# %% book/chapters/30b_engine.md, cell 8
@dataclass(frozen=True)
class Request:
    """What is asked: ids, and how to go on from them.

    Sampling is as in `generate_ids`; `seed` None: the engine draws
    one. `stop` are strings that end the text before them, `stop_ids`
    None: the configuration's. `logit_bias` is added to the logits of
    its ids; `logprobs`: of so many likeliest tokens, 0 to 8; `experts`:
    those of each token, too. `truncate`: a prompt that does not fit
    loses its beginning, instead of being refused. `constraint` says
    before each token which are allowed: `mask()` is bool [V],
    `accept(token)` is told, `done` ends the text.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = 0
    stop_ids: Iterable[int] | None = None
    stop: Sequence[str] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    experts: bool = False
    truncate: bool = False
    constraint: Any = None


# %% book/chapters/30b_engine.md, cell 9
@dataclass(frozen=True, eq=False)
class Event:
    """A token of a request, or its end, or both.

    `text` is what is certain by now; it may lag behind the tokens.
    `logprob` and `top_logprobs`, the likeliest first, are the model's
    own, before bias, temperature and cuts. `experts` int [L, A] are
    those of each layer in the step that made the token, which read the
    token before it; -1 in layers without. The last event has a
    `finish_reason`: "stop", "length", "cancelled" or "error", and then
    `error` says what was wrong.
    """

    handle: "Handle"
    index: int                              # of the token, from 0
    token: int | None = None
    text: str = ""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    experts: np.ndarray | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def request(self) -> Request:
        return self.handle.request


@dataclass(frozen=True, eq=False)
class Result:
    """All that came of a request."""

    tokens: list[int]
    text: str
    finish_reason: str
    error: str | None
    events: list[Event]


# %% book/chapters/30b_engine.md, cell 10
class Handle:
    """A request on its way; any thread may use it.

    Iterate over it for its events as they come. `prompt` are the ids
    that are read; `times` when it was "submitted", "started" in a row,
    "first" gave a token and "ended", by `time.perf_counter`.
    """

    def __init__(
        self, request: Request, prompt: list[int], stop_ids: set[int],
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.request, self.prompt = request, prompt
        self.stop_ids, self.on_event = stop_ids, on_event
        self.events: list[Event] = []
        self.times = {"submitted": time.perf_counter()}
        self.cancelled = False
        self.more = threading.Condition()

    def cancel(self) -> None:
        """Have it end within a step of the engine."""
        self.cancelled = True

    @property
    def done(self) -> bool:
        events = self.events
        return bool(events) and events[-1].finish_reason is not None

    def put(self, event: Event) -> None:
        """Called by the engine."""
        if event.token is not None:
            self.times.setdefault("first", time.perf_counter())
        if event.finish_reason is not None:
            self.times["ended"] = time.perf_counter()
        with self.more:
            self.events.append(event)
            self.more.notify_all()
        if self.on_event is not None:
            self.on_event(event)

    def event(self, index: int) -> Event:
        """Event `index`, as soon as it is there."""
        with self.more:
            self.more.wait_for(lambda: len(self.events) > index)
            return self.events[index]

    def __iter__(self) -> Iterator[Event]:
        for index in itertools.count():
            yield (event := self.event(index))
            if event.finish_reason is not None:
                return

    def result(self, timeout: float | None = None) -> Result:
        """All of it, once it has ended; TimeoutError after seconds."""
        with self.more:
            if not self.more.wait_for(lambda: self.done, timeout):
                raise TimeoutError(
                    f"no end after {timeout} s: does the engine run?")
        events = self.events
        tokens = [e.token for e in events if e.token is not None]
        text, last = "".join(e.text for e in events), events[-1]
        return Result(tokens, text, str(last.finish_reason), last.error,
                      events)


# %% book/chapters/30b_engine.md, cell 40
class QueueFull(RuntimeError):
    """As many requests wait as may; come back later."""
