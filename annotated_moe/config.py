# Generated from book/chapters/07b_layer.md by `make sync`; edit the chapter.
"""A model as plain data: sizes of the whole, and a list of layers.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from annotated_moe.attention import AttentionSpec
from annotated_moe.moe import FeedForwardSpec, MoESpec
from annotated_moe.specs import OneOf, Positive, Range, Size, Spec


# %% book/chapters/07b_layer.md, cell 3
@dataclass(frozen=True)
class LayerSpec(Spec):
    """One layer: attention, then a feed-forward network or experts."""

    attention: AttentionSpec
    feed_forward: FeedForwardSpec | MoESpec
    norm_eps: Positive = 1e-5               # of its norms
    post_norm: bool = False                 # a norm after each part too


# %% book/chapters/07b_layer.md, cell 4
@dataclass(frozen=True)
class Segment(Spec):
    """A run of layers: a pattern, so many times."""

    pattern: tuple[LayerSpec, ...]
    repeats: Size

    def check(self) -> None:
        if not self.pattern:
            raise ValueError("a segment needs a layer in its pattern")


# %% book/chapters/07b_layer.md, cell 5
DTYPES = {"float32": 4, "bfloat16": 2}      # bytes a number
TokenId = Annotated[int, Range(0)]


# %% book/chapters/07b_layer.md, cell 6
@dataclass(frozen=True)
class ModelConfig(Spec):
    """A decoder: sizes of the whole, and its layers."""

    vocab_size: Size                        # tokens, or a few more
    context: Size                           # tokens a row may hold
    d_model: Size                           # D: features of a token
    layers: tuple[Segment, ...]
    embedding_multiplier: Positive = 1.0
    output_multiplier: Positive = 1.0
    norm_eps: Positive = 1e-5               # of the last norm
    tied: bool = False                      # embedding = output matrix
    pad_id: TokenId = 0                     # fills rows, unread
    eos_ids: tuple[TokenId, ...] = ()       # each ends a text
    dtype: Annotated[str, OneOf(DTYPES)] = "bfloat16"   # of products

    def check(self) -> None:
        if not self.layers:
            raise ValueError("a model needs at least one layer")
        ids = {"pad_id": (self.pad_id,), "eos_ids": self.eos_ids}
        for name, some in ids.items():
            if any(i >= self.vocab_size for i in some):
                raise ValueError(
                    f"{name} {some} is beyond vocab_size="
                    f"{self.vocab_size}"
                )

    @property
    def num_layers(self) -> int:
        return sum(len(s.pattern) * s.repeats for s in self.layers)

    def layer(self, i: int) -> LayerSpec:
        """What layer `i` is."""
        place, _ = place_of(self, i)
        return place.spec

    def other_parameters(self) -> None:
        """Asks for the parameters of what a model has besides."""

    def merge(self, h: Any, inputs: Any) -> Any:
        """Embedded tokens with what else a prompt holds among them."""
        raise ValueError("this model reads tokens and nothing else")


# %% book/chapters/07b_layer.md, cell 10
class Place(NamedTuple):
    """A place in a pattern, and the layers that are made like it.

    Their weights lie behind one another in stacks, in modules whose
    names begin with `name`.
    """

    name: str
    spec: LayerSpec
    layers: range


@functools.cache
def segments(config: ModelConfig) -> tuple[tuple[Place, ...], ...]:
    """The places of each segment's pattern, in order."""
    found, first, count = [], 0, 0
    for segment in config.layers:
        step = len(segment.pattern)
        end = first + step * segment.repeats
        places = []
        for i, spec in enumerate(segment.pattern):
            name = "decoder_layer" + (f"_{count}" if count else "")
            layers = range(first + i, end, step)
            places.append(Place(name, spec, layers))
            count += 1
        found.append(tuple(places))
        first = end
    return tuple(found)


# %% book/chapters/07b_layer.md, cell 11
def all_places(config: ModelConfig) -> tuple[Place, ...]:
    """The places of all segments, in order."""
    return sum(segments(config), ())


def place_of(config: ModelConfig, layer: int) -> tuple[Place, int]:
    """The place that a layer has, and its index in the stacks."""
    for place in all_places(config):
        if layer in place.layers:
            return place, place.layers.index(layer)
    raise ValueError(f"no layer {layer} of {config.num_layers}")


# %% book/chapters/07b_layer.md, cell 12
def as_segments(layers: Sequence[LayerSpec]) -> tuple[Segment, ...]:
    """Layers as the shortest pattern that repeats, or as runs."""
    n, layers = len(layers), tuple(layers)
    for step in range(1, n):
        if n % step == 0 and layers[step:] == layers[:-step]:
            return (Segment(layers[:step], n // step),)
    runs: list[list[LayerSpec]] = []
    for spec in layers:
        if runs and runs[-1][0] == spec:
            runs[-1].append(spec)
        else:
            runs.append([spec])
    return tuple(Segment((run[0],), len(run)) for run in runs)
