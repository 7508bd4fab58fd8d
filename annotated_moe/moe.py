# Generated from book/chapters/05_moe.md, book/chapters/15_llama.md, book/chapters/16_mixtral.md, book/chapters/18_llama4.md, book/chapters/20_gradients.md, book/chapters/22_balance.md by `make sync`; edit the chapters.
"""Of Grok-1's 315.7 billion parameters, 232 billion sit out every
token. They belong to experts that were not asked: each layer keeps
eight feed-forward networks, and a router, one small matrix, reads the
token and picks two. So a model can know much and still answer at the
price of a model a quarter its size. Picking is easy. Multiplying is
hard, because a matrix product multiplies all tokens by one matrix, and
here each token has picked matrices of its own. By the end of this
chapter you will have a router and five ways to bring tokens to experts,
tested to give one answer as long as nothing is dropped; four of them
are counted for what they cost. And you will have trained a router,
first badly, then well.
"""

import importlib
import math
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from annotated_moe.linear import PRODUCTS, Linear, matmul
from annotated_moe.params import Axes, get_parameter
from annotated_moe.placement import here
from annotated_moe.specs import OneOf, Positive, Size, Spec


# %% book/chapters/05_moe.md, cell 5
class Route(NamedTuple):
    """Where N tokens go; the expert that won comes first."""

    probs: Float32[Array, "N E"]
    gates: Float32[Array, "N A"]
    experts: Int[Array, "N A"]
    logits: Float32[Array, "N E"]


# %% book/chapters/05_moe.md, cell 6
def route(
    x: Float[Array, "N D"], w: Float[Array, "D E"], top_k: int
) -> Route:
    """Softmax over all experts, then the `top_k` most probable.

    Float32 inside; the gates are not renormalised. Raises ValueError
    unless 1 <= top_k <= E. Source: Grok-1's release.
    """
    if not 1 <= top_k <= w.shape[-1]:
        raise ValueError(f"top_k={top_k} of {w.shape[-1]} experts")
    logits = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32))
    probs = jax.nn.softmax(logits)                          # [N, E]
    gates, experts = jax.lax.top_k(probs, top_k)            # [N, A]
    return Route(probs, gates, experts, logits)


# %% book/chapters/05_moe.md, cell 16
def geglu(
    gate: Float32[Array, "*N F"], up: Float32[Array, "*N F"], dtype: Any
) -> Float[Array, "*N F"]:
    """gelu(gate) * up in float32, then `dtype`. GELU in tanh form."""
    return (jax.nn.gelu(gate, approximate=True) * up).astype(dtype)


# %% book/chapters/05_moe.md, cell 17
Activation = Callable[[Array, Array, Any], Array]
Experts = dict[str, Any]                # name -> weight [E, ...]


def glu(
    x: Float[Array, "*N D"], w: Experts, activation: Activation = geglu
) -> Float32[Array, "*N D"]:
    """A gated feed-forward network: `linear` gates `linear_v`.

    `linear`, `linear_v` are [D, F], `linear_1` is [F, D].
    """
    into, back = ("embed", "mlp"), ("mlp", "embed")
    gate = matmul(x, w["linear"], into)                     # [N, F]
    up = matmul(x, w["linear_v"], into)
    hidden = activation(gate, up, x.dtype)
    return matmul(hidden, w["linear_1"], back, summed=False)


# %% book/chapters/05_moe.md, cell 18
Expert = Callable[[Array, Array, Experts], Array]


def gated(
    x: Float[Array, "N D"], gates: Float32[Array, " N"], w: Experts
) -> Float32[Array, "N D"]:
    """What Grok-1's expert adds: its output times the gate."""
    return glu(x, w) * gates[:, None]


def one_expert(w: Experts, e: int | Int[Array, ""]) -> Experts:
    """Expert e's weights out of those of all."""
    return {name: stack[e] for name, stack in w.items()}


# %% book/chapters/05_moe.md, cell 25
def check_shapes(
    x: Array, gates: Array, experts: Array, w: Experts
) -> int:
    """E; ValueError unless tokens, choices and weights agree."""
    if gates.shape != experts.shape or len(experts) != len(x):
        raise ValueError(
            f"{len(x)} tokens with gates {gates.shape} and experts "
            f"{experts.shape}: both must be [N, A]"
        )
    counts = {name: stack.shape[0] for name, stack in w.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(
            f"weights of several counts of experts: {counts}"
        )
    return next(iter(counts.values()))


# %% book/chapters/05_moe.md, cell 26
def every_expert(
    x: Float[Array, "N D"],
    gates: Float32[Array, "N A"],
    experts: Int[Array, "N A"],
    w: Experts,
) -> Float[Array, "N D"]:
    """All experts on all N*A repeated tokens, as the release computes.

    In its dtypes, which are float32 where `x` is. For comparison: E
    times the products that are needed. An expert E or above is none.
    Raises ValueError when shapes disagree.
    """
    count = check_shapes(x, gates, experts, w)
    n, a = experts.shape
    pick = jax.nn.one_hot(experts.reshape(-1), count)       # [N*A, E]

    def chosen(xs: Array, name: str, axes: Axes) -> Array:
        every = jnp.stack(
            [matmul(xs, w[name][e], axes) for e in range(count)]
        ).astype(xs.dtype)                                # [E, N*A, F]
        return jnp.einsum("end,ne->nd", every, pick)

    xs = jnp.repeat(x, a, axis=0)                           # [N*A, D]
    gate = chosen(xs, "linear", ("embed", "mlp"))           # float32
    up = chosen(xs, "linear_v", ("embed", "mlp"))
    out = chosen(jax.nn.gelu(gate) * up, "linear_1", ("mlp", "embed"))
    weighed = gates.astype(x.dtype).reshape(-1, 1) * out
    return weighed.reshape(n, a, -1).sum(axis=1).astype(x.dtype)


# %% book/chapters/05_moe.md, cell 29
def capacity(n: int, a: int, num_experts: int, factor: float) -> int:
    """Seats per expert: `factor` times the mean load, at most `n`.

    Raises ValueError unless `factor` is positive. Source: GShard.
    """
    if not factor > 0:
        raise ValueError(f"capacity factor {factor} is not positive")
    return min(n, math.ceil(factor * n * a / num_experts))


# %% book/chapters/05_moe.md, cell 31
def position_in_expert(
    experts: Int[Array, "N A"], num_experts: int
) -> Int[Array, "N A"]:
    """How many earlier choices, token by token, took that expert."""
    flat = experts.reshape(-1)
    hot = jax.nn.one_hot(flat, num_experts, dtype=jnp.int32)  # [N*A, E]
    place = jnp.sum((jnp.cumsum(hot, axis=0) - 1) * hot, axis=-1)
    return place.reshape(experts.shape)


def dropped(
    experts: Int[Array, "N A"], num_experts: int, factor: float = 1.5
) -> Bool[Array, "N A"]:
    """True where `capacity_and_drop` drops a token's choice.

    `jnp.argwhere` of it lists the dropped (token, choice) pairs.
    """
    n, a = experts.shape
    seats = capacity(n, a, num_experts, factor)
    return position_in_expert(experts, num_experts) >= seats


# %% book/chapters/05_moe.md, cell 35
def capacity_and_drop(
    x: Float[Array, "N D"],
    gates: Float32[Array, "N A"],
    experts: Int[Array, "N A"],
    w: Experts,
    apply: Expert = gated,
    factor: float = 1.5,
) -> Float32[Array, "N D"]:
    """C seats an expert; choices that find none add nothing.

    An expert E or above is none. Differentiable: the way to train.
    Raises ValueError when shapes disagree or `factor` is not positive.
    Source: GShard, Switch.
    """
    count = check_shapes(x, gates, experts, w)
    n, a = experts.shape
    seats = capacity(n, a, count, factor)
    position = position_in_expert(experts, count)
    seat, no_seat = experts * seats + position, count * seats
    seat = jnp.where(position < seats, seat, no_seat)
    token = jnp.broadcast_to(jnp.arange(n)[:, None], (n, a))
    seated = jnp.full(no_seat, n).at[seat].set(token, mode="drop")
    xs = x.at[seated].get(mode="fill", fill_value=0)        # [E*C, D]
    gate = jnp.zeros(no_seat).at[seat].set(gates, mode="drop")
    xs, gate = xs.reshape(count, seats, -1), gate.reshape(count, -1)
    out = jax.vmap(apply)(xs, gate, w)                      # [E, C, D]
    out = out.reshape(no_seat, -1)
    out = out.at[seat].get(mode="fill", fill_value=0)       # [N, A, D]
    return jnp.sum(out, axis=1)


# %% book/chapters/05_moe.md, cell 41
class Blocks(NamedTuple):
    """Choices sorted by expert, and the blocks that cover them."""

    order: Int[Array, " N*A"]                   # choices, sorted
    starts: Int[Array, " E"]                    # where expert e begins
    counts: Int[Array, " E"]                    # how many it has
    first: Int[Array, " E+1"]                   # its first block


def plan_blocks(
    experts: Int[Array, "N A"], num_experts: int, block: int
) -> Blocks:
    """Blocks of `block` rows, each for one expert. `first[E]` in all.

    Raises ValueError unless `block` is positive.
    """
    if block < 1:
        raise ValueError(f"a block of {block} rows holds nothing")
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)                  # [N*A]
    counts = jnp.bincount(flat, length=num_experts)         # [E]
    starts = jnp.cumsum(counts) - counts
    ends = jnp.cumsum(-(-counts // block))                  # in blocks
    first = jnp.concatenate([jnp.zeros_like(ends[:1]), ends])
    return Blocks(order, starts, counts, first)


# %% book/chapters/05_moe.md, cell 43
def rows_of_block(
    plan: Blocks, j: Int[Array, ""] | int, block: int
) -> tuple[Int[Array, ""], Int[Array, " {block}"]]:
    """The expert of block `j` and its choices, `N*A` for padding."""
    e = jnp.searchsorted(plan.first[1:], j, side="right")
    row = (j - plan.first[e]) * block + jnp.arange(block)
    nobody = len(plan.order)
    choice = plan.order.at[plan.starts[e] + row].get(
        mode="fill", fill_value=nobody
    )
    return e, jnp.where(row < plan.counts[e], choice, nobody)


# %% book/chapters/05_moe.md, cell 46
def block_rows(n: int, a: int, num_experts: int) -> int:
    """Rows per block for `n` tokens with `a` experts each."""
    mean = -(-n * a // num_experts)
    if n * a <= 16:
        return max(mean, min(4, n * a // 2))
    room = mean + mean // 2 if mean <= 32 else mean
    return min(128, max(8, 1 << (room - 1).bit_length()))


# %% book/chapters/05_moe.md, cell 47
BlockRule = Callable[[Any, int, int, int], int | None]
BLOCK_ROWS: dict[type, BlockRule] = {}          # by type of weight


def rows_for(w: Experts, n: int, a: int) -> int:
    """Rows per block for weights of this type; by `block_rows`."""
    first = next(iter(w.values()))
    rule, count = BLOCK_ROWS.get(type(first)), first.shape[0]
    found = rule(first, n, a, count) if rule else None
    return found or block_rows(n, a, count)


# %% book/chapters/05_moe.md, cell 48
def sort_and_tile(
    x: Float[Array, "N D"],
    gates: Float32[Array, "N A"],
    experts: Int[Array, "N A"],
    w: Experts,
    apply: Expert = gated,
    block: int | None = None,
) -> Float32[Array, "N D"]:
    """Dropless: walk over blocks of tokens that share an expert.

    An expert E or above is none. `block` by default `rows_for`.
    No reverse mode. ValueError when shapes disagree.
    """
    count = check_shapes(x, gates, experts, w)
    n, a = experts.shape
    block = block or rows_for(w, n, a)
    plan = plan_blocks(experts, count, block)

    def add_block(j: Array, y: Array) -> Array:
        e, choice = rows_of_block(plan, j, block)
        token = choice // a                                 # N: padding
        xs = x.at[token].get(mode="fill", fill_value=0)
        gate = gates.ravel().at[choice].get(mode="fill", fill_value=0)
        out = apply(xs, gate, one_expert(w, e))
        return y.at[token].add(out, mode="drop")

    y = jnp.zeros(x.shape, jnp.float32)
    y = jax.lax.fori_loop(0, plan.first[-1], add_block, y)
    return inference_only(y)


# %% book/chapters/05_moe.md, cell 49
@jax.custom_vjp
def inference_only(y: Float[Array, "..."]) -> Float[Array, "..."]:
    """`y`; raises NotImplementedError when it is differentiated."""
    return y


def refuse(*_: Any) -> Any:
    raise NotImplementedError(
        "sort_and_tile has no gradient: train with capacity_and_drop"
    )


inference_only.defvjp(refuse, refuse)


# %% book/chapters/05_moe.md, cell 78
def mean_of_real(
    values: Float32[Array, "N *rest"], real: Bool[Array, " N"]
) -> Float32[Array, "*rest"]:
    """The mean over the tokens that are no padding; 0 of none."""
    real = real.astype(jnp.float32)
    return jnp.tensordot(real, values, 1) / jnp.maximum(real.sum(), 1)


def load_balancing_loss(
    probs: Float32[Array, "N E"],
    experts: Int[Array, "N A"],
    real: Bool[Array, " N"] | None = None,
) -> Float32[Array, ""]:
    """E * sum of (share of choices) * (mean probability): 1 when even.

    Of the tokens that are `real`; None: of all.
    Source: GShard, and Switch Transformer, eq. 4, for A >= 1 choices.
    """
    e = probs.shape[-1]
    real = jnp.ones(len(probs), bool) if real is None else real
    chosen = jax.nn.one_hot(experts, e).mean(axis=1)        # [N, E]
    share, mean = mean_of_real(chosen, real), mean_of_real(probs, real)
    return e * jnp.sum(share * mean)


# %% book/chapters/05_moe.md, cell 81
def router_z_loss(
    logits: Float32[Array, "N E"], real: Bool[Array, " N"] | None = None
) -> Float32[Array, ""]:
    """Mean squared log-sum-exp of the logits. Source: ST-MoE, eq. 5.

    Of the tokens that are `real`; None: of all.
    """
    real = jnp.ones(len(logits), bool) if real is None else real
    squares = jax.nn.logsumexp(logits, axis=-1) ** 2
    return mean_of_real(squares, real)


# %% book/chapters/05_moe.md, cell 92
RouterRule = Callable[[Array, Array, int], Route]
Dropless = Callable[[Array, Array, Array, Experts, Expert], Array]
ROUTERS: dict[str, RouterRule] = {"softmax_top_k": route}
ROUTER_MODULES: dict[str, type["Router"]] = {}  # with parameters
ACTIVATIONS: dict[str, Activation] = {"gelu": geglu}
DROPLESS: dict[str, Dropless] = {}      # those that have a gradient


@dataclass(frozen=True)
class MoESpec(Spec):
    """Experts, of which a router picks some for each token."""

    num_experts: Size                       # E
    top_k: Size                             # A: experts a token
    width: Size                             # F: hidden features of one
    activation: Annotated[str, OneOf(ACTIVATIONS)] = "gelu"
    router: Annotated[
        str, OneOf(ChainMap[str, Any](ROUTERS, ROUTER_MODULES))
    ] = "softmax_top_k"
    capacity_factor: Positive = 1.5          # of training

    def check(self) -> None:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} of only "
                f"num_experts={self.num_experts}"
            )

    def factor_of(self, columns: int) -> float:
        """The capacity factor, of choices listed in so many columns.

        A router may list more than `top_k`, and leave some empty.
        """
        return self.capacity_factor * self.top_k / columns

    def build(self) -> "MoE":
        return MoE(self)


# %% book/chapters/05_moe.md, cell 93
class Router(hk.Module):
    """A router rule with a learned float32 `w` of shape [D, E]."""

    causal: ClassVar[bool] = True           # looks at no later token

    def __init__(self, spec: MoESpec, name: str = "router") -> None:
        super().__init__(name=name)
        self.spec = spec

    def __call__(
        self, x: Float[Array, "N D"],
        real: Bool[Array, " N"] | None = None,
    ) -> Route:
        real = jnp.ones(len(x), bool) if real is None else real
        shape = x.shape[-1], self.spec.num_experts
        init = hk.initializers.TruncatedNormal(shape[0] ** -0.5)
        axes = "embed", None
        w = get_parameter("w", shape, axes, init, float32=True)
        return self.choose(x, w, real)

    @hk.transparent
    def choose(
        self, x: Float[Array, "N D"], w: Float[Array, "D E"],
        real: Bool[Array, " N"],
    ) -> Route:
        """Where tokens go; what is not `real` is padding."""
        return ROUTERS[self.spec.router](x, w, self.spec.top_k)


# %% book/chapters/05_moe.md, cell 94
Parameters = dict[str, tuple[tuple[int, ...], Axes]]


class ExpertModule(hk.Module):
    """A module that only holds parameters, each for all experts."""

    def __call__(self, leaves: Parameters) -> dict[str, Any]:
        found = {}
        for leaf, (shape, axes) in leaves.items():
            matrix = len(shape) > 2
            init: Any = jnp.zeros
            if matrix:
                spread = shape[-2] ** -0.5
                init = hk.initializers.TruncatedNormal(spread)
            found[leaf] = get_parameter(
                leaf, shape, ("experts", *axes), init, matrix
            )
        return found


# %% book/chapters/05_moe.md, cell 95
class ExpertWeights(hk.Module):
    """The parameters of all experts of a layer, by name.

    The one named `a/b` is `b` of module `a`, the one named `a` its `w`.
    """

    def __init__(self, num_experts: int, name: str = "moe") -> None:
        super().__init__(name=name)
        self.num_experts = num_experts

    def __call__(self, parameters: Parameters) -> Experts:
        modules: dict[str, Parameters] = {}
        for name, (shape, axes) in parameters.items():
            module, _, leaf = name.partition("/")
            own = (self.num_experts, *shape), axes
            modules.setdefault(module, {})[leaf or "w"] = own
        w = {}
        for module, leaves in modules.items():
            for leaf, value in ExpertModule(module)(leaves).items():
                name = module if leaf == "w" else f"{module}/{leaf}"
                w[name] = value
        return w


# %% book/chapters/05_moe.md, cell 96
Losses = dict[str, Float32[Array, "*L"]]


def number_among_held(
    experts: Int[Array, "N A"], held: int
) -> Int[Array, "N A"]:
    """Each expert's number among the `held` ones here, `held`: none."""
    experts = experts - here().first(held, "experts")
    return jnp.where((experts < 0) | (experts >= held), held, experts)


# %% book/chapters/05_moe.md, cell 97
class MoE(hk.Module):
    """A router and its experts; the parts of a layer that has them.

    A family's own experts override `parameters`, `expert`, `route` or
    `always`.
    """

    def __init__(
        self, spec: MoESpec, name: str = "feed_forward"
    ) -> None:
        super().__init__(name=name)
        self.spec = spec

    @hk.transparent
    def __call__(
        self,
        x: Float32[Array, "B T D"],
        real: Bool[Array, "B T"],
        dtype: Any = jnp.float32,
        train: str | None = None,
    ) -> tuple[Float32[Array, "B T D"], Losses]:
        """What it adds for each token, computed in `dtype`.

        What is not `real` is padding: no expert computes it, and it
        counts in no loss. `train` names a way that has a gradient:
        "capacity", or one that `DROPLESS` has.
        """
        flat, real = x.reshape(-1, x.shape[-1]), real.reshape(-1)
        routed, rounded = self.route(flat, real), flat.astype(dtype)
        y = self.dispatch(rounded, routed, real, train)
        beside = self.always(rounded)
        y = y if beside is None else y + beside
        losses = {
            "balance": load_balancing_loss(
                routed.probs, routed.experts, real
            ),
            "z": router_z_loss(routed.logits, real),
        }
        return y.reshape(x.shape), losses

    @hk.transparent
    def route(self, x: Float[Array, "N D"], real: Any = None) -> Route:
        """Where each token goes; `real` None: none is padding."""
        kind = ROUTER_MODULES.get(self.spec.router, Router)
        return kind(self.spec)(x, real)

    @hk.transparent
    def always(
        self, x: Float[Array, "N D"]
    ) -> Float32[Array, "N D"] | None:
        """What every token gets besides: in Grok-1, nothing."""
        return None

    def parameters(self, d: int) -> Parameters:
        """Shape and axes of each parameter of one expert, by name."""
        into, back = ("embed", "mlp"), ("mlp", "embed")
        wide, tall = (d, self.spec.width), (self.spec.width, d)
        return {
            "linear": (wide, into),
            "linear_v": (wide, into),
            "linear_1": (tall, back),
        }

    @hk.transparent
    def weights(self, d: int) -> Experts:
        """The parameters of all experts, by name."""
        return ExpertWeights(self.spec.num_experts)(self.parameters(d))

    def expert(
        self,
        x: Float[Array, "N D"],
        gates: Float32[Array, " N"],
        w: Experts,
    ) -> Float32[Array, "N D"]:
        """What one expert, whose weights are `w`, adds to tokens."""
        activation = ACTIVATIONS[self.spec.activation]
        return glu(x, w, activation) * gates[:, None]

    @hk.transparent
    def dispatch(
        self,
        x: Float[Array, "N D"],
        routed: Route,
        real: Bool[Array, " N"],
        train: str | None = None,
    ) -> Float32[Array, "N D"]:
        """Each token through its experts."""
        d, count = x.shape[-1], self.spec.num_experts
        experts = jnp.where(real[:, None], routed.experts, count)
        w = self.weights(d)
        if train == "capacity":
            factor = self.spec.factor_of(experts.shape[1])
            return capacity_and_drop(
                x, routed.gates, experts, w, self.expert, factor
            )
        way = DROPLESS[train] if train else sort_and_tile

        def held_here(
            x: Array, gates: Array, experts: Array, w: Experts
        ) -> Array:
            held = next(iter(w.values())).shape[0]
            def run(x: Array, gates: Array, experts: Array) -> Array:
                own = number_among_held(experts, held)
                return way(x, gates, own, w, self.expert)

            return here().exchange(run, x, gates, experts, held)

        axes = {name: ("experts", *axes)
                for name, (_, axes) in self.parameters(d).items()}
        flat, choices = ("tokens", "embed"), ("tokens", None)
        in_axes = flat, choices, choices, axes
        split = here().split(held_here, in_axes, flat)
        return split(x, routed.gates, experts, w)


# %% book/chapters/05_moe.md, cell 102
@dataclass(frozen=True)
class FeedForwardSpec(Spec):
    """One gated network that every token goes through."""

    width: Size                             # F: hidden features
    activation: Annotated[str, OneOf(ACTIVATIONS)] = "gelu"
    bias: bool = False                      # of the three matrices

    def build(self) -> "FeedForward":
        return FeedForward(self)


# %% book/chapters/05_moe.md, cell 103
def network(
    x: Float[Array, "*N D"], spec: FeedForwardSpec
) -> Float32[Array, "*N D"]:
    """`glu` with a layer `Linear` for each matrix.

    Inside a Haiku transform. Source: Grok-1's DenseBlock.
    """
    into, back = ("embed", "mlp"), ("mlp", "embed")
    gate = Linear(spec.width, into, "linear", spec.bias)(x)
    up = Linear(spec.width, into, "linear_v", spec.bias)(x)
    hidden = ACTIVATIONS[spec.activation](gate, up, x.dtype)
    return Linear(x.shape[-1], back, "linear_1", spec.bias)(hidden)


class FeedForward(hk.Module):
    """A `network` whose matrices are the layer's own."""

    def __init__(
        self, spec: FeedForwardSpec, name: str = "feed_forward"
    ) -> None:
        super().__init__(name=name)
        self.spec = spec

    @hk.transparent
    def __call__(
        self,
        x: Float32[Array, "B T D"],
        real: Bool[Array, "B T"],
        dtype: Any = jnp.float32,
        train: str | None = None,
    ) -> tuple[Float32[Array, "B T D"], Losses]:
        """What it adds for each token, computed in `dtype`."""
        return network(x.astype(dtype), self.spec), {}


# %% book/chapters/15_llama.md, cell 8
def swiglu(
    gate: Float32[Array, "*N F"], up: Float32[Array, "*N F"], dtype: Any
) -> Float[Array, "*N F"]:
    """silu(gate) * up in float32, then `dtype`.

    Source: Shazeer (2020), section 2.
    """
    return (jax.nn.silu(gate) * up).astype(dtype)


ACTIVATIONS["silu"] = swiglu


# %% book/chapters/16_mixtral.md, cell 4
def route_renormalised(
    x: Float[Array, "N D"], w: Float[Array, "D E"], top_k: int
) -> Route:
    """The `top_k` largest logits, and a softmax over these alone.

    Float32 inside; a token's gates sum to 1. ValueError unless there
    are `top_k` experts. Source: Mixtral; Qwen3 (`norm_topk_prob`).
    """
    if not 1 <= top_k <= w.shape[-1]:
        raise ValueError(f"top_k={top_k} of {w.shape[-1]} experts")
    logits = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32))
    best, experts = jax.lax.top_k(logits, top_k)            # [N, A]
    probs, gates = jax.nn.softmax(logits), jax.nn.softmax(best)
    return Route(probs, gates, experts, logits)


ROUTERS["top_k_softmax"] = route_renormalised


# %% book/chapters/18_llama4.md, cell 52
def route_sigmoid(
    x: Float[Array, "N D"], w: Float[Array, "D E"], top_k: int
) -> Route:
    """The `top_k` largest logits; each gate is a sigmoid by itself.

    Float32 inside. `probs`, for the losses of training, is a softmax
    over all. Source: Llama 4's release.
    """
    logits = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32))
    best, experts = jax.lax.top_k(logits, top_k)            # [N, A]
    probs, gates = jax.nn.softmax(logits), jax.nn.sigmoid(best)
    return Route(probs, gates, experts, logits)


ROUTERS["sigmoid"] = route_sigmoid


# %% book/chapters/18_llama4.md, cell 62
@dataclass(frozen=True)
class SharedMoESpec(MoESpec):
    """Experts of which one more, `shared`, reads every token."""

    shared: FeedForwardSpec = FeedForwardSpec(1)
    gate_input: bool = False                # or what an expert returns

    def build(self) -> "SharedMoE":
        return SharedMoE(self)


class Shared(hk.Module):
    """The expert that every token goes through."""

    def __init__(
        self, spec: FeedForwardSpec, name: str = "shared"
    ) -> None:
        super().__init__(name=name)
        self.spec = spec

    def __call__(
        self, x: Float[Array, "N D"]
    ) -> Float32[Array, "N D"]:
        return network(x, self.spec)


# %% book/chapters/18_llama4.md, cell 63
class SharedMoE(MoE):
    """Experts as in Llama 4: gates may scale what an expert reads."""

    spec: SharedMoESpec

    @hk.transparent
    def always(
        self, x: Float[Array, "N D"]
    ) -> Float32[Array, "N D"] | None:
        return Shared(self.spec.shared)(x)

    def expert(
        self,
        x: Float[Array, "N D"],
        gates: Float32[Array, " N"],
        w: Experts,
    ) -> Float32[Array, "N D"]:
        if not self.spec.gate_input:
            return super().expert(x, gates, w)
        x = (x * gates[:, None]).astype(x.dtype)
        return super().expert(x, jnp.ones_like(gates), w)


# %% book/chapters/20_gradients.md, cell 8
def rows_or_zero(
    x: Float[Array, "N *rest"], rows: Int[Array, " M"]
) -> Float[Array, "M *rest"]:
    """`x[rows]`, with zeros for a row that x does not have."""
    return x.at[rows].get(mode="fill", fill_value=0)


def walk_back(
    apply: Expert, block: int, saved: Any, dy: Float[Array, "N D"]
) -> tuple[Array, Array, None, Experts]:
    """Slopes of x, gates and weights: once over the blocks.

    A block is computed again, and adds to its own expert's slopes;
    sums are float32.
    """
    x, gates, experts, w = saved
    a = experts.shape[1]
    plan = plan_blocks(experts, check_shapes(*saved), block)

    def add_block(j: Array, sums: Any) -> Any:
        dx, dgates, dw = sums
        e, choice = rows_of_block(plan, j, block)
        token = choice // a                                 # N: padding
        xs = rows_or_zero(x, token)
        gate = rows_or_zero(gates.ravel(), choice)
        _, back = jax.vjp(apply, xs, gate, one_expert(w, e))
        dxs, dgate, own = back(rows_or_zero(dy, token))
        dx = dx.at[token].add(dxs, mode="drop")
        dgates = dgates.at[choice].set(dgate, mode="drop")
        dw = {name: s.at[e].add(own[name]) for name, s in dw.items()}
        return dx, dgates, dw

    inputs = x, gates.ravel(), w
    zeros = jax.tree.map(
        lambda z: jnp.zeros(z.shape, jnp.float32), inputs
    )
    sums = jax.lax.fori_loop(0, plan.first[-1], add_block, zeros)
    dx, dgates, dw = jax.tree.map(
        lambda s, z: s.astype(z.dtype), sums, inputs
    )
    return dx, dgates.reshape(gates.shape), None, dw


# %% book/chapters/20_gradients.md, cell 9
@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def walk(
    x: Float[Array, "N D"],
    gates: Float32[Array, "N A"],
    experts: Int[Array, "N A"],
    w: Experts,
    apply: Expert,
    block: int,
) -> Float32[Array, "N D"]:
    """`sort_and_tile`, whose gradient walks over the same blocks."""
    return sort_and_tile(x, gates, experts, w, apply, block)


def walk_there(
    x: Array, gates: Array, experts: Array, w: Experts, apply: Expert,
    block: int,
) -> tuple[Array, Any]:
    """What `walk` computes, and what `walk_back` needs."""
    y = sort_and_tile(x, gates, experts, w, apply, block)
    return y, (x, gates, experts, w)


walk.defvjp(walk_there, walk_back)


# %% book/chapters/20_gradients.md, cell 10
def check_floats(w: Experts) -> None:
    """ValueError for a weight that cannot have a gradient."""
    for name, stack in w.items():
        if not isinstance(stack, jax.Array | np.ndarray):
            raise ValueError(
                f"{name} is a {type(stack).__name__}, which has no "
                "gradient: dequantize the weights before training"
            )


def blocks_with_gradient(
    x: Float[Array, "N D"],
    gates: Float32[Array, "N A"],
    experts: Int[Array, "N A"],
    w: Experts,
    apply: Expert = gated,
    block: int | None = None,
) -> Float32[Array, "N D"]:
    """Dropless, with a gradient: `sort_and_tile`, there and back.

    An expert E or above is none: its choices are computed nowhere and
    have slope 0. `apply` may use nothing but its arguments. ValueError
    where shapes disagree or a weight is no array of floats.
    Source: Gale et al. (2023), in blocks of one expert each.
    """
    count = check_shapes(x, gates, experts, w)
    check_floats(w)
    n, a = experts.shape
    block = block or block_rows(n, a, count)
    rows = jnp.zeros((block, x.shape[1]), x.dtype)
    apply, more = jax.closure_convert(
        apply, rows, jnp.zeros(block), one_expert(w, 0)
    )
    if more:
        raise ValueError("an expert must get its weights as arguments")
    return walk(x, gates, experts, w, apply, block)


DROPLESS["blocks"] = blocks_with_gradient


# %% book/chapters/20_gradients.md, cell 11
RaggedDot = Callable[[Array, Array, Array], Array]


@dataclass(frozen=True)
class RaggedStack:
    """Matrices [E, D, F] for sorted rows: `counts[e]` for each."""

    stack: Float[Array, "E D F"]
    counts: Int[Array, " E"]
    ragged_dot: RaggedDot

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]


def ragged_product(
    x: Float[Array, "N D"], w: RaggedStack
) -> Float32[Array, "N F"]:
    """Each row by its own matrix; 0 for rows behind the last count."""
    y = w.ragged_dot(x, w.stack.astype(x.dtype), w.counts)
    held = jnp.arange(len(x)) < w.counts.sum()
    return jnp.where(held[:, None], y, 0).astype(jnp.float32)


PRODUCTS[RaggedStack] = ragged_product


# %% book/chapters/20_gradients.md, cell 12
def jax_ragged_dot(x: Array, stack: Array, counts: Array) -> Array:
    """JAX's own, summed in float32."""
    return jax.lax.ragged_dot(
        x, stack, counts, preferred_element_type=jnp.float32
    )


def ragged_with_gradient(
    x: Float[Array, "N D"],
    gates: Float32[Array, "N A"],
    experts: Int[Array, "N A"],
    w: Experts,
    apply: Expert = gated,
    ragged_dot: RaggedDot = jax_ragged_dot,
) -> Float32[Array, "N D"]:
    """Dropless, with a gradient: all experts in one ragged product.

    An expert E or above is none. ValueError where shapes disagree or a
    weight is no array of floats.
    """
    count = check_shapes(x, gates, experts, w)
    check_floats(w)
    n, a = experts.shape
    plan = plan_blocks(experts, count, 1)
    held = jnp.arange(n * a) < plan.counts.sum()
    choice = jnp.where(held, plan.order, n * a)
    token, expert = choice // a, experts.ravel()[plan.order]
    own = {
        name: RaggedStack(stack, plan.counts, ragged_dot)
        if stack.ndim > 2 else rows_or_zero(stack, expert)
        for name, stack in w.items()
    }
    gate = rows_or_zero(gates.ravel(), choice)
    out = apply(rows_or_zero(x, token), gate, own)          # [N*A, D]
    y = jnp.zeros(x.shape, jnp.float32)
    return y.at[token].add(out, mode="drop")


DROPLESS["ragged"] = ragged_with_gradient


# %% book/chapters/20_gradients.md, cell 13
def tuned_ragged_dot(x: Array, stack: Array, counts: Array) -> Array:
    """tokamax's, by whichever kernel it has for this device."""
    try:
        tokamax = importlib.import_module("tokamax")
    except ImportError:
        raise ImportError(
            "dispatch='tokamax' needs the package tokamax: install it, "
            "or take dispatch='blocks'"
        ) from None
    flags = importlib.import_module("absl.flags").FLAGS
    if not flags.is_parsed():
        flags(["annotated-moe"])        # else tokamax reads our command
    return tokamax.ragged_dot(
        x, stack, counts, preferred_element_type=jnp.float32
    )


DROPLESS["tokamax"] = partial(
    ragged_with_gradient, ragged_dot=tuned_ragged_dot
)


# %% book/chapters/22_balance.md, cell 17
def route_noisy(
    x: Float[Array, "N D"], w: Float[Array, "D E"],
    w_noise: Float[Array, "D E"], top_k: int, key: Array | None = None,
) -> Route:
    """The `top_k` largest of noisy logits, and a softmax over these.

    Normal noise of size softplus(x w_noise); none without a `key`.
    Float32 inside; a token's gates sum to 1. Source: Shazeer et al.
    (2017), eqs. 3 to 5.
    """
    routed = route_renormalised(x, w, top_k)
    if key is None:
        return routed
    x = x.astype(jnp.float32)
    size = jax.nn.softplus(x @ w_noise.astype(jnp.float32))
    noise = jax.random.normal(key, size.shape)
    noisy = routed.logits + size * noise
    best, experts = jax.lax.top_k(noisy, top_k)             # [N, A]
    gates = jax.nn.softmax(best)
    return Route(routed.probs, gates, experts, routed.logits)


# %% book/chapters/22_balance.md, cell 18
class NoisyRouter(Router):
    """`route_noisy` with a learned size of the noise."""

    @hk.transparent
    def choose(self, x: Array, w: Array, real: Array) -> Route:
        w_noise = get_parameter(
            "noise", w.shape, ("embed", None), jnp.zeros, float32=True
        )
        key = hk.maybe_next_rng_key()
        return route_noisy(x, w, w_noise, self.spec.top_k, key)


ROUTER_MODULES["noisy_top_k"] = NoisyRouter


# %% book/chapters/22_balance.md, cell 20
def route_expert_choice(
    x: Float[Array, "N D"], w: Float[Array, "D E"], top_k: int,
    real: Bool[Array, " N"] | None = None,
) -> Route:
    """Each expert takes the N*A/E tokens that want it most.

    So a token has `top_k` experts on average. `experts` has a column
    for each expert, and E where it did not take the token. Float32
    inside. Source: Zhou et al. (2022), eqs. 1 to 3.
    """
    (n, _), e = x.shape, w.shape[-1]
    logits = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32))
    probs = jax.nn.softmax(logits)                          # [N, E]
    wish = probs if real is None else probs * real[:, None]
    seats = capacity(n, top_k, e, 1.0)
    best, tokens = jax.lax.top_k(wish.T, seats)             # [E, C]
    every = jnp.arange(e)
    taken = jnp.zeros((n, e), bool)
    taken = taken.at[tokens, every[:, None]].set(best > 0)
    experts = jnp.where(taken, every, e)                    # [N, E]
    return Route(probs, jnp.where(taken, probs, 0), experts, logits)


# %% book/chapters/22_balance.md, cell 21
class ExpertChoiceRouter(Router):
    """`route_expert_choice`: it looks at all tokens of a batch."""

    causal = False

    @hk.transparent
    def choose(self, x: Array, w: Array, real: Array) -> Route:
        return route_expert_choice(x, w, self.spec.top_k, real)


ROUTER_MODULES["expert_choice"] = ExpertChoiceRouter


# %% book/chapters/22_balance.md, cell 26
def route_biased(
    x: Float[Array, "N D"], w: Float[Array, "D E"],
    bias: Float32[Array, " E"], top_k: int,
) -> Route:
    """The `top_k` largest of sigmoid scores plus a bias.

    The gates are the scores of these, without the bias, divided by
    their sum. `probs`, for the losses, are all scores so divided.
    Float32 inside. Source: DeepSeek-V3, eqs. 12 to 16.
    """
    logits = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32))
    scores = jax.nn.sigmoid(logits)                         # [N, E]
    _, experts = jax.lax.top_k(scores + bias, top_k)        # [N, A]
    gates = jnp.take_along_axis(scores, experts, axis=-1)
    total = gates.sum(axis=-1, keepdims=True)
    gates = gates / jnp.maximum(total, 1e-20)
    total = scores.sum(axis=-1, keepdims=True)
    probs = scores / jnp.maximum(total, 1e-20)
    return Route(probs, gates, experts, logits)


# %% book/chapters/22_balance.md, cell 27
def update_bias(
    bias: Float32[Array, "*L E"], load: Float32[Array, "*L E"],
    rate: float,
) -> Float32[Array, "*L E"]:
    """`rate` up where the load is below the mean, down where above.

    Source: Wang et al. (2024), algorithm 1.
    """
    excess = load - load.mean(axis=-1, keepdims=True)
    return bias - rate * jnp.sign(excess)


# %% book/chapters/22_balance.md, cell 28
def expert_load(
    experts: Int[Array, "N A"], num_experts: int,
    real: Bool[Array, " N"] | None = None,
) -> Float32[Array, " E"]:
    """How many choices of the `real` tokens each expert has."""
    hot = jax.nn.one_hot(experts, num_experts).sum(axis=1)  # [N, E]
    return hot.sum(axis=0) if real is None else real @ hot


# %% book/chapters/22_balance.md, cell 29
@jax.custom_vjp
def report(
    x: Float32[Array, "..."], bias: Float32[Array, " E"],
    news: Float32[Array, " E"],
) -> Float32[Array, "..."]:
    """`x`; where the gradient of `bias` would be, stands `news`."""
    return x


def report_there(x: Array, bias: Array, news: Array) -> Any:
    return x, news


def report_back(news: Array, dx: Array) -> Any:
    return dx, news, None


report.defvjp(report_there, report_back)


# %% book/chapters/22_balance.md, cell 30
class BiasedRouter(Router):
    """`route_biased`; in a gradient, its bias reports the loads."""

    update = "load"

    @hk.transparent
    def choose(self, x: Array, w: Array, real: Array) -> Route:
        e = self.spec.num_experts
        bias = get_parameter("bias", (e,), (None,), jnp.zeros,
                             float32=True, update=self.update)
        fixed = jax.lax.stop_gradient(bias)
        routed = route_biased(x, w, fixed, self.spec.top_k)
        news = jax.lax.stop_gradient(self.news(routed, fixed, real))
        gates = report(routed.gates, bias, news)
        return routed._replace(gates=gates)

    def news(self, routed: Route, bias: Array, real: Array) -> Array:
        """What the rule wants to know of a batch, [E]."""
        return expert_load(routed.experts, self.spec.num_experts, real)


ROUTER_MODULES["selection_bias"] = BiasedRouter


# %% book/chapters/22_balance.md, cell 31
def set_bias(
    bias: Float32[Array, "*L E"], found: Float32[Array, "*L E"],
    rate: float,
) -> Float32[Array, "*L E"]:
    """`found`: a quantile is not approached, it is computed."""
    return found


UpdateRule = Callable[[Array, Array, float], Array]
UPDATES: dict[str, UpdateRule] = {
    "load": update_bias, "quantile": set_bias,
}


# %% book/chapters/22_balance.md, cell 36
def quantile_bias(
    scores: Float32[Array, "N E"], bias: Float32[Array, " E"],
    top_k: int, real: Bool[Array, " N"],
) -> Float32[Array, " E"]:
    """The bias with which each expert would have N*A/E of the tokens.

    Each token asks a score above its cutoff, the best that lost; so an
    expert lacks `cutoff - score`, and gets that of A/E of the tokens.
    Mean zero. Source: Su (2026).
    """
    e = scores.shape[-1]
    best, _ = jax.lax.top_k(scores + bias, min(top_k + 1, e))
    lacks = best[:, -1:] - scores                           # [N, E]
    lacks = jnp.where(real[:, None], lacks, jnp.nan)
    found = jnp.nanquantile(lacks, top_k / e, axis=0)       # [E]
    return jnp.where(real.any(), found - found.mean(), bias)


# %% book/chapters/22_balance.md, cell 37
class QuantileRouter(BiasedRouter):
    """`route_biased` with the bias of `quantile_bias`."""

    update = "quantile"

    def news(self, routed: Route, bias: Array, real: Array) -> Array:
        scores = jax.nn.sigmoid(routed.logits)
        return quantile_bias(scores, bias, self.spec.top_k, real)


ROUTER_MODULES["quantile"] = QuantileRouter
