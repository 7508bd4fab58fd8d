# Generated from book/chapters/04_attention.md, book/chapters/07_sharding.md by `make sync`; edit the chapters.
"""What a parameter is, said once, where a module asks for it.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array

# %% book/chapters/04_attention.md, cell 65
Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class ParamSpec:
    """What a parameter is, apart from its values.

    `axes` names what each axis of `shape` counts, None where it is
    never cut. `matrix`: multiplied by and nothing else, so that it may
    be quantized or left on disk. `float32`: kept so, whatever is
    computed in. `update`: the rule by which training changes it; None
    is the optimizer's. The defaults are a norm's gain.
    """

    shape: tuple[int, ...]
    axes: Axes
    matrix: bool = False
    float32: bool = True
    update: str | None = None


# %% book/chapters/04_attention.md, cell 66
ASKED: ContextVar[ParamSpec | None] = ContextVar("ASKED", default=None)


def get_parameter(
    name: str,
    shape: tuple[int, ...],
    axes: Axes,
    init: Callable[..., Array],
    matrix: bool = False,
    float32: bool = False,
    update: str | None = None,
) -> Any:
    """`hk.get_parameter`, in float32, with what a `ParamSpec` adds."""
    spec = ParamSpec(tuple(shape), axes, matrix, float32, update)
    token = ASKED.set(spec)
    try:
        return hk.get_parameter(name, shape, jnp.float32, init)
    finally:
        ASKED.reset(token)


# %% book/chapters/07_sharding.md, cell 11
def record_specs(
    run: Callable[[], Any],
) -> dict[str, dict[str, ParamSpec]]:
    """Module -> name -> spec of each parameter that `run` asks for.

    `run` is a function of Haiku modules. Nothing is allocated. What a
    module gets by `hk.get_parameter` alone is like a norm's gain.
    """
    found: dict[str, dict[str, ParamSpec]] = {}

    def note(
        create: Any, shape: Any, dtype: Any, init: Any, context: Any
    ) -> Any:
        plain = ParamSpec(tuple(shape), (None,) * len(shape))
        spec = ASKED.get() or plain
        module, name = context.full_name.rsplit("/", 1)
        found.setdefault(module, {})[name] = spec
        return jnp.zeros(shape, dtype)

    def noted() -> Any:
        with hk.custom_creator(note):
            return run()

    jax.eval_shape(lambda: hk.transform(noted).init(None))
    return found
