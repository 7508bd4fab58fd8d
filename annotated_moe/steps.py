# Generated from book/chapters/28_steps.md by `make sync`; edit the chapter.
"""A decode loop that wastes nothing: one program, and guessed tokens.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from annotated_moe.cache import CacheKind, KVCache
from annotated_moe.config import ModelConfig
from annotated_moe.generate import (
    Model,
    Rows,
    Session,
    bucket,
    check_tokens_made,
    pad_rows,
    token_steps,
)
from annotated_moe.model import (
    Cache,
    Params,
    constrain_cache,
    decode_step,
    forward,
    init_cache,
    unembed,
)
from annotated_moe.placement import here
from annotated_moe.sampling import NO_TOKEN, Sampling, greedy, sample

# %% book/chapters/28_steps.md, cell 6
FEWEST_SLOTS = 256


def slots_for(tokens: int, context: int) -> int:
    """How many slots a cache gets that must hold so many tokens."""
    return bucket(max(tokens, FEWEST_SLOTS), context)


# %% book/chapters/28_steps.md, cell 9
def take_row(cache: Cache, row: Int32[Array, ""]) -> Cache:
    """Batch row `row` as a batch of one."""
    def one(x: Array, axes: tuple[str | None, ...]) -> Array:
        return jax.lax.dynamic_slice_in_dim(
            x, row, 1, axes.index("batch"))

    return Cache(tuple(
        jax.tree.map(one, part, part.axes) for part in cache.places
    ))


@partial(jax.jit, static_argnames=("config", "slots", "kv_cache"))
def with_slots(
    cache: Cache, config: ModelConfig, slots: int,
    kv_cache: str | CacheKind = "float",
) -> Cache:
    """The same batch rows in a cache of `slots` slots, not fewer.

    `kv_cache`: the kind that the cache is of.
    """
    def put(row: Int32[Array, ""], wide: Cache) -> Cache:
        return wide.insert(row, take_row(cache, row))

    rows = len(cache.length)
    wide = init_cache(config, rows, slots, kv_cache)
    return constrain_cache(jax.lax.fori_loop(0, rows, put, wide))


# %% book/chapters/28_steps.md, cell 10
class Writing(NamedTuple):
    """Batch rows that are being continued."""

    cache: Any                  # holds all their tokens but the last
    tokens: Any                 # int32 [B], the last; 0 once stopped
    going: Any                  # bool [B]: it has not stopped
    step: Any                   # int32: how many tokens were chosen


def whole(x: Array) -> Array:
    """`x`, on every device of a mesh."""
    return here().constrain(x, (None,) * x.ndim)


def whole_state(state: Any) -> Any:
    """`state`, of which a mesh cuts nothing but the cache."""
    cache, *rest = state
    return type(state)(cache, *map(whole, rest))


# %% book/chapters/28_steps.md, cell 11
def choose_next(
    logits: Float32[Array, "B V"], state: Writing, settings: Sampling,
    stop: Any, sampled: bool,
) -> Writing:
    """With the next token of each row; a stop id is its last."""
    pick = sample if sampled else greedy
    tokens = pick(logits, state.step, settings)
    tokens = jnp.where(state.going, tokens, 0)
    going = state.going & ~jnp.isin(tokens, stop)
    going &= (tokens != NO_TOKEN).all()
    return Writing(state.cache, tokens, going, state.step + 1)


@partial(jax.jit, static_argnames="sampled")
def first_tokens(
    logits: Float32[Array, "B V"], settings: Sampling, stop: Any,
    sampled: bool,
) -> Writing:
    """After a prefill: its first tokens. The cache is yet to come."""
    tokens = jnp.zeros(len(logits), jnp.int32)
    start = Writing(None, tokens, tokens == 0, jnp.int32(0))
    return whole_state(
        choose_next(logits, start, settings, stop, sampled))


# %% book/chapters/28_steps.md, cell 12
NOT_MADE = -2                   # a token of a step that was not needed
RUN = 8                         # steps that one start may hold


@partial(jax.jit, static_argnames=("config", "sampled"),
         donate_argnames="state")
def run_steps(
    params: Params, state: Writing, settings: Sampling, stop: Any,
    until: Any, config: ModelConfig, sampled: bool,
) -> tuple[Writing, Int32[Array, "_ B"]]:
    """Steps until `until` tokens are chosen, or all rows stopped.

    And the tokens of RUN steps; NOT_MADE, of those not taken.
    """
    first = state.step

    def wanted(carry: Any) -> Any:
        state, _ = carry
        return (state.step < until) & state.going.any()

    def step(carry: Any) -> Any:
        state, made = carry
        logits, cache = decode_step(
            params, state.tokens, state.cache, config, state.going)
        at, state = state.step - first, state._replace(cache=cache)
        state = choose_next(logits, state, settings, stop, sampled)
        return state, made.at[at].set(state.tokens)

    made = jnp.full((RUN, len(state.tokens)), NOT_MADE, jnp.int32)
    state, made = jax.lax.while_loop(wanted, step, (state, made))
    return whole_state(state), whole(made)


# %% book/chapters/28_steps.md, cell 13
def stop_array(stop: Collection[int], vocab_size: int) -> np.ndarray:
    """int32, one of few lengths: `stop`, filled up with no token."""
    ids = sorted(i for i in stop if 0 <= i < vocab_size)
    return pad_rows([ids], bucket(len(ids), vocab_size), NOT_MADE)[0]


def begin(
    model: Model, rows: Rows, settings: Sampling, count: int,
    tiles: Any, stop: np.ndarray,
) -> Writing:
    """Read the prompts and choose each row's first token.

    The cache has slots for `count` new tokens a row.
    """
    c, longest = model.config, max(map(len, rows))
    width = bucket(longest, c.context)
    session = Session(model, len(rows), width)
    logits = session.prefill(rows, model.inputs(rows, width, tiles))
    slots = slots_for(longest + count - 1, c.context)
    with model.on_mesh():
        cache = session.cache
        if slots > width:
            cache = with_slots(cache, c, slots)
        sampled = bool((settings.temperature > 0).any())
        state = first_tokens(logits, settings, stop, sampled)
    return state._replace(cache=cache)


# %% book/chapters/28_steps.md, cell 14
def tokens_of(made: Array, step: int) -> Iterator[list[int]]:
    """The tokens of each step from `step` on; waits for them."""
    for i, tokens in enumerate(np.asarray(made).tolist()):
        if tokens[0] == NOT_MADE:
            return
        yield check_tokens_made(tokens, step + i)


def steps_ahead(
    model: Model, rows: Rows, settings: Sampling, count: int,
    tiles: Any, stop: np.ndarray, run: int,
) -> Iterator[list[int]]:
    """The next token of every row, `count` times or till all stopped.

    `run`: steps a start, up to RUN.
    """
    state = begin(model, rows, settings, count, tiles, stop)
    yield check_tokens_made(np.asarray(state.tokens).tolist(), 0)
    sampled = bool((settings.temperature > 0).any())
    waiting: list[tuple[Array, int]] = []
    for first in range(1, count, run):
        until = np.int32(min(count, first + run))
        with model.on_mesh():
            state, made = run_steps(
                model.params, state, settings, stop, until,
                model.config, sampled,
            )
        waiting.append((made, first))
        if len(waiting) > 1:
            yield from tokens_of(*waiting.pop(0))
    for made, first in waiting:
        yield from tokens_of(made, first)


# %% book/chapters/28_steps.md, cell 20
SHORTEST, LONGEST = 2, 3                    # tokens that must agree


def look_up(
    text: Int32[Array, "B S"], length: Int32[Array, " B"], count: int
) -> tuple[Int32[Array, "B {count}"], Bool[Array, " B"]]:
    """What followed where the last tokens of a text stood before.

    And whether they did. A text that repeats itself with a period
    shorter than `count` is guessed to go on doing so.
    Source: Saxena (2023).
    """
    at = jnp.arange(text.shape[1])
    alike = at < length[:, None] - 1                        # [B, S]
    agree = jnp.zeros(text.shape, jnp.int32)
    for back in range(LONGEST):
        last = jnp.maximum(length - 1 - back, 0)[:, None]
        own = jnp.take_along_axis(text, last, axis=1)
        alike &= (jnp.roll(text, back, axis=1) == own) & (at >= back)
        agree += alike
    score = jnp.where(agree < SHORTEST, -1, agree * len(at) + at)
    best = score.argmax(axis=1)                             # [B]
    period = jnp.maximum(length - 1 - best, 1)
    then = best[:, None] + 1 + jnp.arange(count) % period[:, None]
    then = jnp.minimum(then, len(at) - 1)
    guess = jnp.take_along_axis(text, then, axis=1)
    return guess, score.max(axis=1) >= 0


# %% book/chapters/28_steps.md, cell 23
def choose_each(
    logits: Float32[Array, "B T V"], made: Int32[Array, " B"],
    settings: Sampling, sampled: bool,
) -> Int32[Array, "B T"]:
    """Tokens `made`, `made` + 1, ... of each row."""
    b, t, v = logits.shape
    if not sampled:
        return greedy(logits.reshape(b * t, v)).reshape(b, t)
    steps = made[:, None] + jnp.arange(t)                       # [B, T]

    def one(y: Array, step: Array, own: Sampling) -> Array:
        alone = Sampling(*(x[None] for x in own))
        return sample(y[None], step, alone)[0]

    settings = Sampling(*map(jnp.asarray, settings))
    of_row = jax.vmap(one, in_axes=(0, 0, None))
    return jax.vmap(of_row)(logits, steps, settings)


# %% book/chapters/28_steps.md, cell 24
def count_right(
    new: Int32[Array, "B T"], guesses: Int32[Array, "B _"],
    guessed: Int32[Array, " B"], stop: Any,
) -> tuple[Int32[Array, " B"], Bool[Array, " B"]]:
    """How many of `new` are the text's, and does the last one end it?

    `new[:, j]` was chosen after j guesses, of which there were
    `guessed`: it counts if all were right and none was a stop id.
    """
    most = guesses.shape[1]
    right = new[:, :most] == guesses
    right &= jnp.arange(most) < guessed[:, None]
    end = jnp.isin(new, stop) | (new == NO_TOKEN)           # [B, T]
    right &= ~end[:, :most]
    count = jnp.cumprod(right, axis=1).sum(axis=1) + 1
    last = jnp.take_along_axis(end, count[:, None] - 1, axis=1)
    return count.astype(jnp.int32), last[:, 0]


# %% book/chapters/28_steps.md, cell 27
def each_slot(
    change: Callable[..., Array], part: KVCache, *others: KVCache
) -> KVCache:
    """`change` of each array of slots [L, B, S, ...], not of others."""
    def one(x: Array, axes: tuple[str | None, ...], *y: Array) -> Array:
        return change(x, *y) if axes[:1] == ("layers",) else x

    return jax.tree.map(one, part, part.axes, *others)


def keep_slots(
    part: KVCache, positions: Int32[Array, "B T"]
) -> KVCache | None:
    """What a ring holds where `positions` will be put."""
    if part.room is not None:
        return None
    slots = positions % part.slots
    rows = jnp.arange(len(slots))[:, None]
    return each_slot(lambda x: x[:, rows, slots], part)


def take_back(
    part: KVCache, kept: KVCache | None,
    positions: Int32[Array, "B T"], wrong: Bool[Array, "B T"],
) -> KVCache:
    """In a ring, slots of `wrong` positions hold what was `kept`.

    T must not be more than the ring's slots.
    """
    if kept is None:
        return part
    slots = jnp.where(wrong, positions % part.slots, part.slots)
    rows = jnp.arange(len(slots))[:, None]

    def put(x: Array, was: Array) -> Array:
        return x.at[:, rows, slots].set(was, mode="drop")

    return each_slot(put, part, kept)


# %% book/chapters/28_steps.md, cell 28
def check_guesses(model: Model, slots: int, speculate: int) -> None:
    """ValueError where a ring has too few slots to guess that far."""
    with model.on_mesh():
        shapes = jax.eval_shape(
            partial(init_cache, model.config, 1, slots))
    rings = [c.slots for c in shapes.places if c.room is None]
    if rings and speculate >= min(rings):
        raise ValueError(
            f"speculate is {speculate}, and a layer keeps "
            f"{min(rings)} tokens: guess fewer than it keeps"
        )


# %% book/chapters/28_steps.md, cell 29
class Guessing(NamedTuple):
    """Batch rows that are being continued, some tokens at a time."""

    cache: Any                  # holds all their tokens but the last
    text: Any                   # int32 [B, S]: prompt and new tokens
    going: Any                  # bool [B]: it has not stopped
    made: Any                   # int32 [B]: how many tokens are new
    steps: Any                  # int32 [B]: in how many steps
    guessed: Any                # int32 [B]: guesses that were checked
    right: Any                  # int32 [B]: and were right


@jax.jit
def begin_guessing(
    state: Writing, prompts: Int32[Array, "B S"],
    lengths: Int32[Array, " B"],
) -> Guessing:
    """With the first token after each prompt."""
    rows = jnp.arange(len(lengths))
    text = prompts.at[rows, lengths].set(state.tokens)
    one, none = jnp.ones_like(lengths), jnp.zeros_like(lengths)
    return whole_state(Guessing(
        state.cache, text, state.going, one, none, none, none))


# %% book/chapters/28_steps.md, cell 30
def check_step(
    params: Params, state: Guessing, guesses: Int32[Array, "B _"],
    guessed: Int32[Array, " B"], settings: Sampling, stop: Any,
    most: Any, config: ModelConfig, sampled: bool,
) -> Guessing:
    """One step of all rows that go on, with `guessed` guesses each.

    A row ends with a stop id, or with `most` new tokens.
    """
    start, at = state.cache.length, jnp.arange(guesses.shape[1] + 1)
    positions = start[:, None] + at                         # [B, T]
    kept = [keep_slots(c, positions) for c in state.cache.places]
    last = jnp.take_along_axis(state.text, start[:, None], axis=1)
    tokens = jnp.concatenate([last, guesses], axis=1)       # [B, T]
    lengths = jnp.where(state.going, guessed + 1, 0)
    h, cache = forward(params, tokens, config, state.cache, lengths)
    assert cache is not None
    logits = unembed(params, h, config)
    new = choose_each(logits, state.made, settings, sampled)
    count, end = count_right(new, guesses, guessed, stop)
    count = jnp.where(state.going, count, 0)
    ours = at < count[:, None]
    wrong = ~ours & (at < lengths[:, None])
    cache = Cache(tuple(
        take_back(part, was, positions, wrong)
        for part, was in zip(cache.places, kept)
    )).with_length(start + count)
    to = jnp.where(ours, positions + 1, state.text.shape[1])
    rows = jnp.arange(len(count))[:, None]
    text = state.text.at[rows, to].set(new, mode="drop")
    made = state.made + count
    going = state.going & ~end & (made < most)
    going &= ~((new == NO_TOKEN) & ours).any()
    right = jnp.maximum(count - 1, 0)
    return Guessing(
        constrain_cache(cache), text, going, made,
        state.steps + state.going, state.guessed + guessed,
        state.right + right,
    )


# %% book/chapters/28_steps.md, cell 31
def only_if(
    condition: Bool[Array, ""], change: Callable[[Any], Any], state: Any
) -> Any:
    """`change(state)` if `condition`, else `state`; in place."""
    def once(carry: Any) -> Any:
        return change(carry[0]), jnp.zeros((), bool)

    return jax.lax.while_loop(
        lambda carry: carry[1], once, (state, condition))[0]


# %% book/chapters/28_steps.md, cell 32
Find = Callable[[Array, Array, int], tuple[Array, Array]]


@partial(jax.jit, donate_argnames="state", static_argnames=(
    "config", "sampled", "speculate", "find"))
def run_guesses(
    params: Params, state: Guessing, settings: Sampling, stop: Any,
    most: Any, run: Any, config: ModelConfig, sampled: bool,
    speculate: int, find: Find = look_up,
) -> tuple[Guessing, tuple[Array, Array, Array]]:
    """`run` steps, or until all rows stopped; text, made and going.

    `find` guesses `speculate` tokens from a text and its length.
    """
    def wanted(carry: Any) -> Any:
        state, i = carry
        return (i < run) & state.going.any()

    def step(carry: Any) -> Any:
        state, i = carry
        length = state.cache.length + 1
        guesses, found = find(state.text, length, speculate)
        room = jnp.minimum(speculate, most - state.made - 1)
        guessed = jnp.where(found & state.going, room, 0)
        some = guessed.any()

        def check(count: int, state: Guessing) -> Guessing:
            return check_step(
                params, state, guesses[:, :count], guessed, settings,
                stop, most, config, sampled,
            )

        state = only_if(some, partial(check, speculate), state)
        return only_if(~some, partial(check, 0), state), i + 1

    state, _ = jax.lax.while_loop(wanted, step, (state, jnp.int32(0)))
    state = whole_state(state)
    return state, (state.text, state.made, state.going)


# %% book/chapters/28_steps.md, cell 33
def guessed_steps(
    model: Model, rows: Rows, settings: Sampling, count: int,
    tiles: Any, stop: np.ndarray, run: int, speculate: int,
) -> Iterator[list[int]]:
    """What `steps_ahead` gives, by guessing `speculate` tokens."""
    c, lengths = model.config, np.array([*map(len, rows)], np.int32)
    slots = slots_for(int(lengths.max()) + count - 1, c.context)
    first = begin(model, rows, settings, count, tiles, stop)
    tokens = np.asarray(first.tokens).tolist()
    yield check_tokens_made(tokens, 0)
    with model.on_mesh():
        prompts = pad_rows(rows, slots + 1)
        state = begin_guessing(first, prompts, lengths)
    sampled = bool((settings.temperature > 0).any())
    shown, going, waiting = 1, np.array([count > 1]), []
    while going.any():
        with model.on_mesh():
            state, news = run_guesses(
                model.params, state, settings, stop, np.int32(count),
                np.int32(run), c, sampled, speculate,
            )
        waiting.append(news)
        if len(waiting) < 2:
            continue
        text, made, going = map(np.asarray, waiting.pop(0))
        ready = made[going].min() if going.any() else made.max()
        for step in range(shown, ready):
            at = lengths + np.minimum(step, made - 1)
            tokens = text[np.arange(len(at)), at].tolist()
            yield check_tokens_made(tokens, step)
        shown = max(shown, int(ready))


# %% book/chapters/28_steps.md, cell 43
def fused_steps(
    model: Model, rows: Rows, settings: Sampling, count: int,
    tiles: Any = None, stop: Collection[int] = (),
    streams: bool = True, speculate: int = 0,
) -> Iterator[list[int]]:
    """The tokens of `token_steps`, until all rows have stopped.

    `streams`: each token is wanted at once. ValueError where a model
    cannot speculate: its step is no one program, its cache is not
    kept as it comes, or its rings are small. Source: Leviathan et al.
    (2023), with noise that belongs to a step, so that sampled texts
    are the same too.
    """
    own = type(model).decode_step is not Model.decode_step
    if own or model.kv_cache != "float":    # pages are counted by steps
        return token_steps(
            model, rows, settings, count, tiles, stop, streams,
            speculate,
        )
    if not rows or not count:
        return iter(())
    ends = stop_array(stop, model.config.vocab_size)
    run = 1 if streams else RUN
    if not speculate:
        return steps_ahead(
            model, rows, settings, count, tiles, ends, run)
    longest = max(map(len, rows)) + count - 1
    slots = slots_for(longest, model.config.context)
    check_guesses(model, slots, speculate)
    return guessed_steps(
        model, rows, settings, count, tiles, ends, run, speculate)
