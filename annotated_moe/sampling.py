# Generated from book/chapters/08b_sampling.md by `make sync`; edit the chapter.
"""From logits to a token: temperature, top-k, nucleus, a seed a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, UInt32


# %% book/chapters/08b_sampling.md, cell 3
def least_of_top_k(
    ranked: Float[Array, "B V"], k: Int[Array, " B"]
) -> Float[Array, "B 1"]:
    """The k-th largest of each row, which is sorted; 0: the least.

    Source: Fan et al. (2018).
    """
    v = ranked.shape[-1]
    k = jnp.where(k > 0, jnp.minimum(k, v), v)
    return jnp.take_along_axis(ranked, v - k[:, None], axis=-1)


# %% book/chapters/08b_sampling.md, cell 4
def least_of_nucleus(
    ranked: Float[Array, "B V"], p: Float[Array, " B"]
) -> Float[Array, "B 1"]:
    """The least of the fewest, largest whose probability reaches p.

    Rows are sorted, the largest last. At least one is kept, however
    small p is. In the dtype of `ranked`, which should be float32; where
    a sum meets p exactly, its rounding says whether one more stays.
    Source: Holtzman et al. (2020).
    """
    below = jnp.cumsum(jax.nn.softmax(ranked), axis=-1)
    # Sums round, and 1 - p does: the largest is above every bound.
    below = below.at[:, -1].set(jnp.inf)
    cut = jnp.argmax(below >= 1 - p[:, None], axis=-1)
    return jnp.take_along_axis(ranked, cut[:, None], axis=-1)


# %% book/chapters/08b_sampling.md, cell 5
Least = Callable[[Array, Array], Array]


def keep(
    logits: Float[Array, "B V"], least: Least, setting: Array
) -> Float[Array, "B V"]:
    """`logits` from the `least` on that is kept; -inf for others."""
    ranked = jnp.sort(logits, axis=-1)
    return jnp.where(
        logits >= least(ranked, setting), logits, -jnp.inf)


# %% book/chapters/08b_sampling.md, cell 8
def choose(
    logits: Float32[Array, "B V"],
    noise: Float32[Array, "B V"],
    temperature: Float[Array, " B"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
) -> Int32[Array, " B"]:
    """A token a row: argmax of the filtered logits plus noise.

    Temperature 0 is greedy. Source: Maddison et al. (2014), section 2.
    """
    best = logits.max(axis=-1, keepdims=True)
    divisor = jnp.where(temperature > 0, temperature, 1)[:, None]
    ids = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
    ranked, ids = jax.lax.sort(((logits - best) / divisor, ids),
                               num_keys=1)
    for least, setting in (
        (least_of_top_k, top_k), (least_of_nucleus, top_p)
    ):
        kept = ranked >= least(ranked, setting)
        ranked = jnp.where(kept, ranked, -jnp.inf)
    noise = jnp.take_along_axis(noise, ids, axis=-1)
    drawn = jnp.argmax(ranked + noise, axis=-1)
    drawn = jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]
    greediest = jnp.argmax(logits, axis=-1)
    return jnp.where(temperature > 0, drawn, greediest)


# %% book/chapters/08b_sampling.md, cell 11
class Sampling(NamedTuple):
    """How to choose, one setting a row."""

    seed: Any                                   # uint32 [B]
    temperature: Any                            # float32 [B], 0: greedy
    top_k: Any                                  # int32 [B], 0: all
    top_p: Any                                  # float32 [B], 1: all


# %% book/chapters/08b_sampling.md, cell 12
NO_TOKEN = -1                   # where logits are no finite numbers


def unless_broken(
    logits: Float32[Array, "B V"], tokens: Int32[Array, " B"]
) -> Int32[Array, " B"]:
    """`tokens`, or NO_TOKEN in a row with a NaN or an infinity."""
    return jnp.where(jnp.isfinite(logits).all(-1), tokens, NO_TOKEN)


# %% book/chapters/08b_sampling.md, cell 13
def token_noise(
    seed: UInt32[Array, ""], step: int | Int[Array, ""],
    logits: Float32[Array, " V"],
) -> Float32[Array, " V"]:
    """Gumbel noise for a row's token `step`: its seed's alone."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.gumbel(key, logits.shape)


@jax.jit
def sample(
    logits: Float32[Array, "B V"],
    step: int | Int[Array, ""],
    settings: Sampling,
) -> Int32[Array, " B"]:
    """Token `step` of every row, each from its own seed."""
    noise = jax.vmap(token_noise, (0, None, 0))
    drawn = noise(settings.seed, step, logits)              # [B, V]
    tokens = choose(
        logits, drawn, settings.temperature, settings.top_k,
        settings.top_p,
    )
    return unless_broken(logits, tokens)


# %% book/chapters/08b_sampling.md, cell 14
@jax.jit
def greedy(
    logits: Float32[Array, "B V"],
    step: int | Int[Array, ""] = 0,
    settings: Sampling | None = None,
) -> Int32[Array, " B"]:
    """The largest logit of every row; takes what `sample` takes."""
    return unless_broken(logits, jnp.argmax(logits, axis=-1))


# %% book/chapters/08b_sampling.md, cell 15
def settings_per_row(
    rows: int, temperature: Any, top_p: Any, top_k: Any, seed: Any
) -> Sampling:
    """One setting a row, from numbers or sequences of them."""
    seed = np.asarray(seed)
    if seed.ndim == 0:
        seed = seed + np.arange(rows)

    def each(value: Any, dtype: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(value).astype(dtype), rows)

    return Sampling(
        each(seed, np.uint32), each(temperature, np.float32),
        each(top_k or 0, np.int32), each(top_p, np.float32),
    )
