# Generated from book/chapters/23_training.md, book/chapters/23b_runs.md by `make sync`; edit the chapters.
"""Everything so far ran weights that somebody else had found. This
chapter finds them. A text becomes rows of tokens in which no document
sees its neighbour; a loss says how far a guess was off; two optimizers
turn its gradient into better weights; and a step keeps float32 weights
while it multiplies in bfloat16. At its end a model of Grok-1's
architecture has learned, in seconds and before your eyes, a little
Python.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float32, Int, Int32
from optax.contrib import MuonDimensionNumbers, muon

from annotated_moe.attention import (
    AttentionSpec,
    UnitAttentionSpec,
    WithinDocument,
)
from annotated_moe.cache import PAD_POSITION
from annotated_moe.config import LayerSpec, ModelConfig
from annotated_moe.data import Packed
from annotated_moe.generate import noncausal_router
from annotated_moe.model import (
    Params,
    decoder,
    decoder_to_train,
    embed,
    flat_specs,
    init_params,
    param_specs,
    split_reports,
    unembed,
    update_routers,
)
from annotated_moe.moe import Losses
from annotated_moe.parallel import (
    EXCHANGES,
    check_exchange,
    fit_spec,
    gathering_weights,
    partition_spec,
    use_mesh,
)
from annotated_moe.placement import here
from annotated_moe.rope import DOCUMENT_STRIDE, RopeInDocument
from annotated_moe.specs import OneOf, Positive, Range, Size, Spec


# %% book/chapters/23_training.md, cell 8
def attention_in_document(spec: AttentionSpec) -> AttentionSpec:
    """Attention that looks back to its document's first token."""
    if isinstance(spec, UnitAttentionSpec) and spec.floor is not None:
        raise ValueError(
            "queries that grow with their position cannot be trained "
            "on packed rows: leave out `floor`"
        )
    turn = None if spec.rope is None else RopeInDocument(
        spec.rope.base, inner=spec.rope)
    return replace(spec, rope=turn, mask=WithinDocument(spec.mask))


def within_documents(config: ModelConfig) -> ModelConfig:
    """The same model, whose layers look back within a document."""
    def one(layer: LayerSpec) -> LayerSpec:
        attention = attention_in_document(layer.attention)
        return replace(layer, attention=attention)

    return replace(config, layers=tuple(
        replace(segment, pattern=tuple(map(one, segment.pattern)))
        for segment in config.layers
    ))


# %% book/chapters/23_training.md, cell 9
def positions_in_documents(
    documents: Int[Array, "B T"],
) -> tuple[Int32[Array, "B T"], Bool[Array, "B T"]]:
    """Positions that say document and place, and what is no padding.

    A token whose number differs from the one before begins a document.
    """
    t = documents.shape[1]
    if t > DOCUMENT_STRIDE:
        raise ValueError(
            f"a row of {t} tokens: at most {DOCUMENT_STRIDE}")
    at = jnp.arange(t, dtype=jnp.int32)                     # [T]
    new = documents[:, 1:] != documents[:, :-1]
    new = jnp.pad(new, ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(new, at, 0), axis=1)   # [B, T]
    number = jnp.cumsum(new, axis=1, dtype=jnp.int32) - 1
    real = documents >= 0
    position = number * DOCUMENT_STRIDE + at - first
    return jnp.where(real, position, PAD_POSITION), real


# %% book/chapters/23_training.md, cell 11
def forward_documents(
    params: Params,
    tokens: Int[Array, "B T"],
    documents: Int[Array, "B T"],
    config: ModelConfig,
    train: bool = True,
    remat: bool = False,
    key: Array | None = None,
) -> tuple[Float32[Array, "B T V"], Losses]:
    """Logits and the routers' losses; no document sees another.

    `documents` numbers the document of each token, -1 is padding.
    With `train` there is a gradient, and the routers' losses are
    returned. `remat` computes each layer again for its gradient
    instead of keeping it. `key` is for what routers draw at random.
    """
    positions, real = positions_in_documents(documents)
    inside = within_documents(config)
    table = params["in_out_embed"]["embeddings"]
    if train:
        # On a mesh: read whole rows of it, each device for its batch.
        table = here().constrain(table, (None, None))
    h = embed(table, tokens, config)
    h = here().constrain(h, ("batch", None, None))
    losses: Losses = {}
    if train:
        h, losses = decoder_to_train(
            params, h, positions, real, inside, remat=remat, key=key)
    else:
        h, _ = decoder(params, h, positions, real, inside)
    return unembed(params, h, config, train), losses


# %% book/chapters/23_training.md, cell 23
Share = Annotated[float, Range(0)]


@dataclass(frozen=True)
class LossSpec(Spec):
    """How much of each loss is added to the cross-entropy."""

    z: Share = 1e-4                         # log Z squared, vocabulary
    balance: Share = 0.01                   # of the routers: evenness
    router_z: Share = 1e-3                  # log Z squared, experts


def predicted(documents: Int[Array, "B T1"]) -> Bool[Array, "B T"]:
    """Which of the last T tokens follow another of their document."""
    before, after = documents[:, :-1], documents[:, 1:]
    return (before == after) & (after >= 0)


# %% book/chapters/23_training.md, cell 24
def loss_of(
    params: Params,
    rows: Packed,
    count: Any,
    config: ModelConfig,
    spec: LossSpec,
    remat: bool = False,
    key: Array | None = None,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """The loss, and its parts by name, in nats.

    `count` is how many tokens are predicted: of these rows, or of the
    batch that they are a part of.
    """
    logits, router = forward_documents(
        params, rows.tokens[:, :-1], rows.documents[:, :-1], config,
        remat=remat, key=key,
    )
    mask = predicted(rows.documents)                        # [B, T]
    log_z = jax.nn.logsumexp(logits, axis=-1)               # [B, T]
    after = rows.tokens[:, 1:, None]
    right = jnp.take_along_axis(logits, after, axis=-1)[..., 0]
    nll = jnp.sum(jnp.where(mask, log_z - right, 0)) / count
    parts = {"nll": nll}
    parts["z"] = jnp.sum(jnp.where(mask, log_z**2, 0)) / count
    parts["balance"] = router.get("balance", jnp.zeros(()))
    parts["router_z"] = router.get("z", jnp.zeros(()))
    extra = {"z": spec.z, "balance": spec.balance,
             "router_z": spec.router_z}
    total = nll + sum(extra[name] * parts[name] for name in extra)
    return total, {"loss": total, **parts}


# %% book/chapters/23_training.md, cell 26
Count = Annotated[int, Range(0)]


@dataclass(frozen=True)
class ScheduleSpec(Spec):
    """The rate, step by step, as a share of its height."""

    warmup: Count = 100                     # steps
    decay: Count = 0                        # steps, the last ones
    floor: Share = 0.0                      # where the decay ends


def make_schedule(
    spec: ScheduleSpec, rate: float, steps: int
) -> Callable[[Any], Any]:
    """Step -> rate: up to `rate`, along, down in the last steps.

    ValueError where warm-up and decay do not fit into `steps`.
    """
    if spec.warmup + spec.decay > steps:
        raise ValueError(
            f"warmup {spec.warmup} and decay {spec.decay} are more "
            f"than all {steps} steps: make them shorter"
        )
    up, down = max(1, spec.warmup), max(1, spec.decay)
    return optax.join_schedules(
        [optax.linear_schedule(rate / up, rate, up - 1 or 1),
         optax.constant_schedule(rate),
         optax.linear_schedule(rate, rate * spec.floor, down)],
        [spec.warmup, steps - spec.decay],
    )


# %% book/chapters/23_training.md, cell 29
def muon_dimensions(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """Which two axes of a parameter are a matrix; None: it is none.

    Whatever axes come before count matrices.
    """
    matrix = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return {
        module: {name: matrix if spec.matrix else None
                 for name, spec in leaves.items()}
        for module, leaves in param_specs(config).items()
    }


def matrices(config: ModelConfig) -> dict[str, dict[str, bool]]:
    """Which parameters decay: those that are matrices."""
    return {
        module: {name: spec.matrix for name, spec in leaves.items()}
        for module, leaves in param_specs(config).items()
    }


# %% book/chapters/23_training.md, cell 30
Optimizer = Any                         # optax.GradientTransformation
OptimizerRule = Callable[[Any, "OptimizerSpec", ModelConfig], Optimizer]


def use_adamw(
    rate: Any, spec: "OptimizerSpec", config: ModelConfig
) -> Optimizer:
    """AdamW for all parameters."""
    return optax.adamw(
        rate, spec.b1, spec.b2, weight_decay=spec.weight_decay,
        mask=matrices(config),
    )


def use_muon(
    rate: Any, spec: "OptimizerSpec", config: ModelConfig
) -> Optimizer:
    """Muon for matrices, each by itself; AdamW for what is none."""
    return muon(
        rate, beta=spec.momentum, weight_decay=spec.weight_decay,
        adam_b1=spec.b1, adam_b2=spec.b2, consistent_rms=0.2,
        muon_weight_dimension_numbers=muon_dimensions(config),
    )


OPTIMIZERS: dict[str, OptimizerRule] = {
    "adamw": use_adamw, "muon": use_muon,
}


# %% book/chapters/23_training.md, cell 31
@dataclass(frozen=True)
class OptimizerSpec(Spec):
    """An optimizer by name, and its numbers."""

    name: Annotated[str, OneOf(OPTIMIZERS)] = "muon"
    rate: Positive = 3e-3
    weight_decay: Share = 0.1
    clip: Positive | None = 1.0             # length; None: no limit
    b1: Share = 0.9                         # AdamW's two averages
    b2: Share = 0.95
    momentum: Share = 0.95                  # Muon's average
    router_rate: Share = 1e-3               # of a bias moved by loads

    def check(self) -> None:
        for name in ("b1", "b2", "momentum"):
            if getattr(self, name) >= 1:
                raise ValueError(
                    f"{name} must be below 1: {getattr(self, name)}")


# %% book/chapters/23_training.md, cell 32
@dataclass(frozen=True)
class TrainSpec(Spec):
    """What is done to weights: how often, how much, and how."""

    steps: Size
    batch: Size                             # rows a step
    length: Size                            # tokens a row
    accumulate: Size = 1                    # parts of a batch, in turn
    remat: bool = False                     # layers computed twice
    seed: Count = 0
    loss: LossSpec = LossSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()

    def check(self) -> None:
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch {self.batch} cannot be cut into "
                f"accumulate={self.accumulate} equal parts"
            )
        make_schedule(self.schedule, 1.0, self.steps)

    def rate(self, step: Any) -> Any:
        """The rate of a step, counted from 0."""
        plan = self.schedule, self.optimizer.rate, self.steps
        return make_schedule(*plan)(step)


def make_optimizer(config: ModelConfig, spec: TrainSpec) -> Optimizer:
    """Gradient -> what is added to the weights."""
    own = spec.optimizer
    chosen = OPTIMIZERS[own.name](spec.rate, own, config)
    if own.clip is None:
        return chosen
    return optax.chain(optax.clip_by_global_norm(own.clip), chosen)


# %% book/chapters/23_training.md, cell 35
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What goes from step to step, or where each array of it lies."""

    params: Any                             # module -> name -> float32
    memory: Any                             # the optimizer's
    step: Any                               # int32, steps taken


# %% book/chapters/23_training.md, cell 36
def gradient(
    params: Params, rows: Packed, config: ModelConfig, spec: TrainSpec,
    key: Array | None = None,
) -> tuple[Params, dict[str, Float32[Array, ""]]]:
    """The gradient of a batch's loss, and the loss's parts."""
    count = jnp.maximum(predicted(rows.documents).sum(), 1)
    k = spec.accumulate
    own = replace(spec.loss, balance=spec.loss.balance / k,
                  router_z=spec.loss.router_z / k)
    backward = jax.grad(loss_of, has_aux=True)

    def of_part(part: Packed, key: Array | None) -> Any:
        return backward(
            params, part, count, config, own, spec.remat, key)

    def add_part(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_part(*part)), None

    if k == 1:
        return of_part(rows, key)
    # Every k-th row: on a mesh each device keeps rows that it has.
    parts = jax.tree.map(
        lambda a: a.reshape(-1, k, a.shape[-1]).swapaxes(0, 1), rows)
    keys = None if key is None else jax.random.split(key, k)
    one = jax.tree.map(lambda a: a[0], parts)
    like = jax.eval_shape(of_part, one, key)
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    (grads, report), _ = jax.lax.scan(add_part, zero, (parts, keys))
    return grads, report | {
        name: report[name] / k for name in ("balance", "router_z")}


# %% book/chapters/23_training.md, cell 37
def train_step(
    state: TrainState, rows: Packed, config: ModelConfig,
    spec: TrainSpec,
) -> tuple[TrainState, dict[str, Array]]:
    """One step, and a report on it.

    Where the loss, the gradient or the change is not finite, the state
    comes back as it was and the report's `finite` is false.
    """
    key = jax.random.fold_in(jax.random.key(spec.seed), state.step)
    grads, report = gradient(state.params, rows, config, spec, key)
    grads, loads = split_reports(grads, config)
    optimizer = make_optimizer(config, spec)
    updates, memory = optimizer.update(
        grads, state.memory, state.params)
    report["grad_norm"] = optax.tree.norm(grads)
    report["rate"] = jnp.asarray(spec.rate(state.step), jnp.float32)
    moved = optax.tree.norm(updates)
    checked = report["loss"], report["grad_norm"], moved
    finite = jnp.isfinite(jnp.stack(checked)).all()
    params = optax.apply_updates(state.params, updates)
    loads = jax.tree.map(lambda a: a / spec.accumulate, loads)
    params = update_routers(
        params, loads, config, spec.optimizer.router_rate)
    new = TrainState(params, memory, state.step + 1)
    kept = jax.tree.map(partial(jnp.where, finite), new, state)
    return kept, report | {"finite": finite}


# %% book/chapters/23_training.md, cell 38
class Trainer:
    """The programs of a run: its beginning, a step, an evaluation."""

    def __init__(self, config: ModelConfig, spec: TrainSpec) -> None:
        if spec.length > config.context:
            raise ValueError(
                f"rows of {spec.length} tokens do not fit the model's "
                f"context of {config.context}"
            )
        if router := noncausal_router(config):
            raise ValueError(
                f"router {router!r} sends a token by tokens that come "
                "after it: bits per byte would flatter this model"
            )
        self.config, self.spec = config, spec
        like = jax.eval_shape(self.new_state)
        where = self.layout(like)
        whole = where.step                  # as a report is: everywhere
        self.like = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=s),
            like, where,
        )
        self.draw = jax.jit(self.new_state, out_shardings=where)
        self.run_step = jax.jit(
            partial(train_step, config=config, spec=spec),
            donate_argnums=0, out_shardings=(where, whole))
        self.run_losses = jax.jit(
            partial(row_losses, config=config), out_shardings=whole)

    def new_state(self) -> TrainState:
        key = jax.random.key(self.spec.seed)
        params = init_params(key, self.config)
        memory = make_optimizer(self.config, self.spec).init(params)
        return TrainState(params, memory, jnp.zeros((), jnp.int32))

    def layout(self, like: TrainState) -> TrainState:
        """Where each array of a state lies."""
        device = SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: device, like)

    def place(self, rows: Packed) -> Packed:
        """Rows where a step reads them."""
        return jax.tree.map(jnp.asarray, rows)

    def placed(
        self, train: bool
    ) -> contextlib.AbstractContextManager[Any]:
        """The context that programs are called in."""
        return contextlib.nullcontext()

    def begin(self) -> TrainState:
        """The state before the first step, drawn from the seed."""
        return self.draw()

    def step(
        self, state: TrainState, rows: Packed
    ) -> tuple[TrainState, dict[str, Array]]:
        """`train_step`; the state that is handed in is gone."""
        with self.placed(train=True):
            return self.run_step(state, self.place(rows))

    def losses(self, params: Params, rows: Packed) -> np.ndarray:
        """Nats of all predicted tokens of each row."""
        with self.placed(train=False):
            return np.asarray(self.run_losses(params, self.place(rows)))


# %% book/chapters/23_training.md, cell 39
def row_losses(
    params: Params, rows: Packed, config: ModelConfig
) -> Float32[Array, " B"]:
    """Nats of all predicted tokens of each row; nothing is dropped."""
    logits, _ = forward_documents(
        params, rows.tokens[:, :-1], rows.documents[:, :-1], config,
        train=False,
    )
    after = rows.tokens[:, 1:]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, after)
    return jnp.where(predicted(rows.documents), nll, 0).sum(axis=1)


def bits_per_byte(
    trainer: Trainer, params: Params, rows: Packed, texts: list[str]
) -> float:
    """What `texts`, packed into `rows`, cost a byte, in bits."""
    size, nats = trainer.spec.batch, 0.0
    for start in range(0, len(rows.tokens), size):
        part = Packed(*(a[start : start + size] for a in rows))
        fill = (0, size - len(part.tokens)), (0, 0)
        part = Packed(np.pad(part.tokens, fill),
                    np.pad(part.documents, fill, constant_values=-1))
        nats += float(trainer.losses(params, part).sum())
    blind = len(texts) * math.log2(trainer.config.vocab_size)
    length = sum(len(text.encode()) for text in texts)
    return (nats / math.log(2) + blind) / length


# %% book/chapters/23b_runs.md, cell 35
def state_shardings(
    like: TrainState, config: ModelConfig, mesh: Mesh
) -> TrainState:
    """Where each array of a state lies on a mesh."""
    specs = flat_specs(config)

    def where(path: Any, a: Any) -> NamedSharding:
        module, name = [getattr(k, "key", "") for k in path[-2:]] if (
            len(path) > 1) else ("", "")
        spec, cut = specs.get((module, name)), P()
        if spec is not None and spec.shape == a.shape:
            cut = fit_spec(partition_spec(spec.axes), a.shape, mesh)
        return NamedSharding(mesh, cut)

    return jax.tree_util.tree_map_with_path(where, like)


# %% book/chapters/23b_runs.md, cell 36
class MeshTrainer(Trainer):
    """A Trainer whose state and batch lie on a mesh, in parts.

    In several processes, each gives the same rows and keeps its part.
    `exchange` says how tokens reach experts.
    """

    def __init__(
        self, config: ModelConfig, spec: TrainSpec, mesh: Mesh,
        exchange: str = "sum",
    ) -> None:
        check_exchange(exchange)
        self.mesh, self.exchange = mesh, exchange
        super().__init__(config, spec)

    def layout(self, like: TrainState) -> TrainState:
        return state_shardings(like, self.config, self.mesh)

    def place(self, rows: Packed) -> Packed:
        table = EXCHANGES[self.exchange].table
        spec = fit_spec(partition_spec(("batch", None), table),
                        rows.tokens.shape, self.mesh)
        where = NamedSharding(self.mesh, spec)
        return jax.tree.map(
            lambda a: jax.make_array_from_callback(
                a.shape, where, lambda index: a[index]), rows)

    def placed(
        self, train: bool
    ) -> contextlib.AbstractContextManager[Any]:
        if train:
            return gathering_weights(self.mesh, self.exchange)
        return use_mesh(self.mesh, self.exchange)
