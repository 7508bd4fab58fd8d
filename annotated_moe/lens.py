# Generated from book/chapters/25_experts.md, book/chapters/25b_without_experts.md by `make sync`; edit the chapters.
"""The small model that ships was trained on five kinds of text. Nobody
told its routers which text is of which kind, and yet they send sums to
other experts than prose. It is tempting to say that this expert does
sums. But how much does its choice of experts really tell, and since
when? By the end of this page you will have every number that passes
between the layers of a model, text coloured by the expert that read it,
the four measures by which OLMoE was described, and an honest count, in
bits, of what a router knows. The next page asks what it matters, and
takes the experts away.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from operator import itemgetter
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from annotated_moe.attention import Attention
from annotated_moe.config import ModelConfig, segments
from annotated_moe.generate import Model
from annotated_moe.model import (
    Params,
    apply_layer,
    embed,
    layer_weights,
    positions_of,
    unembed,
)
from annotated_moe.moe import MoESpec, Route, Router


# %% book/chapters/25_experts.md, cell 3
def pattern(
    attend: Callable[..., Array], args: Any, options: Any
) -> Float32[Array, "B Q T S"]:
    """How much each query looks at each key.

    `attend` with its arguments, but for values one-hot vectors.
    """
    q, k, v = args[:3]
    slots = k.shape[1]
    units = jnp.eye(slots, dtype=v.dtype)[:, None]          # [S, 1, S]
    units = jnp.broadcast_to(units, (*k.shape[:3], slots))
    looked = attend(q, k, units, *args[3:], **options)   # [B, T, Q, S]
    return looked.transpose(0, 2, 1, 3).astype(jnp.float32)


# %% book/chapters/25_experts.md, cell 4
Heard = dict[str, Any]


def listen(
    heard: Heard, change: Callable[[Route], Route], call: Any,
    args: Any, options: Any, context: Any,
) -> Any:
    """What a method returns; routes and patterns go to `heard`."""
    out = call(*args, **options)
    module, method = context.module, context.method_name
    if isinstance(module, Router) and method == "__call__":
        heard["route"] = out = change(out)
    if isinstance(module, Attention) and method == "attend":
        heard["pattern"] = pattern(call, args, options)
    return out


# %% book/chapters/25_experts.md, cell 5
Edit = Callable[[Any, Route], Route]        # a layer, its route


def walk(
    params: Params, rows: Int[Array, "B T"], config: ModelConfig,
    edit: Edit | None = None,
) -> list[Heard]:
    """What is heard at the embedding and then in each layer.

    `edit` changes the route of any layer that has one.
    """
    b, t = rows.shape
    positions, real = positions_of(jnp.zeros(b, jnp.int32), t)
    h = embed(params["in_out_embed"]["embeddings"], rows, config)
    found: dict[int, Heard] = {-1: {"hidden": h}}
    for places in segments(config):

        def body(h: Array, index: Array, places: Any = places) -> Any:
            layers = []
            for place in places:
                layer = place.layers.start + index * place.layers.step
                change = partial(edit, layer) if edit else lambda r: r
                own = layer_weights(params, place, config, index)
                heard: Heard = {}
                wire = partial(listen, heard, change)
                with hk.intercept_methods(wire):
                    h, _, _ = apply_layer(
                        own, place, config, h, positions, real
                    )
                layers.append({**heard, "hidden": h})
            return h, layers

        repeats = jnp.arange(len(places[0].layers))
        h, stacks = jax.lax.scan(body, h, repeats)
        for place, stack in zip(places, stacks):
            for i, layer in enumerate(place.layers):
                found[layer] = jax.tree.map(itemgetter(i), stack)
    return [found[layer] for layer in sorted(found)]


# %% book/chapters/25_experts.md, cell 6
def expert_layers(config: ModelConfig) -> list[int]:
    """The layers that have experts.

    ValueError if none has, or if they differ in how many.
    """
    found: dict[int, MoESpec] = {}
    for layer in range(config.num_layers):
        spec = config.layer(layer).feed_forward
        if isinstance(spec, MoESpec):
            found[layer] = spec
    kinds = {(s.num_experts, s.top_k) for s in found.values()}
    if not kinds:
        raise ValueError(
            "no layer of this model has experts: lens looks at what "
            "routers choose, so load a mixture of experts"
        )
    if len(kinds) > 1:
        raise ValueError(
            f"layers with (experts, top_k) of {sorted(kinds)} do not "
            "fit into one array: lens needs layers that are alike"
        )
    return list(found)


# %% book/chapters/25_experts.md, cell 7
def check_model(model: Model, rows: Any) -> Int[Array, "B T"]:
    """`rows` as an array; ValueError for what lens cannot look at."""
    config, rows = model.config, np.asarray(rows)
    expert_layers(config)
    if model.mesh is not None or not model.in_memory:
        raise ValueError(
            "lens looks at a model in the memory of one device: load "
            "it without mesh=... and stream=..."
        )
    whole = rows.ndim == 2 and rows.size and rows.dtype.kind in "iu"
    if not whole or rows.shape[1] > config.context:
        raise ValueError(
            f"rows are {rows.dtype} {rows.shape}: they must be whole "
            f"numbers [B, T] with T up to {config.context}"
        )
    if rows.min() < 0 or rows.max() >= config.vocab_size:
        raise ValueError(
            f"ids from {rows.min()} to {rows.max()}: this model's run "
            f"from 0 to {config.vocab_size - 1}"
        )
    return jnp.asarray(rows)


# %% book/chapters/25_experts.md, cell 8
class Taps(NamedTuple):
    """What was heard. M counts the layers that have experts."""

    hidden: Float32[Array, "L1 B T D"]      # embedded; after each layer
    pattern: Float32[Array, "L B Q T T"]
    probs: Float32[Array, "M N E"]
    gates: Float32[Array, "M N A"]
    experts: Int[Array, "M N A"]            # the largest gate first


@partial(jax.jit, static_argnames="config")
def all_taps(
    params: Params, rows: Array, config: ModelConfig, edit: Any
) -> Taps:
    heard = walk(params, rows, config, edit)

    def stack(name: str) -> Array:
        return jnp.stack([h[name] for h in heard if name in h])

    routes = [h["route"] for h in heard if "route" in h]
    probs, gates, experts, _ = map(jnp.stack, zip(*routes))
    return Taps(stack("hidden"), stack("pattern"), probs, gates,
                experts)


def tap(
    model: Model, rows: Int[Any, "B T"], edit: Edit | None = None
) -> Taps:
    """Run whole rows of tokens and keep what the taps hear.

    The N = B * T tokens of routes lie row after row. `edit` gets each
    layer's number and route and returns the route to take; it must be
    a JAX pytree. The patterns need 4 * L * B * Q * T**2 bytes.
    ValueError for a model without experts, on a mesh or on disk, and
    for rows that are none.
    """
    rows = check_model(model, rows)
    return all_taps(model.params, rows, model.config, edit)


# %% book/chapters/25_experts.md, cell 9
class Routing(NamedTuple):
    """Choices on M tokens, rows of 256, at C moments of training."""

    steps: Int[np.ndarray, " C"]
    share: Float[np.ndarray, " C"]          # of the whole run
    tokens: Int[np.ndarray, " M"]
    domain: Int[np.ndarray, " M"]           # index into names
    names: tuple[str, ...]
    experts: Int[np.ndarray, "C L M A"]     # the largest gate first
    gates: Float[np.ndarray, "C L M A"]


def held_out() -> dict[str, list[str]]:
    """Texts that the small model never learned from, by domain."""
    path = files("annotated_moe") / "small" / "held_out.json"
    texts: dict[str, list[str]] = json.loads(path.read_text("utf-8"))
    return texts


def routing_over_training() -> Routing:
    """What the small model's routers chose as they learned."""
    path = files("annotated_moe") / "small" / "routing.npz"
    with path.open("rb") as file, np.load(
        file, allow_pickle=False
    ) as arrays:
        found: Any = {name: arrays[name] for name in Routing._fields}
    found["names"] = tuple(found["names"].tolist())
    return Routing(**found)


# %% book/chapters/25_experts.md, cell 16
def is_chosen(
    experts: Int[Any, "*lead N A"], num_experts: int
) -> Bool[np.ndarray, "*lead N {num_experts}"]:
    """Which experts are among each token's choices."""
    every = np.arange(num_experts)
    return (np.asarray(experts)[..., None] == every).any(axis=-2)


def ratio(part: Any, whole: Any) -> np.ndarray:
    """part / whole, and NaN where there is no whole."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(part, whole))


# %% book/chapters/25_experts.md, cell 17
def saturation(
    experts: Int[Any, "*lead N A"], final: Int[Any, "*last N A"]
) -> Float[np.ndarray, "*lead"]:
    """Share of the choices that are among the final ones.

    Source: OLMoE, eq. 5. The choices of a token must be distinct.
    """
    a, b = np.asarray(experts), np.asarray(final)
    kept = (a[..., :, None] == b[..., None, :]).any(axis=-1)
    return np.asarray(kept.mean(axis=(-2, -1)))


# %% book/chapters/25_experts.md, cell 21
def coactivation(
    experts: Int[Any, "*lead N A"], num_experts: int
) -> Float[np.ndarray, "*lead {num_experts} {num_experts}"]:
    """[i, j]: share of the tokens of expert i that expert j has too.

    0 on the diagonal; NaN for an expert that nobody chose.
    Source: OLMoE, eq. 6.
    """
    hot = is_chosen(experts, num_experts).astype(float)
    both = hot.swapaxes(-1, -2) @ hot
    times = np.diagonal(both, axis1=-2, axis2=-1)[..., None]
    return ratio(both * (1 - np.eye(num_experts)), times)


# %% book/chapters/25_experts.md, cell 26
def choices_by(
    experts: Int[Any, "*lead N A"], labels: Int[Any, " N"],
    num_experts: int, num_labels: int,
) -> Int[np.ndarray, "*lead {num_experts} {num_labels}"]:
    """How many tokens of each label have each expert."""
    hot = is_chosen(experts, num_experts)
    kind = np.eye(num_labels, dtype=int)[np.asarray(labels)]
    return np.asarray(hot.swapaxes(-1, -2).astype(int) @ kind)


def specialisation(
    experts: Int[Any, "*lead N A"], labels: Int[Any, " N"],
    num_experts: int, num_labels: int,
) -> Float[np.ndarray, "*lead {num_experts} {num_labels}"]:
    """[i, x]: share of the tokens of label x that expert i has.

    NaN for a label without tokens. Source: OLMoE, eqs. 7 and 8.
    """
    labels = np.asarray(labels)
    found = choices_by(experts, labels, num_experts, num_labels)
    return ratio(found, np.bincount(labels, minlength=num_labels))


# %% book/chapters/25_experts.md, cell 32
def entropy(probs: Float[Any, "*lead E"]) -> Float[np.ndarray, "*lead"]:
    """In bits; 0 log 0 is 0."""
    p = np.asarray(probs)
    logs = np.log2(p, out=np.zeros_like(p), where=p > 0)
    return np.asarray(-(p * logs).sum(axis=-1))


def mutual_information(
    counts: Int[Any, "*lead E X"],
) -> Float[np.ndarray, "*lead"]:
    """Bits that an expert tells of a label, from `choices_by`.

    Of the counts as they are: few tokens make it too large.
    """
    p = np.asarray(counts) / np.sum(counts, (-2, -1), keepdims=True)
    flat = p.reshape(*p.shape[:-2], -1)
    sides = entropy(p.sum(axis=-1)) + entropy(p.sum(axis=-2))
    return np.asarray(sides - entropy(flat))


# %% book/chapters/25b_without_experts.md, cell 4
def is_banned(routed: Route, banned: Array) -> Array:
    """Which choices fall on experts that are banned [N or 1, E]."""
    n, e = routed.probs.shape
    padded = jnp.pad(jnp.broadcast_to(banned, (n, e)), ((0, 0), (0, 1)))
    return jnp.take_along_axis(padded, routed.experts, axis=1)


def without(routed: Route, banned: Bool[Array, "M E"]) -> Route:
    """The route with banned choices left out.

    `banned` for each token, or for all (M = 1). Other gates stay.
    """
    gone = is_banned(routed, banned)
    none = routed.probs.shape[-1]
    experts = jnp.where(gone, none, routed.experts)
    return routed._replace(experts=experts)


# %% book/chapters/25b_without_experts.md, cell 5
def elsewhere(routed: Route, banned: Bool[Array, "M E"]) -> Route:
    """The route with banned choices sent to the next most probable.

    As many experts a token as before, each other than its others, with
    the gate of the choice that it replaces. Where no expert is left, a
    choice is left out.
    """
    gone = is_banned(routed, banned)                        # [N, A]
    none, a = routed.probs.shape[-1], gone.shape[1]
    taken = jax.nn.one_hot(routed.experts, none).sum(1) > 0
    free = jnp.where(taken | banned, -jnp.inf, routed.probs)
    best, others = jax.lax.top_k(free, min(a, none))        # [N, A]
    others = jnp.where(best > -jnp.inf, others, none)
    turn = jnp.maximum(jnp.cumsum(gone, axis=1) - 1, 0)
    others = jnp.take_along_axis(others, turn, axis=1)
    experts = jnp.where(gone, others, routed.experts)
    return routed._replace(experts=experts)


# %% book/chapters/25b_without_experts.md, cell 6
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ablate:
    """An edit: `banned` [L, N or 1, E] experts say nothing."""

    banned: Bool[Array, "*X L N E"]

    def __call__(self, layer: Any, routed: Route) -> Route:
        return without(routed, self.banned[layer])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reroute:
    """An edit: others stand in for `banned` [L, N or 1, E] experts."""

    banned: Bool[Array, "*X L N E"]

    def __call__(self, layer: Any, routed: Route) -> Route:
        return elsewhere(routed, self.banned[layer])


# %% book/chapters/25b_without_experts.md, cell 7
@partial(jax.jit, static_argnames="config")
def all_losses(
    params: Params, rows: Array, config: ModelConfig, edits: Any
) -> Float32[Array, "X B T1"]:

    def under(edit: Any) -> Array:
        h = walk(params, rows, config, edit)[-1]["hidden"]
        logits = unembed(params, h[:, :-1], config)
        logs = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(logs, rows[:, 1:, None], -1)[..., 0]

    return jax.lax.map(under, edits)


def losses(
    model: Model, rows: Int[Any, "B T"], edits: Ablate | Reroute
) -> Float32[Array, "X B T1"]:
    """Nats of each token but a row's first, under each of X edits.

    One program for all of them, run one after another. ValueError as
    for `tap`, and for `banned` that is not [X, L, N or 1, E].
    """
    rows = check_model(model, rows)
    layers = expert_layers(model.config)
    spec: Any = model.config.layer(layers[0]).feed_forward
    shape, tokens = np.shape(edits.banned), (1, rows.size)
    depth, count = model.config.num_layers, spec.num_experts
    fits = len(shape) == 4 and shape[2] in tokens
    if not fits or (shape[1], shape[3]) != (depth, count):
        raise ValueError(
            f"banned is {shape}: it must be [edits, {depth} layers, "
            f"1 or {rows.size} tokens, {count} experts]"
        )
    return all_losses(model.params, rows, model.config, edits)


# %% book/chapters/25b_without_experts.md, cell 14
def rank_correlation(x: Any, y: Any) -> float:
    """Spearman's: 1 if both orders agree, -1 if opposite.

    Equal values share the mean of their ranks; NaN if all are equal.
    """
    ranks = []
    for values in (x, y):
        _, at, n = np.unique(
            np.ravel(values), return_inverse=True, return_counts=True
        )
        ranks.append((np.cumsum(n) - (n - 1) / 2)[at])
    a, b = (r - r.mean() for r in ranks)
    return float(ratio(a @ b, np.sqrt((a @ a) * (b @ b))))


# %% book/chapters/25b_without_experts.md, cell 21
def logit_lens(
    model: Model, hidden: Float32[Array, "L1 B T D"]
) -> Float32[Array, "L1 B T V"]:
    """Logits that the model would give if a layer were its last."""
    def read(h: Array) -> Array:
        return unembed(model.params, h, model.config)

    return jax.lax.map(read, hidden)


# %% book/chapters/25b_without_experts.md, cell 24
def looks_back(
    pattern: Float32[Any, "L B Q T T"], distance: int, first: int = 0
) -> Float[np.ndarray, "L Q"]:
    """A head's mean attention to the token `distance` before.

    Of queries from position `first` on. With tokens that repeat after
    P, `distance` P - 1 from P on is the induction score.
    Source: Olsson et al. (2022), prefix matching.
    """
    p = np.asarray(pattern)
    at = np.arange(max(first, distance), p.shape[-1])
    return np.asarray(p[..., at, at - distance].mean(axis=(1, 3)))
