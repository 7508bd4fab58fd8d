"""The chapter on comparisons: what it counts, and what its files say."""

import csv
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from annotated_moe.config import ModelConfig, Segment
from annotated_moe.data import Packed
from annotated_moe.families.grok import grok_config
from annotated_moe.model import init_params
from annotated_moe.moe import DROPLESS, FeedForwardSpec, MoESpec
from annotated_moe.plan import training_flops
from annotated_moe.training import LossSpec, loss_of

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "annotated_moe/measured"
E, A, F, T, BATCH = 4, 2, 192, 64, 8


def program(folder: str, name: str) -> ModuleType:
    """A file of `scripts` or `benchmarks`, imported as it would be run."""
    path = ROOT / folder / f"{name}.py"
    found = importlib.util.spec_from_file_location(f"{folder}_{name}", path)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.parent))
    try:
        found.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def config_of(feed_forward: Any, layers: int = 1, tied: bool = True) -> ModelConfig:
    base = grok_config(
        vocab_size=256, context=T, d_model=192, d_ff=1, num_layers=layers,
        num_experts=1, q_heads=4, kv_heads=2, head_size=48, dtype="float32",
    )  # fmt: skip
    layer = replace(base.layer(0), feed_forward=feed_forward)
    return replace(base, layers=(Segment((layer,), layers),), tied=tied)


def counted(config: ModelConfig) -> float:
    """Operations a token of a gradient, as the compiler counts them."""
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    row = jax.ShapeDtypeStruct((BATCH, T + 1), jnp.int32)

    def loss(params: Any, rows: Packed) -> Any:
        return loss_of(params, rows, BATCH * T, config, LossSpec())[0]

    lowered = jax.jit(jax.grad(loss)).lower(params, Packed(row, row))
    return lowered.compile().cost_analysis()["flops"] / (BATCH * T)


@pytest.mark.parametrize("tied", [True, False])
def test_the_formula_counts_what_the_compiler_counts(tied):
    config = config_of(FeedForwardSpec(F), tied=tied)
    assert 1 < counted(config) / training_flops(config, T) < 1.05


def test_with_every_expert_computed_the_formula_counts_all(monkeypatch):
    """In blocks a loop hides the products: its body is counted once."""
    bench = program("benchmarks", "training")
    monkeypatch.setitem(DROPLESS, "blocks", bench.every_expert_once)
    every = training_flops(config_of(MoESpec(E, E, F)), T)
    assert 1 < counted(config_of(MoESpec(E, A, F))) / every < 1.05


def test_a_token_pays_for_its_own_experts_alone():
    chosen = training_flops(config_of(MoESpec(E, A, F), 3), T)
    dense = training_flops(config_of(FeedForwardSpec(A * F), 3), T)
    assert chosen - dense == 6 * 3 * 192 * E            # the router


def test_every_expert_once_is_the_layer(monkeypatch):
    """The benchmark's slowest way computes what the others do."""
    bench = program("benchmarks", "training")
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x, gates = normal(20, 8), normal(20, A)
    experts = jnp.asarray(rng.integers(0, E + 1, (20, A)))  # E: none
    w = {"linear": normal(E, 8, 12), "linear_v": normal(E, 8, 12)}
    w["linear_1"] = normal(E, 12, 8)
    ours = bench.every_expert_once(x, gates, experts, w)
    np.testing.assert_allclose(
        ours, bench.WAYS["blocks"](x, gates, experts, w), rtol=1e-4, atol=1e-4
    )


def test_the_files_are_those_of_the_programs():
    """Columns agree, each study is whole, and no run stands there twice."""
    runs = program("scripts", "comparison_runs")
    bench = program("benchmarks", "training")
    with open(MEASURED / "comparisons.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == runs.COLUMNS
    keys = [tuple(line[c] for c in runs.COLUMNS[:6]) for line in lines]
    assert len(keys) == len(set(keys))
    done = runs.read()
    for study in runs.STUDIES.values():
        assert set(runs.wanted(*study)) <= set(done)
    with open(MEASURED / "throughput.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == bench.COLUMNS
    assert {line["size"] for line in lines} == set(bench.SIZES)
