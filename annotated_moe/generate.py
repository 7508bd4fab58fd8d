# Generated from book/chapters/08c_generate.md, book/chapters/22_balance.md, book/chapters/94_requests.md by `make sync`; edit the chapters.
"""Prompts in, texts out: prefill, decode, and the `Model` around them.
"""

import contextlib
import operator
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Sequence,
)
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from annotated_moe.cache import CacheKind
from annotated_moe.config import ModelConfig
from annotated_moe.model import (
    Cache,
    Params,
    all_logits,
    decode_step,
    init_cache,
    prefill,
)
from annotated_moe.moe import ROUTER_MODULES
from annotated_moe.parallel import use_mesh
from annotated_moe.sampling import (
    NO_TOKEN,
    Sampling,
    greedy,
    sample,
    settings_per_row,
)
from annotated_moe.tokenizer import Tokenizer

# %% book/chapters/08c_generate.md, cell 4
Numbers = float | Sequence[float]           # for all rows, or one a row
Integers = int | Sequence[int]
Rows = list[list[int]]


def bucket(size: int, most: int) -> int:
    """The power of two from 16 up that holds `size`, at most `most`."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


# %% book/chapters/08c_generate.md, cell 5
def pad_rows(rows: Rows, width: int, pad: int = 0) -> np.ndarray:
    """int32 [B, width]: the rows, filled up on the right."""
    tokens = np.full((len(rows), width), pad, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens


# %% book/chapters/08c_generate.md, cell 6
RunCheck = Callable[[Any, str, dict[str, Any]], None]
RUN_CHECKS: list[RunCheck] = []


def announce(mesh: Any, call: str, **inputs: Any) -> None:
    """Give every check of `RUN_CHECKS` the mesh, call and inputs."""
    for check in RUN_CHECKS:
        check(mesh, call, inputs)


# %% book/chapters/08c_generate.md, cell 7
class Session:
    """A cache, and the steps that fill it.

    `rows` is how many batch rows it has, `slots` how many tokens each
    may hold, `kv_cache` how they are kept; None: the model's way.
    """

    def __init__(
        self, model: "Model", rows: int, slots: int,
        kv_cache: str | CacheKind | None = None,
    ) -> None:
        self.model = model
        kind = model.kv_cache if kv_cache is None else kv_cache
        announce(model.mesh, "Session", rows=rows, slots=slots,
                 config=model.config, kv_cache=kind)
        with model.on_mesh():
            self.cache = init_cache(model.config, rows, slots, kind)

    def prefill(
        self, rows: Rows, inputs: Any = None
    ) -> Float32[Array, "B V"]:
        """Every row's last logits, once its prompt is read.

        An empty row is left as it is. TypeError or ValueError for what
        is no id, and where a row has no slots left.
        """
        c, lengths = self.model.config, np.array([*map(len, rows)], int)
        announce(None, "prefill", prompts=rows, config=c)
        self.check_slots(lengths)
        width = bucket(int(lengths.max()), c.context)
        tokens = pad_rows(rows, width, c.pad_id)
        lengths = lengths.astype(np.int32)
        with self.model.on_mesh():
            logits, self.cache = self.model.prefill(
                tokens, lengths, self.cache, inputs
            )
        return logits

    def step(
        self, tokens: Any, active: Any = None
    ) -> Float32[Array, "B V"]:
        """One more token a row, of the rows that are active."""
        if not isinstance(tokens, jax.Array):       # whose ids we chose
            announce(None, "step", tokens=tokens, active=active,
                     config=self.model.config)
            tokens = np.asarray(tokens, np.int32)
        if active is not None:
            active = np.asarray(active, bool)
        self.check_slots(1 if active is None else active)
        with self.model.on_mesh():
            logits, self.cache = self.model.decode_step(
                tokens, self.cache, active
            )
        return logits

    def check_slots(self, new: Any) -> None:
        """ValueError where a row has no room for its `new` tokens."""
        if self.cache.length.is_fully_addressable:  # by this process
            for part in self.cache.places:
                part.check(new)


# %% book/chapters/08c_generate.md, cell 8
def check_tokens_made(tokens: list[int], step: int) -> list[int]:
    """The tokens; ValueError where logits were no finite numbers."""
    if NO_TOKEN in tokens:
        raise ValueError(
            f"prompt {tokens.index(NO_TOKEN)}: logits are NaN or "
            f"infinite at new token {step}; are the weights? "
            "`annotated_moe.verify` holds them to their checksums"
        )
    return tokens


# %% book/chapters/08c_generate.md, cell 9
def token_steps(
    model: "Model", rows: Rows, settings: Sampling, count: int,
    tiles: Any = None, stop: Collection[int] = (),
    streams: bool = True, speculate: int = 0,
) -> Iterator[list[int]]:
    """The next token of every row, `count` times.

    What stops a row, and whether each token is wanted at once, does
    not matter to this loop. ValueError if it should speculate.
    """
    if speculate:
        raise ValueError("it never guesses: leave out speculate")
    if not rows or not count:
        return
    c, longest = model.config, max(map(len, rows))
    pick = sample if (settings.temperature > 0).any() else greedy
    session = Session(
        model, len(rows), bucket(longest + count - 1, c.context)
    )
    width = bucket(longest, c.context)
    logits = session.prefill(rows, model.inputs(rows, width, tiles))
    for step in range(count):
        with model.on_mesh():
            tokens = pick(logits, step, settings)
        yield check_tokens_made(np.asarray(tokens).tolist(), step)
        if step + 1 < count:
            logits = session.step(tokens)


# %% book/chapters/08c_generate.md, cell 10
LOOPS: list[Callable[..., Iterator[list[int]]]] = [token_steps]


# %% book/chapters/08c_generate.md, cell 11
def collect(
    steps: Iterable[list[int]], rows: int, stop_ids: Collection[int]
) -> Rows:
    """Each row's tokens up to its first stop id, which is left out."""
    new: Rows = [[] for _ in range(rows)]
    going = set(range(rows))
    for tokens in steps:
        going -= {i for i in going if tokens[i] in stop_ids}
        for i in going:
            new[i].append(tokens[i])
        if not going:
            break
    return new


# %% book/chapters/08c_generate.md, cell 12
def stream_text(
    ids: Iterable[int], tokenizer: Tokenizer
) -> Iterator[str]:
    """One row's tokens as text, whole characters at a time."""
    text = tokenizer.stream()
    for token in ids:
        yield text.push(token)
    yield text.flush()


# %% book/chapters/08c_generate.md, cell 13
def logits(
    model: "Model", tokens: Any, lengths: Any = None, mask: Any = None,
    images: Any = None,
) -> Float32[Array, "B T V"]:
    """Logits of int [B, T], zero at padding.

    What is padding, `lengths` [B] says, or a `mask` [B, T], true at
    tokens; then it may stand on the left too. `images`: as for
    `generate_ids`. ValueError for what cannot be run.
    """
    c, tokens = model.config, np.asarray(tokens)
    announce(model.mesh, "logits", tokens=tokens.tolist(),
             lengths=lengths, mask=mask, images=images, config=c)
    b, t = tokens.shape
    if mask is None:
        ends = np.asarray(t if lengths is None else lengths)
        mask = np.arange(t) < ends.reshape(-1, 1)
    mask = np.broadcast_to(np.asarray(mask, bool), (b, t))
    rows = [row[own].tolist() for row, own in zip(tokens, mask)]
    width = bucket(t, c.context)
    inputs = model.inputs(rows, width, images)
    with model.on_mesh():
        found = np.array([len(row) for row in rows], np.int32)
        padded = pad_rows(rows, width, c.pad_id)
        y = model.all_logits(padded, found, inputs)
    if mask.all():
        return y[:, :t]
    at = np.maximum(mask.cumsum(axis=1) - 1, 0)             # [B, T]
    y = jnp.take_along_axis(y, at[..., None], axis=1)
    return jnp.where(mask[..., None], y, 0)


# %% book/chapters/08c_generate.md, cell 14
def stop_set(
    model: "Model", stop_ids: Iterable[int] | None
) -> set[int]:
    """`stop_ids`, or the model's own; TypeError for what is no id."""
    if stop_ids is None:
        return set(model.config.eos_ids)
    try:
        return {operator.index(i) for i in stop_ids}
    except TypeError:
        raise TypeError(
            f"stop_ids must be token ids: {stop_ids!r:.80}"
        ) from None


# %% book/chapters/08c_generate.md, cell 15
def generate_ids(
    model: "Model", prompts: Iterable[Any], max_new_tokens: int = 32,
    temperature: Numbers = 0.0, top_p: Numbers = 1.0,
    top_k: Integers | None = None, seed: Integers = 0,
    stop_ids: Iterable[int] | None = None, images: Any = None,
    speculate: int = 0,
) -> Rows:
    """New ids for each list of ids; a stop id ends a row, unseen.

    Each option is one number, or one a prompt; a single seed counts
    up. `stop_ids` are the configuration's unless given. `images`: for
    models that see, each prompt's tiles [I, C, Y, X], or None.
    `speculate`: guess so many tokens a step, for loops that can; the
    ids are the same. TypeError or ValueError for what cannot be run.
    """
    stop = stop_set(model, stop_ids)
    rows = [np.asarray(row).tolist() for row in prompts]
    announce(
        model.mesh, "generate_ids", prompts=rows,
        max_new_tokens=max_new_tokens, temperature=temperature,
        top_p=top_p, top_k=top_k, seed=seed, stop_ids=stop,
        images=images, speculate=speculate, config=model.config,
    )
    settings = settings_per_row(
        len(rows), temperature, top_p, top_k, seed
    )
    steps = LOOPS[-1](
        model, rows, settings, max_new_tokens, images, stop,
        streams=False, speculate=speculate,
    )
    return collect(steps, len(rows), stop)


# %% book/chapters/08c_generate.md, cell 16
def stream_ids(
    model: "Model", prompt: Any, max_new_tokens: int = 32,
    temperature: float = 0.0, top_p: float = 1.0,
    top_k: int | None = None, seed: int = 0,
    stop_ids: Iterable[int] | None = None, images: Any = None,
    speculate: int = 0,
) -> Iterator[int]:
    """The new ids of one list of ids, each as it comes."""
    stop = stop_set(model, stop_ids)
    rows = [np.asarray(prompt).tolist()]
    announce(
        model.mesh, "stream_ids", prompts=rows,
        max_new_tokens=max_new_tokens, temperature=temperature,
        top_p=top_p, top_k=top_k, seed=seed, stop_ids=stop,
        images=images, speculate=speculate, config=model.config,
    )
    settings = settings_per_row(1, temperature, top_p, top_k, seed)
    tiles = None if images is None else [images]
    steps = LOOPS[-1](
        model, rows, settings, max_new_tokens, tiles, stop,
        streams=True, speculate=speculate,
    )
    ids = (token for (token,) in steps)
    return takewhile(lambda token: token not in stop, ids)


# %% book/chapters/08c_generate.md, cell 17
def read_prompt(
    model: "Model", prompt: Any, images: Any = None,
    add_bos: bool | None = None,
) -> tuple[list[int], Any]:
    """Ids of a prompt, and what it shows, prepared, or None."""
    if images is not None:
        raise ValueError("this model reads text: leave out images")
    if isinstance(prompt, str):
        tokenizer = model.require_tokenizer()
        ids = tokenizer.encode_prompt(prompt, add_bos)
        tokenizer.check_ids(ids, model.config.vocab_size)
        return ids, None
    if isinstance(prompt, (list, tuple, np.ndarray)):
        return list(prompt), None
    raise TypeError(f"a prompt is a str or ids: {prompt!r:.60}")


def no_inputs(
    model: "Model", rows: Rows, width: int, tiles: Any
) -> Any:
    """What rows of `width` tokens hold besides, for `prefill`."""
    if tiles is not None and any(t is not None for t in tiles):
        raise ValueError("this model reads text: leave out images")
    return None


# %% book/chapters/08c_generate.md, cell 18
def read_prompts(
    model: "Model", prompts: Sequence[Any], images: Any,
    add_bos: bool | None,
) -> tuple[Rows, list[Any]]:
    """Ids and tiles of each prompt; an error says of which."""
    if not isinstance(prompts, (list, tuple, np.ndarray)):
        raise TypeError(
            "prompts are a text, or a list of texts and lists of ids: "
            f"{prompts!r:.60}"
        )
    shown = [None] * len(prompts) if images is None else images
    if not isinstance(shown, (list, tuple)):
        raise TypeError("images must be a list: a picture a prompt")
    if len(shown) != len(prompts):
        raise ValueError(
            f"{len(shown)} images for {len(prompts)} prompts: give "
            "a picture, a list of pictures, or None for each"
        )
    rows, tiles = [], []
    for i, (prompt, own) in enumerate(zip(prompts, shown)):
        try:
            row, seen = model.read_prompt(prompt, own, add_bos)
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from None
        rows.append(row)
        tiles.append(seen)
    return rows, tiles


# %% book/chapters/08c_generate.md, cell 19
def generate(
    model: "Model", prompts: Any, max_new_tokens: int = 32,
    temperature: Numbers = 0.0, top_p: Numbers = 1.0,
    top_k: Integers | None = None, seed: Integers = 0,
    stop_ids: Iterable[int] | None = None, images: Any = None,
    add_bos: bool | None = None, speculate: int = 0,
) -> Any:
    """New text for a text, or a list of them for a list.

    A prompt is a str, or ids such as `tokenizer.chat` gives. Options
    are those of `generate_ids`. `images`, for models that see: for
    each prompt None, a picture uint8 [height, width, 3], or a list.
    `add_bos`: begin with the token of a beginning; None: as the
    tokenizer's files say.
    """
    one = isinstance(prompts, str)
    many, shown = prompts, images
    if one:
        many, shown = [prompts], None if images is None else [images]
    rows, tiles = read_prompts(model, many, shown, add_bos)
    some = tiles if any(t is not None for t in tiles) else None
    new = model.generate_ids(
        rows, max_new_tokens=max_new_tokens, temperature=temperature,
        top_p=top_p, top_k=top_k, seed=seed, stop_ids=stop_ids,
        images=some, speculate=speculate,
    )
    tokenizer = model.require_tokenizer()
    texts = [tokenizer.decode(row) for row in new]
    return texts[0] if one else texts


# %% book/chapters/08c_generate.md, cell 20
def stream(
    model: "Model", prompt: Any, max_new_tokens: int = 32,
    temperature: float = 0.0, top_p: float = 1.0,
    top_k: int | None = None, seed: int = 0,
    stop_ids: Iterable[int] | None = None, images: Any = None,
    add_bos: bool | None = None, speculate: int = 0,
) -> Iterator[str]:
    """The new text of one prompt, piece by piece as it comes.

    Joined, it is what `generate` gives: SentencePiece drops the space
    before a first word, of new text too.
    """
    row, tiles = model.read_prompt(prompt, images, add_bos)
    ids = model.stream_ids(
        row, max_new_tokens=max_new_tokens, temperature=temperature,
        top_p=top_p, top_k=top_k, seed=seed, stop_ids=stop_ids,
        images=tiles, speculate=speculate,
    )
    return stream_text(ids, model.require_tokenizer())


# %% book/chapters/08c_generate.md, cell 21
@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A configuration, its weights, and where and with what to run.

    Another kind of model overrides the three programs, or what
    prompts hold.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None = None
    mesh: Any = None
    exchange: str = "sum"                   # of tokens, on a mesh
    kv_cache: str | CacheKind = "float"     # how keys and values lie
    in_memory: ClassVar[bool] = True        # or are weights on disk

    def __repr__(self) -> str:
        c = self.config
        return (f"<{type(self).__name__}: {c.num_layers} layers, width "
                f"{c.d_model}, {c.vocab_size} tokens, {c.dtype}>")

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which compiled functions are called."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return use_mesh(self.mesh, self.exchange)

    def all_logits(
        self, tokens: Any, lengths: Any, inputs: Any = None
    ) -> Any:
        return all_logits(
            self.params, tokens, self.config, lengths, inputs
        )

    def prefill(
        self, tokens: Any, lengths: Any, cache: Cache,
        inputs: Any = None,
    ) -> Any:
        return prefill(
            self.params, tokens, lengths, cache, self.config, inputs
        )

    def decode_step(
        self, tokens: Any, cache: Cache, active: Any = None
    ) -> Any:
        return decode_step(
            self.params, tokens, cache, self.config, active
        )

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError("it has no tokenizer: use generate_ids")
        return self.tokenizer

    read_prompt = read_prompt
    inputs = no_inputs
    logits = logits
    generate_ids = generate_ids
    stream_ids = stream_ids
    generate = generate
    stream = stream


# %% book/chapters/08c_generate.md, cell 22
MODEL_CLASSES: dict[type, type[Model]] = {ModelConfig: Model}


# %% book/chapters/22_balance.md, cell 24
def noncausal_router(config: ModelConfig) -> str:
    """The router that needs tokens yet to come; "" if none does."""
    for segment in config.layers:
        for layer in segment.pattern:
            name = getattr(layer.feed_forward, "router", "")
            if not getattr(ROUTER_MODULES.get(name), "causal", True):
                return name
    return ""


def check_causal(mesh: Any, call: str, inputs: dict[str, Any]) -> None:
    """ValueError where a router needs tokens that are yet to come.

    Such a model may be loaded, to be saved or trained on.
    """
    if call == "load" or "config" not in inputs:
        return
    if name := noncausal_router(inputs["config"]):
        raise ValueError(
            f"router {name!r} sends a token by tokens that come after "
            "it, so this model trains and does not generate: take "
            "another router"
        )


RUN_CHECKS.append(check_causal)


# %% book/chapters/94_requests.md, cell 4
def check_prompt(
    i: int, row: Any, new: int, config: ModelConfig
) -> None:
    """TypeError or ValueError if prompt `i` cannot be run."""
    if isinstance(row, str):
        raise TypeError(
            "prompts must be lists of ids; `generate` takes texts"
        )
    if row == []:
        raise ValueError(f"prompt {i} is empty: give it some text")
    if type(row) is not list or any(type(t) is not int for t in row):
        raise ValueError(f"prompt {i} is no list of integer token ids")
    wrong = [t for t in row if not 0 <= t < config.vocab_size]
    if wrong:
        raise ValueError(
            f"prompt {i} holds token {wrong[0]}; "
            f"ids run from 0 to {config.vocab_size - 1}"
        )
    if len(row) + max(new, 1) - 1 > config.context:
        raise ValueError(
            f"prompt {i} of {len(row)} tokens asks for {new} more; "
            f"the context holds {config.context}"
        )


# %% book/chapters/94_requests.md, cell 7
def check_numbers(
    name: str, value: Any, rows: int, good: Callable[[Any], Any],
    need: str,
) -> None:
    """ValueError unless `value` is good: one number, or one a row."""
    a = np.asarray(value)
    if a.shape not in ((), (rows,)):
        raise ValueError(
            f"{name} must be one number, or one for each of {rows} "
            f"prompts, not {a.size}"
        )
    if a.dtype.kind not in "iuf" or not np.all(good(a)):
        raise ValueError(f"{name} must be {need}, got {value!r}")


# %% book/chapters/94_requests.md, cell 8
def check_settings(
    rows: int, temperature: Any, top_p: Any, top_k: Any, seed: Any
) -> None:
    """ValueError for settings of the sampler that make no sense."""
    check_numbers(
        "seed", seed, rows,
        lambda a: (a % 1 == 0) & (a >= 0) & (a < 2**32),
        "an integer from 0 to 2**32 - 1",
    )
    check_numbers(
        "temperature", temperature, rows,
        lambda a: (a >= 0) & np.isfinite(a), "0 or more",
    )
    check_numbers(
        "top_p", top_p, rows, lambda a: (a > 0) & (a <= 1),
        "above 0, at most 1",
    )
    if top_k is not None:
        check_numbers(
            "top_k", top_k, rows,
            lambda a: (a % 1 == 0) & (a >= 1) & (a < 2**31),
            "an integer >= 1, or None",
        )


# %% book/chapters/94_requests.md, cell 12
def mask_of(tokens: np.ndarray, lengths: Any, mask: Any) -> np.ndarray:
    """Where tokens [B, T] are real; ValueError for senseless wishes."""
    b, t = tokens.shape
    if lengths is None and mask is None:
        return np.ones((b, t), bool)
    if mask is not None:
        if lengths is not None:
            raise ValueError("give lengths or a mask, not both")
        return np.asarray(mask).astype(bool)
    lengths = np.asarray(lengths)
    if lengths.shape != (b,) or lengths.dtype.kind not in "iu":
        raise ValueError(f"lengths must be {b} integers")
    if lengths.min() < 1 or lengths.max() > t:
        raise ValueError(f"lengths must be from 1 to {t}: {lengths}")
    return np.arange(t) < lengths[:, None]


# %% book/chapters/94_requests.md, cell 13
def check_whole(
    tokens: Any, lengths: Any, mask: Any, config: ModelConfig
) -> None:
    """ValueError if logits of these rows cannot be computed."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must be [B, T], got {tokens.shape}")
    mask = mask_of(tokens, lengths, mask)
    if mask.shape != tokens.shape or not mask.any(-1).all():
        raise ValueError(
            f"mask {mask.shape} must be like tokens {tokens.shape}, "
            "with a token in each row"
        )
    changes = np.abs(np.diff(mask.astype(int), axis=1)).sum(1)
    if (changes + mask[:, 0] + mask[:, -1] != 2).any():
        raise ValueError("a row's tokens must stand together in mask")
    for i, row in enumerate(tokens):
        check_prompt(i, row[mask[i]].tolist(), 0, config)


# %% book/chapters/94_requests.md, cell 16
def check_rows(rows: Any, config: ModelConfig) -> None:
    """TypeError or ValueError for prompts that are no ids."""
    for i, row in enumerate(rows):
        if len(row):
            check_prompt(i, np.asarray(row).tolist(), 0, config)


def check_step(tokens: Any, active: Any, config: ModelConfig) -> None:
    """ValueError unless there is an id for each active row."""
    ids = np.asarray(tokens)
    there = np.ones(ids.shape) if active is None else np.asarray(active)
    good = ids.ndim == 1 and ids.dtype.kind in "iu"
    if not good or there.shape != ids.shape:
        raise ValueError(
            f"a step takes an id a row, and as many of `active`: "
            f"{tokens!r:.80}"
        )
    of_active = ids[there.astype(bool)]
    if ((of_active < 0) | (of_active >= config.vocab_size)).any():
        raise ValueError(
            f"a step's ids run from 0 to {config.vocab_size - 1}: "
            f"{tokens!r:.80}"
        )


# %% book/chapters/94_requests.md, cell 18
def check_request(mesh: Any, call: str, inputs: dict[str, Any]) -> None:
    """TypeError or ValueError for a request that cannot be run."""
    if call == "logits":
        check_whole(inputs["tokens"], inputs["lengths"], inputs["mask"],
                    inputs["config"])
    if call == "prefill":
        check_rows(inputs["prompts"], inputs["config"])
    if call == "step":
        check_step(inputs["tokens"], inputs["active"],
                   inputs["config"])
    if call not in ("generate_ids", "stream_ids"):
        return
    new, rows = inputs["max_new_tokens"], inputs["prompts"]
    if type(new) is not int or new < 0:
        raise ValueError(f"max_new_tokens must be 0 or more: {new!r}")
    guesses = inputs.get("speculate", 0)
    if type(guesses) is not int or guesses < 0:
        raise ValueError(f"speculate must be 0 or more: {guesses!r}")
    for i, row in enumerate(rows):
        check_prompt(i, row, new, inputs["config"])
    check_settings(len(rows), inputs["temperature"], inputs["top_p"],
                   inputs["top_k"], inputs["seed"])


RUN_CHECKS.append(check_request)
