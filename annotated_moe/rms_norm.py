# Generated from book/chapters/02_rms_norm.md by `make sync`; edit the chapter.
"""Send a vector through sixty-four random matrices and it comes out a
million times too long, or too short. Grok-1 sends every token through
64 layers, and neither happens, because every layer first rescales what
it reads to a fixed length. This chapter builds that rescaling. By its
end you will have a ten-line module, know which of its three dtype casts
you may not remove, and have seen what breaks when you do.
"""

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


# %% book/chapters/02_rms_norm.md, cell 6
def rms_norm(
    x: Float[Array, "*B D"],
    scale: Float[Array, " D"],
    eps: float = 1e-5,
) -> Float[Array, "*B D"]:
    """Rescale the last axis to unit root mean square, times `scale`.

    Computes in float32 and returns `x.dtype`.
    Source: Zhang & Sennrich (2019), eq. 4; `eps` as in Grok-1.
    """
    y = x.astype(jnp.float32)                               # [*B, D]
    y *= jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + eps)
    return (scale * y).astype(x.dtype)


# %% book/chapters/02_rms_norm.md, cell 27
class RMSNorm(hk.Module):
    """`rms_norm` with a learned float32 `scale` of shape [D]."""

    def __init__(self, eps: float = 1e-5, name: str = "rms_norm"):
        super().__init__(name=name)
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        shape = x.shape[-1:]
        scale = hk.get_parameter("scale", shape, jnp.float32, jnp.ones)
        return rms_norm(x, scale, self.eps)
