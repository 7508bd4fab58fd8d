# Generated from book/chapters/30_serving.md by `make sync`; edit the chapter.
"""A batch is a bus.
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
from annotated_moe.model import init_cache
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
    empty_row,
    place_row,
    record,
    recording,
    unrecord,
)


# %% book/chapters/30_serving.md, cell 18
@dataclass(eq=False)
class Job:
    """A request that has a row: what it has read and written."""

    handle: Handle
    row: int
    text: RowText
    stop_ids: set[int]
    seed: int
    read: int = 0                           # tokens of the prompt
    tokens: list[int] = field(default_factory=list)
    experts: dict[int, Any] | None = None   # of the last step

    @property
    def request(self) -> Request:
        return self.handle.request


# %% book/chapters/30_serving.md, cell 19
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


# %% book/chapters/30_serving.md, cell 20
LEAST_PREFIX = 16                           # tokens worth a copy
BROKEN = (
    "logits are NaN or infinite; are the weights? "
    "`annotated_moe.verify` holds them to their checksums"
)


def allowed_ids(constraint: Any, vocab_size: int) -> np.ndarray:
    """bool [V]: the ids that may come next; ValueError if none may."""
    mask = np.asarray(constraint.mask(), bool)
    if mask.shape != (vocab_size,) or not mask.any():
        raise ValueError(
            f"mask() gave {mask.shape} with {mask.sum()} ids allowed: "
            f"it must be bool [{vocab_size}] and allow one"
        )
    return mask


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two lists begin with alike."""
    most = min(len(a), len(b))
    return next((i for i in range(most) if a[i] != b[i]), most)


# %% book/chapters/30_serving.md, cell 21
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
        self.max_waiting = max_waiting
        self.random = np.random.default_rng(seed)
        self.waiting: deque[Handle] = deque()
        self.changed = threading.Condition()
        self.counts = Stats(slots=slots)
        self.start_over()
        self.keep = keep and can_copy(self.cache)

    def start_over(self) -> None:
        """Empty rows."""
        c, n = self.model.config, self.slots
        self.jobs: list[Job | None] = [None] * n
        self.held: list[list[int]] = [[] for _ in range(n)]
        self.free = deque(range(n))             # the longest free first
        self.filling: Job | None = None
        self.shift = np.zeros((0, 0), np.float32)
        with self.model.on_mesh():
            self.cache = init_cache(c, n, self.context)
            self.side = init_cache(c, 1, self.context)
            self.logits = jnp.zeros((n, c.vocab_size), jnp.float32)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting) or any(self.jobs)

    @property
    def stats(self) -> Stats:
        """The counts, as they are now."""
        running = sum(job is not None for job in self.jobs)
        with self.changed:
            return replace(
                self.counts, ended=dict(self.counts.ended),
                waiting=len(self.waiting), running=running,
            )

    def submit(
        self, request: Request,
        on_event: Callable[[Event], None] | None = None,
    ) -> Handle:
        """Take a request; its handle gives what comes of it.

        `on_event` is called with each event, in the engine's thread.
        From any thread. TypeError or ValueError for a request that
        cannot be run; QueueFull if too many wait.
        """
        handle = Handle(request, self.fit(request), on_event)
        with self.changed:
            if len(self.waiting) >= self.max_waiting:
                self.counts.refused += 1
                raise QueueFull(
                    f"{len(self.waiting)} requests wait for "
                    f"{self.slots} rows: come back later"
                )
            self.waiting.append(handle)
            self.counts.submitted += 1
            self.changed.notify()
        return handle

    def fit(self, request: Request) -> list[int]:
        """The prompt's ids, of a request that was checked."""
        prompt = np.asarray(request.prompt).tolist()
        if request.truncate:
            most = self.context - request.max_new_tokens + 1
            prompt = prompt[-max(most, 1) :]
        announce(
            None, "submit", request=request, prompt=prompt,
            context=self.context, model=self.model,
            config=self.model.config,
        )
        return prompt

    def step(self) -> list[Event]:
        """A unit of work: a token a row, a chunk of prompts.

        Not from two threads at once. The events are also in the
        handles.
        """
        self.events: list[Event] = []
        self.end_cancelled()
        with self.model.on_mesh():
            rows = self.decode() + self.fill()
            rows = self.steer(rows)
            if rows:
                self.hand_out(rows, self.choose(rows))
        return self.events

    def end_cancelled(self) -> None:
        for job in self.jobs:
            if job is not None and job.handle.cancelled:
                self.end(job, "cancelled")
        with self.changed:
            gone = [h for h in self.waiting if h.cancelled]
            for handle in gone:
                self.waiting.remove(handle)
        for handle in gone:
            self.tell(Event(handle, 0, finish_reason="cancelled"))

    def decode(self) -> list[int]:
        """One more token into each row that has one; which rows."""
        jobs = [j for j in self.jobs if j is not None and j.tokens]
        if not jobs:
            return []
        tokens = np.zeros(self.slots, np.int32)
        active = np.zeros(self.slots, bool)
        for job in jobs:
            tokens[job.row], active[job.row] = job.tokens[-1], True
            self.held[job.row].append(job.tokens[-1])
        run, c = self.model.decode_step, self.model.config
        if not any(job.request.experts for job in jobs):
            self.logits, self.cache = run(tokens, self.cache, active)
        else:
            kept = record(self.cache, c, self.active_experts)
            with recording():
                self.logits, kept = run(tokens, kept, active)
            self.cache, experts = unrecord(kept, c)
            for job in jobs:
                job.experts = {
                    layer: e[job.row] for layer, e in experts.items()}
        self.counts.steps += 1
        self.counts.row_steps += len(jobs)
        return [job.row for job in jobs]

    def fill(self) -> list[int]:
        """Read prompts, up to a chunk; which rows have now read all."""
        joined, left = list[int](), self.prefill_chunk
        while (job := self.filling or self.admit()) is not None:
            prompt = job.handle.prompt
            part = prompt[job.read : job.read + self.prefill_chunk]
            width = bucket(len(part), self.prefill_chunk)
            if width > left:
                break
            left -= width
            last = job.read + len(part) == len(prompt)
            logits = self.prefill(part, width, job, last)
            job.read += len(part)
            self.counts.chunks += 1
            if last:
                self.cache, self.logits = place_row(
                    self.cache, self.logits, np.int32(job.row),
                    self.side, logits,
                )
                self.held[job.row] = list(prompt)
                self.filling = None
                joined.append(job.row)
        return joined

    def prefill(
        self, part: list[int], width: int, job: Job, last: bool
    ) -> Any:
        """The side row reads a part of a prompt: its last logits."""
        run, c = self.model.prefill, self.model.config
        tokens = pad_rows([part], width, c.pad_id)
        count = np.array([len(part)], np.int32)
        if not (last and job.request.experts):
            logits, self.side = run(tokens, count, self.side)
            return logits
        kept = record(self.side, c, self.active_experts)
        with recording():
            logits, kept = run(tokens, count, kept)
        self.side, experts = unrecord(kept, c)
        job.experts = {layer: e[0] for layer, e in experts.items()}
        return logits

    @cached_property
    def active_experts(self) -> int:
        """A: how many experts a layer chooses for a token."""
        config = self.model.config
        spec: Any = config.layer(expert_layers(config)[0])
        return int(spec.feed_forward.top_k)

    def admit(self) -> Job | None:
        """Give the request that waits longest a row, if one is free."""
        with self.changed:
            if not (self.waiting and self.free):
                return None
            handle = self.waiting.popleft()
        request, prompt = handle.request, handle.prompt
        handle.times["started"] = time.perf_counter()
        source, reused = self.find_prefix(prompt)
        row = self.free[0]
        if source in self.free and reused == len(self.held[source]):
            row = source                    # it is continued
        self.free.remove(row)
        if reused:
            self.side = copy_row(
                self.cache, np.int32(source), np.int32(reused))
            self.counts.prefix_hits += 1
            self.counts.prefix_tokens += reused
        else:
            self.side = empty_row(self.side)
        self.held[row] = []
        self.counts.prompt_tokens += len(prompt)
        seed = request.seed
        if seed is None:
            seed = int(self.random.integers(2**32))
        text = RowText(self.model.tokenizer, request.stop)
        stop = stop_set(self.model, request.stop_ids)
        job = Job(handle, row, text, stop, seed, reused)
        self.jobs[row] = self.filling = job
        return job

    def find_prefix(self, prompt: list[int]) -> tuple[int, int]:
        """The row that holds most of a prompt's beginning; how much."""
        if not self.keep:
            return 0, 0
        # The last token is read again: its logits are needed.
        alike = [common_prefix(prompt[:-1], ids) for ids in self.held]
        source = int(np.argmax(alike))
        most = alike[source]
        return source, most if most >= LEAST_PREFIX else 0

    def steer(self, rows: list[int]) -> list[int]:
        """Write what shifts the logits of rows; which rows go on."""
        going = []
        for row in rows:
            job = self.jobs[row]
            assert job is not None
            bias, rule = job.request.logit_bias, job.request.constraint
            if not bias and rule is None:
                going.append(row)
                continue
            if not self.shift.size:
                self.shift = np.zeros(self.logits.shape, np.float32)
            own = self.shift[row]
            own[:] = 0
            own[list(bias)] = list(bias.values())
            try:
                if rule is not None:
                    own[~allowed_ids(rule, len(own))] = -np.inf
            except Exception as error:
                self.end(job, "error", f"the constraint: {error}")
                continue
            going.append(row)
        return going

    def choose(self, rows: list[int]) -> Choice:
        """The next token of each of these rows, on the host."""
        steps = np.zeros(self.slots, np.int32)
        settings = Sampling(
            np.zeros(self.slots, np.uint32),
            np.zeros(self.slots, np.float32),
            np.zeros(self.slots, np.int32),
            np.ones(self.slots, np.float32),
        )
        requests, shifted = [], False
        for row in rows:
            job = self.jobs[row]
            assert job is not None
            request = job.request
            requests.append(request)
            steps[row] = len(job.tokens)
            settings.seed[row] = job.seed
            settings.temperature[row] = request.temperature
            settings.top_k[row] = request.top_k or 0
            settings.top_p[row] = request.top_p
            shifted |= bool(request.logit_bias)
            shifted |= request.constraint is not None
        choice = choose_rows(
            self.logits, steps, settings,
            self.shift if shifted else None,
            drawn=bool(settings.temperature.any()),
            ranked=any(r.logprobs is not None for r in requests),
        )
        return jax.device_get(choice)

    def hand_out(self, rows: list[int], choice: Choice) -> None:
        """Each row's token: to its job, and to who asked for it."""
        for row in rows:
            job = self.jobs[row]
            assert job is not None
            token = int(choice.tokens[row])
            if token == NO_TOKEN:
                self.end(job, "error", BROKEN)
            elif token in job.stop_ids:
                self.end(job, "stop")
            else:
                self.give(job, token, choice)

    def give(self, job: Job, token: int, choice: Choice) -> None:
        """A token that is seen, and the end if it brings that."""
        request, row, index = job.request, job.row, len(job.tokens)
        job.tokens.append(token)
        self.counts.new_tokens += 1
        text, reason = job.text.push(token), None
        try:
            if rule := request.constraint:
                rule.accept(token)
                reason = "stop" if rule.done else None
        except Exception as error:
            self.end(job, "error", f"the constraint: {error}")
            return
        if job.text.stopped:
            reason = "stop"
        elif len(job.tokens) == request.max_new_tokens:
            reason = reason or "length"
        if reason:
            text += job.text.flush()
        logprob, top = None, ()
        if request.logprobs is not None:
            logprob = float(choice.logprobs[row])
            pairs = zip(choice.top_ids[row].tolist(),
                        choice.top_logprobs[row].tolist())
            top = tuple(pairs)[: request.logprobs]
        event = Event(
            job.handle, index, token, text, logprob, top,
            self.experts_of(job), reason,
        )
        self.finish(job, event) if reason else self.tell(event)

    def experts_of(self, job: Job) -> np.ndarray | None:
        """int [L, A]: those of the step that was just made."""
        if not job.request.experts or job.experts is None:
            return None
        layers = self.model.config.num_layers
        found = np.full((layers, self.active_experts), -1, np.int32)
        for layer, chosen in job.experts.items():
            found[layer] = chosen
        return found

    def end(
        self, job: Job, reason: str, error: str | None = None
    ) -> None:
        """The end of a job that no token brings."""
        text, index = job.text.flush(), len(job.tokens)
        self.finish(job, Event(
            job.handle, index, text=text, finish_reason=reason,
            error=error,
        ))

    def finish(self, job: Job, event: Event) -> None:
        """Free a job's row, and tell."""
        if self.filling is job:
            self.filling = None
        self.jobs[job.row] = None
        self.free.append(job.row)
        self.tell(event)

    def tell(self, event: Event) -> None:
        """Give an event to whoever waits for it."""
        if reason := event.finish_reason:
            ended = self.counts.ended
            ended[reason] = ended.get(reason, 0) + 1
        self.events.append(event)
        try:
            event.handle.put(event)
        except Exception:                   # its listener is gone
            event.handle.cancel()

    def run(self, stop: threading.Event) -> None:
        """Step while there is work, until `stop` is set.

        What still waits or runs then is cancelled. A step that fails
        ends the requests that had rows, and the engine goes on.
        """
        while not stop.is_set():
            if not self.busy:
                with self.changed:
                    self.changed.wait(0.05)
                continue
            try:
                self.step()
            except Exception as error:
                self.fail(error)
        for handle in [*self.waiting, *(j.handle for j in self.jobs if j)]:
            handle.cancel()
        self.events = []
        self.end_cancelled()

    def fail(self, error: Exception) -> None:
        """End all that runs, with the error, and begin with no rows."""
        line = (str(error).splitlines() or [type(error).__name__])[0]
        for job in self.jobs:
            if job is not None:
                self.end(job, "error", f"a step failed: {line}")
        self.start_over()
