# Generated from book/chapters/30b_engine.md by `make sync`; edit the chapter.
"""A loop that knows all its requests in advance is no server. Requests
come when they like, from other threads. A long prompt makes seven
others wait while it is read. A text shall end before a word that the
model spells in three tokens. A client is gone, and its row writes on
for nobody. One request meets a damaged weight, and must not take the
others with it. And the device waits for Python after each token. By the
end of this chapter you will have an engine that holds against all of
these: a queue with a bound, prompts read together or in chunks, a step
begun before the last is read, and biases, constraints,
log-probabilities and experts for whoever asks; and still each request
gets what it would get alone.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from annotated_moe.generate import (
    Model,
    announce,
    bucket,
    pad_rows,
    stop_set,
)
from annotated_moe.lens import expert_layers
from annotated_moe.model import Cache, init_cache
from annotated_moe.sampling import NO_TOKEN, Sampling
from annotated_moe.serving.requests import (
    Event,
    Handle,
    QueueFull,
    Request,
    RowText,
)
from annotated_moe.serving.rows import (
    Choice,
    can_copy,
    choose_rows,
    copy_row,
    fewer_slots,
    in_layers,
    place_logits,
    place_row,
    record,
    recording,
    unrecord,
)
from annotated_moe.steps import slots_for, with_slots


# %% book/chapters/30b_engine.md, cell 11
@dataclass(eq=False)
class Job:
    """A request that is read, and then written."""

    handle: Handle
    text: RowText
    seed: int
    source: int = 0                         # the row it begins like,
    reused: int = 0                         # in so many tokens
    read: int = 0                           # tokens of the prompt
    reading: Any = None                     # in which they are read,
    at: int = 0                             # and in which row of it
    row: int = -1                           # of the batch
    sent: int = 0                           # tokens that were chosen
    tokens: list[int] = field(default_factory=list)     # and seen
    held: list[int] = field(default_factory=list)       # by its row
    ended: bool = False

    @property
    def request(self) -> Request:
        return self.handle.request


# %% book/chapters/30b_engine.md, cell 12
class Flight(NamedTuple):
    """Tokens that were chosen and not yet read."""

    jobs: list[Job]
    choice: Choice                          # on the device
    experts: list[Any] | None               # of each place


# %% book/chapters/30b_engine.md, cell 13
def step(engine: "Engine") -> list[Event]:
    """A unit of work: a token a row, and a chunk of prompts.

    Not from two threads at once. The events are of the tokens that the
    step before has chosen; they are in the handles, too.
    """
    engine.events = []
    engine.end_cancelled()
    with engine.model.on_mesh():
        jobs = engine.decode()
        engine.hand_out()
        jobs = [job for job in jobs if not job.ended] + engine.fill()
        if jobs := engine.steer(jobs):
            engine.choose(jobs)
    return engine.events


# %% book/chapters/30b_engine.md, cell 14
def decode(engine: "Engine") -> list[Job]:
    """One more token into each row that writes; whose they are."""
    engine.heard = None
    jobs = [j for j in engine.jobs
            if j is not None and j.sent < j.request.max_new_tokens]
    if not jobs or engine.flight is None:
        return []
    engine.fit_room(max(len(j.handle.prompt) + j.sent for j in jobs))
    active = np.zeros(engine.slots, bool)
    active[[job.row for job in jobs]] = True
    engine.counts.steps += 1
    engine.counts.row_steps += len(jobs)
    run, tokens = engine.model.decode_step, engine.flight.choice.tokens
    if not any(job.request.experts for job in jobs):
        engine.logits, engine.cache = run(tokens, engine.cache, active)
        return jobs
    c = engine.model.config
    kept = record(engine.cache, c, engine.active_experts)
    with recording():
        engine.logits, kept = run(tokens, kept, active)
    engine.cache, engine.heard = unrecord(kept)
    return jobs


# %% book/chapters/30b_engine.md, cell 15
def grow(engine: "Engine", needed: int) -> None:
    """Have slots for `needed` tokens a row."""
    want = slots_for(needed, engine.context)
    if want > engine.room:
        model, engine.room = engine.model, want
        engine.cache = with_slots(
            engine.cache, model.config, want, model.kv_cache)


# %% book/chapters/30b_engine.md, cell 16
PATIENCE = 64                               # steps


# %% book/chapters/30b_engine.md, cell 17
def fit_room(engine: "Engine", needed: int) -> None:
    """Grow; or cut, if fewer were enough for PATIENCE steps."""
    want = slots_for(needed, engine.context)
    engine.spare = engine.spare + 1 if want < engine.room else 0
    if engine.spare > PATIENCE and can_copy(engine.cache):
        engine.cache = fewer_slots(engine.cache, want)
        engine.room = want
        for ids in engine.held:
            del ids[want:]
    engine.grow(needed)


# %% book/chapters/30b_engine.md, cell 18
@dataclass(eq=False)
class Reading:
    """Prompts that are read beside the batch, a row each."""

    jobs: list[Job]
    side: Any                               # their cache
    rows: int                               # that it has,
    slots: int                              # of so many slots
    logits: Any = None                      # [rows, V], of their ends
    experts: Any = None                     # of each place

    def chunk(self, most: int, pad: int) -> tuple[Any, Any]:
        """What is read next, int32 [rows, T], and the lengths."""
        parts = [job.handle.prompt[job.read : job.read + most]
                 for job in self.jobs]
        parts += [[]] * (self.rows - len(parts))
        lengths = np.array([*map(len, parts)], np.int32)
        width = bucket(int(lengths.max()), most)
        return pad_rows(parts, width, pad), lengths


# %% book/chapters/30b_engine.md, cell 19
def fill(engine: "Engine") -> list[Job]:
    """Read prompts, up to the bound; who now has a row."""
    joined, left = engine.seat(), engine.prefill_chunk
    pad = engine.model.config.pad_id
    while (reading := engine.reading or engine.admit()) is not None:
        tokens, lengths = reading.chunk(engine.prefill_chunk, pad)
        if tokens.size > left:
            break
        left -= tokens.size
        engine.counts.chunks += 1
        engine.counts.chunk_tokens += tokens.size
        engine.read_chunk(reading, tokens, lengths)
        joined += engine.seat()
    return joined


# %% book/chapters/30b_engine.md, cell 20
def read_chunk(
    engine: "Engine", reading: Reading, tokens: Any, lengths: Any
) -> None:
    """The side rows read these; whose prompt has ended is ready."""
    run, c = engine.model.prefill, engine.model.config
    jobs = reading.jobs
    for job, length in zip(jobs, lengths.tolist()):
        job.read += length
    done = all(job.read == len(job.handle.prompt) for job in jobs)
    if not (done and any(job.request.experts for job in jobs)):
        reading.logits, reading.side = run(
            tokens, lengths, reading.side)
    else:
        kept = record(reading.side, c, engine.active_experts)
        with recording():
            reading.logits, kept = run(tokens, lengths, kept)
        reading.side, reading.experts = unrecord(kept)
    if done:
        engine.ready.extend(job for job in jobs if not job.ended)
        engine.reading = None


def seat(engine: "Engine") -> list[Job]:
    """Rows for those who are read, while some are free; whose."""
    joined = list[Job]()
    while engine.ready and engine.free:
        job = engine.ready.popleft()
        job.row = row = engine.take_row(job.source, job.reused)
        engine.jobs[row], engine.held[row] = job, []
        side, at = job.reading, np.int32(job.at)
        engine.grow(side.slots)
        engine.cache = place_row(
            engine.cache, np.int32(row), side.side, at)
        engine.logits = place_logits(
            engine.logits, np.int32(row), side.logits, at)
        joined.append(job)
    return joined


# %% book/chapters/30b_engine.md, cell 21
def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two lists begin with alike."""
    most = min(len(a), len(b))
    return next((i for i in range(most) if a[i] != b[i]), most)


# %% book/chapters/30b_engine.md, cell 22
LEAST_PREFIX = 16                           # tokens worth a copy


# %% book/chapters/30b_engine.md, cell 23
def find_prefix(
    engine: "Engine", prompt: list[int]
) -> tuple[int, int]:
    """The row that holds most of a prompt's beginning; how much."""
    if not (engine.keep and can_copy(engine.cache)):
        return 0, 0                         # a ring forgets beginnings
    alike = [common_prefix(prompt[:-1], ids) for ids in engine.held]
    source = int(np.argmax(alike))
    most = alike[source]
    return source, most if most >= LEAST_PREFIX else 0


# %% book/chapters/30b_engine.md, cell 24
def take_row(engine: "Engine", source: int, reused: int) -> int:
    """A free row; `source`, of which `reused` tokens are, last."""
    free = engine.free
    if reused and source in free:
        free.remove(source)
        if reused == len(engine.held[source]):
            return source                   # a conversation goes on
        free.append(source)
    return free.popleft()


# %% book/chapters/30b_engine.md, cell 25
def together(engine: "Engine", handles: list[Handle]) -> int:
    """How many of these are read at once, from the first on."""
    most, width = engine.prefill_chunk, 0
    for n, handle in enumerate(handles):
        prompt = handle.prompt
        width = max(width, bucket(len(prompt), most))
        alone = len(prompt) > most or engine.find_prefix(prompt)[1] > 0
        if alone or (n + 1) * width > most:
            return max(n, 1)
    return len(handles)


# %% book/chapters/30b_engine.md, cell 26
def begin(engine: "Engine", handle: Handle) -> Job:
    """A request is a job from now on."""
    request = handle.request
    source, reused = engine.find_prefix(handle.prompt)
    seed = request.seed
    if seed is None:
        seed = int(engine.random.integers(2**32))
    handle.times["started"] = time.perf_counter()
    engine.counts.prompt_tokens += len(handle.prompt)
    engine.counts.prefix_hits += reused > 0
    engine.counts.prefix_tokens += reused
    text = RowText(engine.model.tokenizer, request.stop)
    return Job(handle, text, seed, source, reused, reused)


# %% book/chapters/30b_engine.md, cell 27
def admit(engine: "Engine") -> Reading | None:
    """Begin with those who wait longest, if one can have a row."""
    if engine.ready or not engine.free:
        return None
    with engine.changed:
        handles = [*islice(engine.waiting, engine.slots)]
        handles = handles[: engine.together(handles)]
        for _ in handles:
            engine.waiting.popleft()
    if not handles:
        return None
    jobs, most = [*map(engine.begin, handles)], engine.prefill_chunk
    longest = max(len(job.handle.prompt) for job in jobs)
    rows, slots, first = 1, bucket(longest, most), jobs[0]
    if first.reused or longest > most:
        engine.grow(longest)
        slots = engine.room
    elif len(jobs) > 1:
        rows = min(engine.slots, most // slots)
    side = engine.new_cache(rows, slots) if not first.reused else (
        copy_row(engine.cache, np.int32(first.source),
                 np.int32(first.reused)))
    engine.reading = Reading(jobs, side, rows, slots)
    for at, job in enumerate(jobs):
        job.reading, job.at = engine.reading, at
    return engine.reading


# %% book/chapters/30b_engine.md, cell 28
def allowed_ids(constraint: Any, vocab_size: int) -> np.ndarray:
    """bool [V]: the ids that may come next; ValueError if none may."""
    mask = np.asarray(constraint.mask(), bool)
    if mask.shape != (vocab_size,) or not mask.any():
        raise ValueError(
            f"mask() gave {mask.shape} with {mask.sum()} ids allowed: "
            f"it must be bool [{vocab_size}] and allow one"
        )
    return mask


# %% book/chapters/30b_engine.md, cell 29
def steer(engine: "Engine", jobs: list[Job]) -> list[Job]:
    """Write what shifts the logits of jobs; which of them go on."""
    going = []
    for job in jobs:
        bias, rule = job.request.logit_bias, job.request.constraint
        try:
            if bias or rule is not None:
                own = engine.shift_of(job.row)
                own[:] = 0
                own[list(bias)] = list(bias.values())
            if rule is not None:
                own[~allowed_ids(rule, len(own))] = -np.inf
            going.append(job)
        except Exception as error:          # in somebody's constraint
            engine.end(job, "error", f"the constraint: {error}")
    return going


# %% book/chapters/30b_engine.md, cell 30
def settings_of(jobs: list[Job], rows: int) -> tuple[Any, Sampling]:
    """Steps and settings of all rows; those without a job: greedy."""
    steps = np.zeros(rows, np.int32)
    settings = Sampling(
        np.zeros(rows, np.uint32), np.zeros(rows, np.float32),
        np.zeros(rows, np.int32), np.ones(rows, np.float32),
    )
    for job in jobs:
        request, row = job.request, job.row
        steps[row], settings.seed[row] = job.sent, job.seed
        settings.temperature[row] = request.temperature
        settings.top_k[row] = request.top_k or 0
        settings.top_p[row] = request.top_p
    return steps, settings


def choose_tokens(engine: "Engine", jobs: list[Job]) -> None:
    """Have the next token of each job's row chosen."""
    steps, settings = settings_of(jobs, engine.slots)
    warm = settings.temperature > 0
    cuts = (settings.top_k > 0) | (settings.top_p < 1)
    how = "cut" if (warm & cuts).any() else "drawn"
    asked = [job.request for job in jobs]
    shifted = any(
        r.logit_bias or r.constraint is not None for r in asked)
    choice = choose_rows(
        engine.logits, steps, settings,
        engine.shift if shifted else None,
        how=how if warm.any() else "greedy",
        ranked=any(r.logprobs is not None for r in asked),
    )
    engine.flight = Flight(jobs, choice, engine.heard)
    for job in jobs:
        job.sent += 1


# %% book/chapters/30b_engine.md, cell 31
BROKEN = (
    "logits are NaN or infinite; are the weights? "
    "`annotated_moe.verify` holds them to their checksums"
)


# %% book/chapters/30b_engine.md, cell 32
def hand_out(engine: "Engine") -> None:
    """Wait for the last choice: to each job its token."""
    flight, engine.flight = engine.flight, None
    if flight is None:
        return
    choice: Choice = jax.device_get(flight.choice)
    for job in flight.jobs:
        token = int(choice.tokens[job.row])
        if job.ended:                       # cancelled meanwhile
            continue
        if job.tokens:                      # its last is read by now
            job.held.append(job.tokens[-1])
        else:
            job.held = engine.held[job.row] = [*job.handle.prompt]
        if token == NO_TOKEN:
            engine.held[job.row] = []           # nobody begins with it
            engine.end(job, "error", BROKEN)
        elif token in job.handle.stop_ids:
            engine.end(job, "stop")
        else:
            engine.give(job, token, choice, flight)


# %% book/chapters/30b_engine.md, cell 33
def give(
    engine: "Engine", job: Job, token: int, choice: Choice,
    flight: Flight,
) -> None:
    """A token that is seen, and the end if it brings that."""
    request, row, index = job.request, job.row, len(job.tokens)
    experts = engine.experts_of(job, flight)
    job.reading = None
    job.tokens.append(token)
    engine.counts.new_tokens += 1
    text = job.text.push(token)
    full = len(job.tokens) == request.max_new_tokens
    reason = "length" if full else None
    reason = "stop" if job.text.stopped else reason
    try:
        if (rule := request.constraint) is not None:
            rule.accept(token)
            reason = "stop" if rule.done else reason
    except Exception as error:
        return engine.end(job, "error", f"the constraint: {error}")
    text += job.text.flush() if reason else ""
    logprob, top = ranks(choice, row, request.logprobs)
    event = Event(
        job.handle, index, token, text, logprob, top,
        experts, reason,
    )
    return engine.finish(job, event) if reason else engine.tell(event)


# %% book/chapters/30b_engine.md, cell 34
def experts_of(
    engine: "Engine", job: Job, flight: Flight
) -> np.ndarray | None:
    """Of the step, or the prompt, that made a token; if asked."""
    if not job.request.experts:
        return None
    heard, at = flight.experts, job.row
    if not job.tokens:
        heard, at = job.reading.experts, job.at
    assert heard is not None                # because one has asked
    return in_layers(heard, engine.model.config)[:, at]


# %% book/chapters/30b_engine.md, cell 35
def ranks(choice: Choice, row: int, count: int | None) -> Any:
    """A token's log-probability, and those of the likeliest."""
    if count is None:
        return None, ()
    pairs = zip(choice.top_ids[row].tolist(),
                choice.top_logprobs[row].tolist())
    return float(choice.logprobs[row]), tuple(pairs)[:count]


# %% book/chapters/30b_engine.md, cell 36
def end(
    engine: "Engine", job: Job, reason: str, error: str | None = None
) -> None:
    """The end of a job that no token brings."""
    engine.finish(job, Event(
        job.handle, len(job.tokens), text=job.text.flush(),
        finish_reason=reason, error=error,
    ))


# %% book/chapters/30b_engine.md, cell 37
def finish(engine: "Engine", job: Job, event: Event) -> None:
    """Free a job's row, and tell."""
    job.ended = True
    if job.row >= 0:
        engine.jobs[job.row] = None
        engine.free.append(job.row)
        if engine.shift is not None:
            engine.shift[job.row] = 0
    engine.tell(event)


# %% book/chapters/30b_engine.md, cell 38
def tell(engine: "Engine", event: Event) -> None:
    """Give an event to whoever waits for it."""
    if reason := event.finish_reason:
        ended = engine.counts.ended
        ended[reason] = ended.get(reason, 0) + 1
    engine.events.append(event)
    try:
        event.handle.put(event)
    except Exception:                       # its listener has gone
        event.handle.cancel()


# %% book/chapters/30b_engine.md, cell 39
def end_cancelled(engine: "Engine") -> None:
    """End what was cancelled, in rows and in the queue."""
    for job in engine.all_jobs():
        if job.handle.cancelled:
            engine.end(job, "cancelled")
    engine.ready = deque(j for j in engine.ready if not j.ended)
    if engine.reading and all(j.ended for j in engine.reading.jobs):
        engine.reading = None
    with engine.changed:
        gone = [h for h in engine.waiting if h.cancelled]
        for handle in gone:
            engine.waiting.remove(handle)
    for handle in gone:
        engine.tell(Event(handle, 0, finish_reason="cancelled"))


# %% book/chapters/30b_engine.md, cell 41
def submit(
    engine: "Engine", request: Request,
    on_event: Callable[[Event], None] | None = None,
) -> Handle:
    """Take a request; its handle gives what comes of it.

    `on_event` is called with each event, in the engine's thread. From
    any thread. TypeError or ValueError for a request that cannot be
    run; QueueFull if too many wait, or the engine has ended.
    """
    stop_ids = stop_set(engine.model, request.stop_ids)
    handle = Handle(request, engine.fit(request), stop_ids, on_event)
    with engine.changed:
        if engine.ended:
            raise QueueFull("the engine has ended")
        if len(engine.waiting) >= engine.max_waiting:
            engine.counts.refused += 1
            raise QueueFull(
                f"{len(engine.waiting)} requests wait for "
                f"{engine.slots} rows: come back later"
            )
        engine.waiting.append(handle)
        engine.counts.submitted += 1
        engine.changed.notify()
    return handle


# %% book/chapters/30b_engine.md, cell 42
def fit(engine: "Engine", request: Request) -> list[int]:
    """The ids of a prompt that fits; the request is checked."""
    prompt, new = np.asarray(request.prompt).tolist(), 1
    if isinstance(request.max_new_tokens, int):
        new = request.max_new_tokens
    if request.truncate and isinstance(prompt, list):
        prompt = prompt[-max(engine.context - new + 1, 1) :]
    announce(
        None, "submit", request=request, prompt=prompt,
        context=engine.context, model=engine.model,
        config=engine.model.config,
    )
    return prompt


# %% book/chapters/30b_engine.md, cell 43
def run(engine: "Engine", stop: threading.Event) -> None:
    """Step while there is work, until `stop` is set.

    What still waits or runs then is cancelled. A step that fails ends
    the requests that had rows; the engine goes on without them.
    """
    try:
        while not stop.is_set():
            with engine.changed:
                if not engine.busy:
                    engine.changed.wait(0.05)
                    continue
            try:
                engine.step()
            except Exception as error:
                engine.fail(error)
    finally:
        engine.close()


def fail(engine: "Engine", error: Exception) -> None:
    """End all that runs, with the error; begin again with no rows."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    for job in engine.all_jobs():
        engine.end(job, "error", f"a step failed: {line}")
    engine.start_over()


# %% book/chapters/30b_engine.md, cell 44
def close(engine: "Engine") -> None:
    """Take no more requests, and cancel those that are there."""
    with engine.changed:
        engine.ended = True
        handles = [*engine.waiting]
    for handle in handles + [j.handle for j in engine.all_jobs()]:
        handle.cancel()
    engine.events = []
    engine.end_cancelled()


# %% book/chapters/30b_engine.md, cell 45
@dataclass
class Stats:
    """Counts since the engine began; `waiting`, `running`: now."""

    slots: int = 0
    waiting: int = 0
    running: int = 0
    submitted: int = 0
    refused: int = 0                        # by a full queue
    ended: dict[str, int] = field(default_factory=dict)  # by reason
    prompt_tokens: int = 0                  # of requests given a row
    prefix_hits: int = 0
    prefix_tokens: int = 0                  # of these, not read again
    new_tokens: int = 0
    steps: int = 0                          # that decoded
    row_steps: int = 0                      # rows of these
    chunks: int = 0                         # of prompts
    chunk_tokens: int = 0                   # of these, with padding


# %% book/chapters/30b_engine.md, cell 46
class Engine:
    """Many requests through one batch, whose rows come and go.

    `slots`: rows that decode together. `context`: tokens a row may
    hold, by default the model's. `prefill_chunk`: prompt tokens read
    between two steps of the others, at most. `max_waiting`: requests
    that may wait for a row. `keep`: prompts may begin with what rows
    have read before. `seed`: of seeds that requests leave open. The
    cache is of the model's kind, `kv_cache`. ValueError for numbers
    that make no sense, and for a cache in pages.
    """

    def __init__(
        self, model: Model, slots: int = 8, context: int | None = None,
        prefill_chunk: int = 256, max_waiting: int = 64,
        keep: bool = True, seed: int = 0,
    ) -> None:
        announce(
            model.mesh, "Engine", slots=slots, context=context,
            prefill_chunk=prefill_chunk, max_waiting=max_waiting,
            config=model.config, model=model,
        )
        self.model, self.slots = model, slots
        self.context = context or model.config.context
        self.prefill_chunk = min(prefill_chunk, self.context)
        self.max_waiting, self.ended = max_waiting, False
        self.random = np.random.default_rng(seed)
        self.changed = threading.Condition()
        self.waiting: deque[Handle] = deque()
        self.events: list[Event] = []           # of this step
        self.counts = Stats(slots=slots)
        self.keep = keep
        self.start_over()

    def start_over(self) -> None:
        """Empty rows."""
        n = self.slots
        self.jobs: list[Job | None] = [None] * n
        self.held: list[list[int]] = [[] for _ in range(n)]
        self.free = deque(range(n))             # the longest free first
        self.reading: Reading | None = None     # of prompts, now
        self.ready = deque[Job]()               # read, without a row
        self.flight: Flight | None = None       # chosen, not yet seen
        self.heard: list[Any] | None = None     # experts of this step
        self.shift: np.ndarray | None = None    # of logits, [B, V]
        self.room = slots_for(1, self.context)  # slots a row has now
        self.spare = 0                          # steps they were many
        self.cache = self.new_cache(n, self.room)
        self.logits = jnp.zeros((n, self.model.config.vocab_size))

    def new_cache(self, rows: int, slots: int) -> Cache:
        model = self.model
        with model.on_mesh():
            return init_cache(model.config, rows, slots, model.kv_cache)

    def all_jobs(self) -> list[Job]:
        """What is read, ready or written, and has not ended."""
        reading = self.reading
        now = [] if reading is None else reading.jobs
        jobs = [*filter(None, self.jobs), *self.ready, *now]
        return [job for job in jobs if not job.ended]

    def shift_of(self, row: int) -> np.ndarray:
        """What is added to a row's logits, to be written to."""
        if self.shift is None:
            self.shift = np.zeros(self.logits.shape, np.float32)
        own: np.ndarray = self.shift[row]
        return own

    @cached_property
    def active_experts(self) -> int:
        """A: how many experts a layer chooses for a token."""
        config = self.model.config
        spec: Any = config.layer(expert_layers(config)[0])
        return int(spec.feed_forward.top_k)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting or self.all_jobs())

    @property
    def stats(self) -> Stats:
        """The counts, as they are now."""
        with self.changed:
            return replace(
                self.counts, ended=dict(self.counts.ended),
                waiting=len(self.waiting) + sum(
                    job.row < 0 for job in self.all_jobs()),
                running=sum(job is not None for job in self.jobs),
            )

    submit, step, run, close = submit, step, run, close
    fit, fail, end_cancelled = fit, fail, end_cancelled
    decode, grow, fit_room, fill = decode, grow, fit_room, fill
    read_chunk, seat, take_row = read_chunk, seat, take_row
    find_prefix, together, begin = find_prefix, together, begin
    admit, steer, choose = admit, steer, choose_tokens
    hand_out, give, end = hand_out, give, end
    experts_of, finish, tell = experts_of, finish, tell
