# Generated from book/chapters/04_attention.md by `make sync`; edit the chapter.
"""Products with weights of any type, and the layer `Linear`.
"""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from annotated_moe.params import Axes, get_parameter
from annotated_moe.placement import here

# %% book/chapters/04_attention.md, cell 67
Product = Callable[..., Array]
PRODUCTS: dict[type, Product] = {}


def product(
    x: Float[Array, "N D"], w: Any
) -> Float32[Array, "N F"]:
    """x times a weight [D, F], summed in float32.

    An array is cast to `x.dtype`; another type of weight brings its
    own product in `PRODUCTS`. ValueError when the shapes do not fit.
    """
    if tuple(w.shape[:-1]) != x.shape[1:]:
        raise ValueError(
            f"x of {x.shape[-1]} features does not fit a weight of "
            f"shape {tuple(w.shape)}"
        )
    for kind in type(w).__mro__:
        if kind in PRODUCTS:
            return PRODUCTS[kind](x, w)
    w = jnp.asarray(w).astype(x.dtype)
    return jnp.dot(x, w, preferred_element_type=jnp.float32)


# %% book/chapters/04_attention.md, cell 70
def matmul(
    x: Float[Array, "*B D"], w: Any, axes: Axes, summed: bool = True
) -> Float32[Array, "*B F"]:
    """`product`, wherever it runs; `axes` names what w's axes count.

    Without `summed`, devices that hold parts of D keep their part of
    the sum.
    """
    *lead, d = x.shape
    y = here().matmul(product, x.reshape(-1, d), w, axes, summed)
    return y.reshape(*lead, -1)


# %% book/chapters/04_attention.md, cell 71
class Linear(hk.Module):
    """x times `w` [D, F], plus maybe `b` [F]; in float32.

    `axes` names what D and F count.
    """

    def __init__(
        self, size: int, axes: Axes, name: str, bias: bool = False
    ) -> None:
        super().__init__(name=name)
        self.size, self.axes, self.bias = size, axes, bias

    def __call__(
        self, x: Float[Array, "*B D"]
    ) -> Float32[Array, "*B F"]:
        shape = x.shape[-1], self.size
        init = hk.initializers.VarianceScaling(1.0)
        w = get_parameter("w", shape, self.axes, init, matrix=True)
        y = matmul(x, w, self.axes)
        if self.bias:
            axes = self.axes[1:]
            y += get_parameter("b", shape[1:], axes, jnp.zeros)
        return y
