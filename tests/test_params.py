"""Parameters said once, products found by the weight's type, `Linear`."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from annotated_moe import linear, placement
from annotated_moe.attention import AttentionSpec
from annotated_moe.linear import PRODUCTS, Linear, matmul, product
from annotated_moe.params import ASKED, ParamSpec, get_parameter, record_specs
from annotated_moe.placement import PLACEMENTS, OneDevice, here
from annotated_moe.rms_norm import RMSNorm


def normal(*shape, seed=0, dtype=jnp.float32):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, dtype)


def module(size=6, bias=False):
    return hk.without_apply_rng(
        hk.transform(lambda x: Linear(size, ("embed", "mlp"), "out", bias)(x))
    )


@pytest.mark.parametrize("bias", [False, True])
def test_linear_keeps_leading_axes_and_returns_float32(bias):
    x = normal(2, 3, 4, 8, dtype=jnp.bfloat16)
    params = module(bias=bias).init(jax.random.key(0), x)
    params = jax.tree.map(lambda w: w + 0.5, params)
    y = module(bias=bias).apply(params, x)
    assert y.shape == (2, 3, 4, 6) and y.dtype == jnp.float32
    w = params["out"]["w"].astype(jnp.bfloat16).astype(jnp.float32)
    expected = x.astype(jnp.float32) @ w + params["out"].get("b", 0)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


def test_weights_are_drawn_for_unit_outputs_and_biases_are_zero():
    x = normal(50, 400)
    params = module(300, bias=True).init(jax.random.key(1), x)
    assert params["out"]["w"].dtype == jnp.float32
    assert not params["out"]["b"].any()
    assert 0.9 < float(module(300, bias=True).apply(params, x).std()) < 1.1


def test_a_shape_that_does_not_fit_is_one_clear_error():
    with pytest.raises(ValueError, match=r"8 features .* weight of shape \(7, 6\)"):
        product(normal(2, 8), normal(7, 6))


class Doubled:
    """A weight that is twice an array."""

    def __init__(self, w):
        self.w, self.shape = w, w.shape


class Subclass(Doubled):
    pass


def test_a_weight_brings_its_own_product(monkeypatch):
    monkeypatch.setitem(PRODUCTS, Doubled, lambda x, w: 2 * product(x, w.w))
    x, w = normal(2, 3, 8), normal(8, 6, seed=1)
    for kind in (Doubled, Subclass):
        y = matmul(x, kind(w), ("embed", "mlp"))
        np.testing.assert_allclose(y, 2 * (x @ w), rtol=0, atol=1e-5)


def test_what_is_asked_for_is_noted_once_and_forgotten():
    class Outer(hk.Module):
        def __call__(self):
            RMSNorm()(jnp.zeros((1, 8)))
            get_parameter("table", (5, 8), ("vocab", None), jnp.zeros, float32=True)
            Linear(6, ("embed", "mlp"), "out", bias=True)(jnp.zeros((1, 8)))

    specs = record_specs(lambda: Outer("outer")())
    assert specs == {
        "outer/rms_norm": {"scale": ParamSpec((8,), (None,))},
        "outer": {"table": ParamSpec((5, 8), ("vocab", None), False, True)},
        "outer/out": {
            "w": ParamSpec((8, 6), ("embed", "mlp"), True, False),
            "b": ParamSpec((6,), ("mlp",), False, False),
        },
    }
    assert ASKED.get() is None


def test_an_error_while_asking_leaves_nothing_behind():
    def fail(shape, dtype):
        raise RuntimeError("no")

    asks = hk.transform(lambda: get_parameter("w", (1,), (None,), fail))
    with pytest.raises(RuntimeError):
        asks.init(None)
    assert ASKED.get() is None


def test_what_attention_says_of_its_parameters():
    spec = AttentionSpec(4, 2, 8, 0.35, bias=True)

    def run():
        at = jnp.zeros((1, 1), jnp.int32)
        return spec.build()(jnp.zeros((1, 1, 32)), at)

    found = record_specs(run)
    matrices = {m.split("/")[1]: leaves["w"] for m, leaves in found.items()}
    assert {name: (w.shape, w.axes) for name, w in matrices.items()} == {
        "query": ((32, 32), ("embed", "heads")),
        "key": ((32, 16), ("embed", "kv_heads")),
        "value": ((32, 16), ("embed", "kv_heads")),
        "linear": ((32, 32), ("heads", "embed")),
    }
    assert all(w.matrix and not w.float32 for w in matrices.values())
    assert not any(leaves["b"].matrix for leaves in found.values())


def test_everything_is_here_until_something_else_is_found(monkeypatch):
    assert type(here()) is OneDevice

    class Elsewhere(OneDevice):
        def matmul(self, product, x, w, axes, summed):
            return -product(x, w)

    monkeypatch.setattr(placement, "PLACEMENTS", [*PLACEMENTS, Elsewhere])
    x, w = normal(2, 8), normal(8, 6, seed=1)
    y = linear.matmul(x, w, ("embed", "mlp"))
    np.testing.assert_allclose(y, -(x @ w), rtol=0, atol=1e-5)


def test_what_was_registered_last_is_asked_first(monkeypatch):
    class First(OneDevice):
        pass

    class Last(OneDevice):
        pass

    monkeypatch.setattr(placement, "PLACEMENTS", [*PLACEMENTS, First, Last])
    assert type(here()) is Last
    monkeypatch.setattr(placement, "PLACEMENTS", [First, lambda: None])
    assert type(here()) is First
