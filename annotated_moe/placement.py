# Generated from book/chapters/04_attention.md by `make sync`; edit the chapter.
"""Where a computation runs: on one device, until a later chapter.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from jaxtyping import Array


# %% book/chapters/04_attention.md, cell 68
class OneDevice:
    """Everything is here: a product is a product, a sum is whole."""

    alone: ClassVar[bool] = True        # no other device has a part

    def matmul(
        self, product: Callable[[Array, Any], Array], x: Array, w: Any,
        axes: tuple[str | None, ...], summed: bool,
    ) -> Array:
        return product(x, w)

    def split(
        self, function: Callable[..., Any], in_axes: Any, out_axes: Any
    ) -> Callable[..., Any]:
        """`function` of arrays whose axes count what `in_axes` say."""
        return function

    def constrain(
        self, x: Array, axes: tuple[str | None, ...]
    ) -> Array:
        """`x`, held where its axes say."""
        return x

    def total(self, y: Array, *axes: str) -> Array:
        """The sum of what the devices along `axes` have."""
        return y

    def once(self, y: Array, axis: str) -> Array:
        """`y` on the first device along `axis`, zero on others."""
        return y

    def parts(self, size: int, axis: str) -> int:
        """Into how many parts an axis of `size` is cut."""
        return 1

    def first(self, count: int, axis: str) -> Any:
        """The index of the first of `count` things held here."""
        return 0

    def exchange(
        self, run: Callable[[Array, Array, Array], Array], x: Array,
        gates: Array, experts: Array, held: int,
    ) -> Array:
        """What all experts add; `run` asks the `held` that are here."""
        return run(x, gates, experts)

    def head_copies(self, kv_heads: int, q_heads: int) -> int:
        """How often each key head is held."""
        return 1

    def gather_heads(
        self, k: Array, v: Array, q_heads: int
    ) -> tuple[Array, Array]:
        """Keys and values, all whole if a device has half a head."""
        return k, v

    def spread_heads(
        self, k: Array, v: Array, q_heads: int
    ) -> tuple[Array, Array]:
        """Keys and values, each head `head_copies` times."""
        return k, v


# %% book/chapters/04_attention.md, cell 69
PLACEMENTS: list[Callable[[], OneDevice | None]] = []


def here() -> OneDevice:
    """Where what is being computed runs."""
    for find in reversed(PLACEMENTS):
        if found := find():
            return found
    return OneDevice()
