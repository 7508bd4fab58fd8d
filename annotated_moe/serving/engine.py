# Generated from book/chapters/30b_engine.md by `make sync`; edit the chapter.
"""A loop that knows all its requests in advance is no server. Requests
come when they like, from other threads; one brings a prompt so long
that seven others stand still while it is read; one wants its text to
end before a word that the model spells in three tokens; one is gone,
and its row writes on for nobody; and one meets a damaged weight, and
must not take the others with it. By the end of this chapter you will
have an engine that holds against all of these: a queue with a bound,
prompts in chunks, a text a row, biases, constraints, log-probabilities
and experts for whoever asks, and still each request gets what it would
get alone.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

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
    place_logits,
    place_row,
    record,
    recording,
    unrecord,
)


# %% book/chapters/30b_engine.md, cell 12
@dataclass(eq=False)
class Job:
    """A request that has a row: what it has read and written."""

    handle: Handle
    row: int
    text: RowText
    seed: int
    read: int = 0                           # tokens of the prompt
    tokens: list[int] = field(default_factory=list)
    experts: np.ndarray | None = None       # [L, A], of the last step
    logits: Any = None                      # [1, V], of its prompt

    @property
    def request(self) -> Request:
        return self.handle.request


# %% book/chapters/30b_engine.md, cell 13
def step(engine: "Engine") -> list[Event]:
    """A unit of work: a token a row, and a chunk of prompts.

    Not from two threads at once. Its events are in the handles, too.
    """
    engine.events = []
    engine.end_cancelled()
    with engine.model.on_mesh():
        joined = engine.fill()
        jobs = engine.steer(engine.decode() + engine.join(joined))
        if jobs:
            engine.hand_out(jobs, engine.choose(jobs))
    return engine.events


# %% book/chapters/30b_engine.md, cell 14
def decode(engine: "Engine") -> list[Job]:
    """One more token into each row that writes; whose they are."""
    jobs = [j for j in engine.jobs if j is not None and j.tokens]
    if not jobs:
        return []
    tokens = np.zeros(engine.slots, np.int32)
    active = np.zeros(engine.slots, bool)
    for job in jobs:
        tokens[job.row], active[job.row] = job.tokens[-1], True
        engine.held[job.row].append(job.tokens[-1])
    engine.counts.steps += 1
    engine.counts.row_steps += len(jobs)
    run, c = engine.model.decode_step, engine.model.config
    if not any(job.request.experts for job in jobs):
        engine.logits, engine.cache = run(tokens, engine.cache, active)
        return jobs
    kept = record(engine.cache, c, engine.active_experts)
    with recording():
        engine.logits, kept = run(tokens, kept, active)
    engine.cache, experts = unrecord(kept, c)
    for job in jobs:
        job.experts = experts[:, job.row]
    return jobs


# %% book/chapters/30b_engine.md, cell 15
def fill(engine: "Engine") -> list[Job]:
    """Read prompts, up to the bound; who has now read all of one."""
    joined, left = list[Job](), engine.prefill_chunk
    while (job := engine.filling or engine.admit()) is not None:
        prompt, most = job.handle.prompt, engine.prefill_chunk
        part = prompt[job.read : job.read + most]
        width = bucket(len(part), most)
        if width > left:
            break
        left -= width
        engine.counts.chunks += 1
        engine.counts.chunk_tokens += width
        last = job.read + len(part) == len(prompt)
        job.logits = engine.read_chunk(job, part, width, last)
        job.read += len(part)
        if last:
            engine.cache = place_row(
                engine.cache, np.int32(job.row), engine.side)
            engine.filling = None
            joined.append(job)
    return joined


# %% book/chapters/30b_engine.md, cell 16
def read_chunk(
    engine: "Engine", job: Job, part: list[int], width: int, last: bool
) -> Any:
    """The side row reads a part of a prompt: logits [1, V]."""
    run, c = engine.model.prefill, engine.model.config
    tokens = pad_rows([part], width, c.pad_id)
    count = np.array([len(part)], np.int32)
    if not (last and job.request.experts):
        logits, engine.side = run(tokens, count, engine.side)
        return logits
    kept = record(engine.side, c, engine.active_experts)
    with recording():
        logits, kept = run(tokens, count, kept)
    engine.side, experts = unrecord(kept, c)
    job.experts = experts[:, 0]
    return logits


# %% book/chapters/30b_engine.md, cell 17
def join(engine: "Engine", jobs: list[Job]) -> list[Job]:
    """Put the logits of prompts among those of the batch."""
    for job in jobs:
        engine.logits = place_logits(
            engine.logits, np.int32(job.row), job.logits)
        job.logits = None
    return jobs


# %% book/chapters/30b_engine.md, cell 18
LEAST_PREFIX = 16                           # tokens worth a copy


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two lists begin with alike."""
    most = min(len(a), len(b))
    return next((i for i in range(most) if a[i] != b[i]), most)


# %% book/chapters/30b_engine.md, cell 19
def find_prefix(
    engine: "Engine", prompt: list[int]
) -> tuple[int, int]:
    """The row that holds most of a prompt's beginning; how much."""
    if not engine.keep:
        return 0, 0
    # The last token is read again: its logits are needed.
    alike = [common_prefix(prompt[:-1], ids) for ids in engine.held]
    source = int(np.argmax(alike))
    most = alike[source]
    return source, most if most >= LEAST_PREFIX else 0


# %% book/chapters/30b_engine.md, cell 20
def take_row(engine: "Engine", source: int, reused: int) -> int:
    """A free row; `source`, of which `reused` tokens are, last."""
    free = engine.free
    if reused and source in free:
        free.remove(source)
        if reused == len(engine.held[source]):
            return source                   # a conversation goes on
        free.append(source)
    return free.popleft()


# %% book/chapters/30b_engine.md, cell 21
def admit(engine: "Engine") -> Job | None:
    """Give the request that waits longest a row, if one is free."""
    with engine.changed:
        if not (engine.waiting and engine.free):
            return None
        handle = engine.waiting.popleft()
    request, prompt = handle.request, handle.prompt
    source, reused = engine.find_prefix(prompt)
    row = engine.take_row(source, reused)
    seed = request.seed
    if seed is None:
        seed = int(engine.random.integers(2**32))
    job = Job(
        handle, row, RowText(engine.model.tokenizer, request.stop),
        seed, reused,
    )
    engine.jobs[row] = engine.filling = job
    handle.times["started"] = time.perf_counter()
    engine.side = engine.new_cache(1) if not reused else copy_row(
        engine.cache, np.int32(source), np.int32(reused))
    engine.held[row] = []
    engine.counts.prompt_tokens += len(prompt)
    engine.counts.prefix_hits += reused > 0
    engine.counts.prefix_tokens += reused
    return job


# %% book/chapters/30b_engine.md, cell 22
def allowed_ids(constraint: Any, vocab_size: int) -> np.ndarray:
    """bool [V]: the ids that may come next; ValueError if none may."""
    mask = np.asarray(constraint.mask(), bool)
    if mask.shape != (vocab_size,) or not mask.any():
        raise ValueError(
            f"mask() gave {mask.shape} with {mask.sum()} ids allowed: "
            f"it must be bool [{vocab_size}] and allow one"
        )
    return mask


# %% book/chapters/30b_engine.md, cell 23
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


# %% book/chapters/30b_engine.md, cell 24
def settings_of(jobs: list[Job], rows: int) -> tuple[Any, Sampling]:
    """Steps and settings of all rows; those without a job: greedy."""
    steps = np.zeros(rows, np.int32)
    settings = Sampling(
        np.zeros(rows, np.uint32), np.zeros(rows, np.float32),
        np.zeros(rows, np.int32), np.ones(rows, np.float32),
    )
    for job in jobs:
        request, row = job.request, job.row
        steps[row], settings.seed[row] = len(job.tokens), job.seed
        settings.temperature[row] = request.temperature
        settings.top_k[row] = request.top_k or 0
        settings.top_p[row] = request.top_p
    return steps, settings


# %% book/chapters/30b_engine.md, cell 25
def choose_tokens(engine: "Engine", jobs: list[Job]) -> Choice:
    """The next token of each job's row, on the host."""
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
    found: Choice = jax.device_get(choice)
    return found


# %% book/chapters/30b_engine.md, cell 26
BROKEN = (
    "logits are NaN or infinite; are the weights? "
    "`annotated_moe.verify` holds them to their checksums"
)


def hand_out(
    engine: "Engine", jobs: list[Job], choice: Choice
) -> None:
    """Each row's token: to its job, and to who asked for it."""
    for job in jobs:
        token = int(choice.tokens[job.row])
        if not job.tokens:
            engine.held[job.row] = list(job.handle.prompt)
        if token == NO_TOKEN:
            engine.held[job.row] = []
            engine.end(job, "error", BROKEN)
        elif token in job.handle.stop_ids:
            engine.end(job, "stop")
        else:
            engine.give(job, token, choice)


# %% book/chapters/30b_engine.md, cell 27
def give(
    engine: "Engine", job: Job, token: int, choice: Choice
) -> None:
    """A token that is seen, and the end if it brings that."""
    request, row, index = job.request, job.row, len(job.tokens)
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
        job.experts if request.experts else None, reason,
    )
    return engine.finish(job, event) if reason else engine.tell(event)


# %% book/chapters/30b_engine.md, cell 28
def ranks(choice: Choice, row: int, count: int | None) -> Any:
    """A token's log-probability, and those of the likeliest."""
    if count is None:
        return None, ()
    pairs = zip(choice.top_ids[row].tolist(),
                choice.top_logprobs[row].tolist())
    return float(choice.logprobs[row]), tuple(pairs)[:count]


# %% book/chapters/30b_engine.md, cell 29
def end(
    engine: "Engine", job: Job, reason: str, error: str | None = None
) -> None:
    """The end of a job that no token brings."""
    engine.finish(job, Event(
        job.handle, len(job.tokens), text=job.text.flush(),
        finish_reason=reason, error=error,
    ))


# %% book/chapters/30b_engine.md, cell 30
def finish(engine: "Engine", job: Job, event: Event) -> None:
    """Free a job's row, and tell."""
    if engine.filling is job:
        engine.filling = None
    engine.jobs[job.row] = None
    engine.free.append(job.row)
    if engine.shift is not None:
        engine.shift[job.row] = 0
    engine.tell(event)


# %% book/chapters/30b_engine.md, cell 31
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


# %% book/chapters/30b_engine.md, cell 32
def end_cancelled(engine: "Engine") -> None:
    """End what was cancelled, in rows and in the queue."""
    for job in engine.jobs:
        if job is not None and job.handle.cancelled:
            engine.end(job, "cancelled")
    with engine.changed:
        gone = [h for h in engine.waiting if h.cancelled]
        for handle in gone:
            engine.waiting.remove(handle)
    for handle in gone:
        engine.tell(Event(handle, 0, finish_reason="cancelled"))


# %% book/chapters/30b_engine.md, cell 34
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


# %% book/chapters/30b_engine.md, cell 35
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


# %% book/chapters/30b_engine.md, cell 36
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


# %% book/chapters/30b_engine.md, cell 37
def fail(engine: "Engine", error: Exception) -> None:
    """End all that runs, with the error; begin again with no rows."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    for job in engine.jobs:
        if job is not None:
            engine.end(job, "error", f"a step failed: {line}")
    engine.start_over()


# %% book/chapters/30b_engine.md, cell 38
def close(engine: "Engine") -> None:
    """Take no more requests, and cancel those that are there."""
    with engine.changed:
        engine.ended = True
        handles = [*engine.waiting]
    for handle in handles + [j.handle for j in engine.jobs if j]:
        handle.cancel()
    engine.events = []
    engine.end_cancelled()


# %% book/chapters/30b_engine.md, cell 39
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


# %% book/chapters/30b_engine.md, cell 40
class Engine:
    """Many requests through one batch, whose rows come and go.

    `slots`: rows that decode together. `context`: tokens a row may
    hold, by default the model's. `prefill_chunk`: prompt tokens read
    between two steps of the others, at most. `max_waiting`: requests
    that may wait for a row. `keep`: prompts may begin with what rows
    have read before. `seed`: of seeds that requests leave open.
    ValueError for numbers that make no sense.
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
        self.start_over()
        self.keep = keep and can_copy(self.cache)

    def start_over(self) -> None:
        """Empty rows."""
        n = self.slots
        self.jobs: list[Job | None] = [None] * n
        self.held: list[list[int]] = [[] for _ in range(n)]
        self.free = deque(range(n))             # the longest free first
        self.filling: Job | None = None         # whose prompt is read
        self.shift: np.ndarray | None = None    # of logits, [B, V]
        self.cache = self.new_cache(n)
        self.side: Any = None                   # where a prompt is read
        self.logits = jnp.zeros((n, self.model.config.vocab_size))

    def new_cache(self, rows: int) -> Cache:
        with self.model.on_mesh():
            return init_cache(self.model.config, rows, self.context)

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
        return bool(self.waiting) or any(self.jobs)

    @property
    def stats(self) -> Stats:
        """The counts, as they are now."""
        with self.changed:
            return replace(
                self.counts, ended=dict(self.counts.ended),
                waiting=len(self.waiting),
                running=sum(job is not None for job in self.jobs),
            )

    submit, step, run, close = submit, step, run, close
    fit, fail, end_cancelled = fit, fail, end_cancelled
    decode, fill, read_chunk, join = decode, fill, read_chunk, join
    find_prefix, take_row, admit = find_prefix, take_row, admit
    steer, choose, hand_out = steer, choose_tokens, hand_out
    give, end, finish, tell = give, end, finish, tell
