# Generated from book/chapters/17_vision.md by `make sync`; edit the chapter.
"""A small photograph is 338,688 numbers, and a decoder reads none of
them: what it reads are vectors that stand where words could stand.
Llama 4 turns the photograph into 144 of those, puts them between two
words, and from there on computes as if nothing had happened. This
chapter builds what makes the 144: patches instead of pixels, attention
that knows left from right and above from below, and a shuffle that
trades places for features. By its end you will have Llama 4's image
encoder, know why a picture that is moved by a patch looks the same to
its scores, and have trained a tiny one that can tell what a bag of
patches cannot.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int, Int32, UInt8

from annotated_moe.attention import attend
from annotated_moe.rope import rope_angles
from annotated_moe.vocabularies import (
    encode_marked,
    marks,
    needed,
    parse_json,
    specials_of,
)


# %% book/chapters/17_vision.md, cell 3
@dataclass(frozen=True)
class Tiling:
    """How pixels become rows for the decoder; Llama 4's way."""

    image_size: int = 336           # pixels along a side of a tile
    patch_size: int = 14            # pixels along a side of a patch
    channels: int = 3
    shuffle: int = 2                # so many patches squared: one row
    image_id: int = 200092          # the token that a row replaces
    start_id: int = 200080          # stands before an image,
    end_id: int = 200081            # and after it

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def rows(self) -> int:
        """Rows that the decoder reads for one tile."""
        return (self.grid // self.shuffle) ** 2


# %% book/chapters/17_vision.md, cell 4
@dataclass(frozen=True)
class VisionConfig(Tiling):
    """What makes an image encoder; Llama 4's unless told otherwise.

    ValueError for numbers that no encoder can have.
    """

    width: int = 1408               # features of a patch
    layers: int = 34
    heads: int = 16                 # of width / heads features each
    d_ff: int = 5632                # hidden features of a layer
    features: int = 4096            # of a row, in the adapter
    d_model: int = 5120             # the decoder's width
    norm_eps: float = 1e-5
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        check_vision(self)

    @property
    def head_size(self) -> int:
        return self.width // self.heads


# %% book/chapters/17_vision.md, cell 5
def check_vision(c: VisionConfig) -> None:
    """ValueError for a size that is none, or that does not divide."""
    for field in fields(c):
        name, value = field.name, getattr(c, field.name)
        kinds = (int,) if field.type is int else (int, float)
        if type(value) not in kinds or not 0 < value < math.inf:
            kind = "int" if field.type is int else "number"
            raise ValueError(
                f"vision: {name} must be a positive {kind}: {value!r}"
            )
    for name, size, by, divisor in (
        ("image_size", c.image_size, "patch_size", c.patch_size),
        ("image_size / patch_size", c.grid, "shuffle", c.shuffle),
        ("width", c.width, "4 * heads", 4 * c.heads),
    ):
        if size % divisor:
            raise ValueError(
                f"vision: {by} = {divisor} must divide {name} = {size}"
            )


# %% book/chapters/17_vision.md, cell 6
def vision_config(raw: dict[str, Any]) -> VisionConfig:
    """The configuration that `dataclasses.asdict` made a dict of."""
    unknown = sorted(set(raw) - {f.name for f in fields(VisionConfig)})
    if unknown:
        raise ValueError(f"vision has no field {unknown[0][:40]!r}")
    return VisionConfig(**raw)


# %% book/chapters/17_vision.md, cell 12
def patches_of(
    tiles: Float[Array, "I C Y X"], size: int
) -> Float[Array, "I P {size*size}*C"]:
    """Squares of `size` x `size` pixels, from left to right, from the
    top down; a patch lists channel after channel, row after row.

    Source: torch.nn.Unfold, as Llama 4 uses it.
    """
    i, c, y, x = tiles.shape
    cut = tiles.reshape(i, c, y // size, size, x // size, size)
    patches = cut.transpose(0, 2, 4, 1, 3, 5)
    return patches.reshape(i, -1, c * size * size)


# %% book/chapters/17_vision.md, cell 17
Shape = tuple[int, ...]
Params = Mapping[str, Mapping[str, Any]]


def layer_shapes(c: VisionConfig) -> dict[str, Shape]:
    """Path -> shape of one layer's parameters."""
    w = c.width
    shapes: dict[str, Shape] = {}
    for name in ("norm", "norm_1"):
        shapes |= {f"{name}/scale": (w,), f"{name}/offset": (w,)}
    for name in ("query", "key", "value", "linear"):
        shapes |= {f"{name}/w": (w, w), f"{name}/b": (w,)}
    shapes |= {"up/w": (w, c.d_ff), "up/b": (c.d_ff,)}
    return shapes | {"down/w": (c.d_ff, w), "down/b": (w,)}


# %% book/chapters/17_vision.md, cell 18
def vision_shapes(c: VisionConfig) -> dict[str, Shape]:
    """Path -> shape of every parameter; layers are stacked in front."""
    w, merged = c.width, c.shuffle**2 * c.width
    layer = layer_shapes(c).items()
    shapes = {f"layer/{name}": (c.layers, *s) for name, s in layer}
    for name in ("norm_before", "norm_after"):
        shapes |= {f"{name}/scale": (w,), f"{name}/offset": (w,)}
    shapes |= {
        "patch/w": (c.channels * c.patch_size**2, w),
        "embed/class": (w,),
        "embed/positions": (c.grid**2 + 1, w),
        "adapter/linear/w": (merged, c.features),
        "adapter/linear_1/w": (c.features, c.features),
        "projection/w": (c.features, c.d_model),
    }
    return {f"vision/{name}": shape for name, shape in shapes.items()}


# %% book/chapters/17_vision.md, cell 19
def first_value(
    numbers: Float32[Array, "..."], name: str
) -> Float32[Array, "..."]:
    """A parameter before training: columns of length about 1."""
    if name in ("b", "offset"):
        return jnp.zeros_like(numbers)
    if name == "scale":
        return jnp.ones_like(numbers)
    fan = numbers.shape[-2 if name == "w" else -1]
    return numbers / fan**0.5


def vision_params(key: Array, c: VisionConfig) -> Params:
    """Random float32 parameters, module -> name -> array."""
    shapes = vision_shapes(c)
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    drawn = jax.random.normal(key, (int(ends[-1]),))    # all at once
    params: dict[str, dict[str, Array]] = {}
    for (path, shape), part in zip(
        shapes.items(), jnp.split(drawn, ends[:-1])
    ):
        module, name = path.rsplit("/", 1)
        value = first_value(part.reshape(shape), name)
        params.setdefault(module, {})[name] = value
    return params


# %% book/chapters/17_vision.md, cell 22
def layer_norm(
    x: Float[Array, "*B W"], w: Mapping[str, Any], eps: float
) -> Float32[Array, "*B W"]:
    """Mean 0 and variance 1, times `scale`, plus `offset`; float32.

    Source: Ba et al. (2016), section 3.
    """
    y = x.astype(jnp.float32)
    y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + eps)
    return y * w["scale"] + w["offset"]


# %% book/chapters/17_vision.md, cell 23
def affine(
    x: Float[Array, "*B D"], w: Mapping[str, Any]
) -> Float32[Array, "*B F"]:
    """x times `w` in `x.dtype`, plus `b` if there is one; float32."""
    matrix = w["w"].astype(x.dtype)
    y = jnp.dot(x, matrix, preferred_element_type=jnp.float32)
    return y + w["b"] if "b" in w else y


# %% book/chapters/17_vision.md, cell 24
def embed_patches(
    params: Params,
    tiles: Float[Array, "I C Y X"],
    c: VisionConfig,
    dtype: str = "float32",
) -> Float32[Array, "I T W"]:
    """Patches and, last, the class token, each with its place."""
    x = patches_of(tiles, c.patch_size).astype(dtype)
    x = affine(x, params["vision/patch"])                   # [I, P, W]
    own = params["vision/embed"]
    last = jnp.broadcast_to(own["class"], (len(x), 1, c.width))
    x = jnp.concatenate([x, last], axis=1) + own["positions"]
    return layer_norm(x, params["vision/norm_before"], c.norm_eps)


# %% book/chapters/17_vision.md, cell 26
def angles_2d(c: VisionConfig) -> Float32[Array, "T half"]:
    """Angle of each feature pair of a head, at each patch, in radians.

    The first half of the pairs turns with the column, the second with
    the row. The class token, last, has angle 0.
    Source: Llama 4, `VisionEncoder`; Heo et al. (2024), section 3.
    """
    cell = jnp.arange(c.grid**2)
    places = jnp.stack([cell % c.grid, cell // c.grid]) + 1  # [2, P]
    places = jnp.pad(places, ((0, 0), (0, 1)))              # [2, T]
    x, y = rope_angles(places, c.head_size // 2, c.rope_base)
    return jnp.concatenate([x, y], axis=-1)


# %% book/chapters/17_vision.md, cell 29
def turn(
    x: Float[Array, "I T heads H"], angles: Float32[Array, "T half"]
) -> Float32[Array, "I T heads H"]:
    """Turn the feature pairs (i, i + H/2) of `x`, in float32."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    y = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate(y, axis=-1)


# %% book/chapters/17_vision.md, cell 34
def see(
    x: Float[Array, "I T W"],
    w: Params,
    angles: Float32[Array, "T half"],
    heads: int,
) -> Float32[Array, "I T W"]:
    """Attention of every patch to every patch of its tile."""
    names = ("query", "key", "value")
    q, k, v = (
        affine(x, w[name]).reshape(*x.shape[:2], heads, -1)
        for name in names
    )
    q, k, v = (
        z.astype(x.dtype) for z in (turn(q, angles), turn(k, angles), v)
    )
    tiles, t = x.shape[:2]
    open_mask = jnp.ones((tiles, t, t), bool)
    y = attend(q, k, v, open_mask, q.shape[-1] ** -0.5)
    return affine(y.reshape(x.shape), w["linear"])


# %% book/chapters/17_vision.md, cell 35
gelu = partial(jax.nn.gelu, approximate=False)


def vision_layer(
    h: Float32[Array, "I T W"],
    w: Params,
    angles: Float32[Array, "T half"],
    c: VisionConfig,
    dtype: str = "float32",
) -> Float32[Array, "I T W"]:
    """One layer; `dtype` is that of the factors of its products."""
    x = layer_norm(h, w["norm"], c.norm_eps).astype(dtype)
    h = h + see(x, w, angles, c.heads)
    x = layer_norm(h, w["norm_1"], c.norm_eps).astype(dtype)
    up = gelu(affine(x, w["up"])).astype(dtype)             # [I, T, F]
    return h + affine(up, w["down"])


# %% book/chapters/17_vision.md, cell 36
LAYER = "vision/layer/"


def layer_stacks(params: Params) -> dict[str, Mapping[str, Any]]:
    """Module of a layer -> its parameters, stacked."""
    return {
        module.removeprefix(LAYER): leaves
        for module, leaves in params.items()
        if module.startswith(LAYER)
    }


# %% book/chapters/17_vision.md, cell 37
def encode(
    params: Params,
    tiles: Float[Array, "I C Y X"],
    c: VisionConfig,
    dtype: str = "float32",
    angles: Float32[Array, "T half"] | None = None,
) -> Float32[Array, "I T W"]:
    """What the encoder makes of each patch; the class token last.

    `angles` are `angles_2d` unless given.
    """
    turns = angles_2d(c) if angles is None else angles

    def body(h, w):
        return vision_layer(h, w, turns, c, dtype), None

    h = embed_patches(params, tiles, c, dtype)
    h, _ = jax.lax.scan(body, h, layer_stacks(params))
    return layer_norm(h, params["vision/norm_after"], c.norm_eps)


# %% book/chapters/17_vision.md, cell 39
def pixel_shuffle(
    x: Float[Array, "I P W"], side: int
) -> Float[Array, "I P/{side}**2 W*{side}**2"]:
    """Each square of `side` x `side` patches as one row of features.

    The features of the upper left patch first, then row by row.
    """
    i, p, w = x.shape
    n = math.isqrt(p) // side
    squares = x.reshape(i, n, side, n, side, w)
    rows = squares.transpose(0, 1, 3, 2, 4, 5)
    return rows.reshape(i, n * n, side * side * w)


# %% book/chapters/17_vision.md, cell 43
def adapt(
    params: Params,
    x: Float32[Array, "I P W"],
    c: VisionConfig,
    dtype: str = "float32",
) -> Float32[Array, "I R F"]:
    """Encoded patches, without class token, as rows of `features`."""
    x = pixel_shuffle(x, c.shuffle).astype(dtype)
    x = gelu(affine(x, params["vision/adapter/linear"])).astype(dtype)
    return gelu(affine(x, params["vision/adapter/linear_1"]))


# %% book/chapters/17_vision.md, cell 44
@partial(jax.jit, static_argnames=("c", "dtype"))
def image_features(
    params: Params,
    tiles: Float[Array, "I C Y X"],
    c: VisionConfig,
    dtype: str = "float32",
) -> Float32[Array, "N D"]:
    """The rows that a decoder reads for these tiles, N = I * rows.

    Source: Llama 4, `VisionEmbeddings` and `vision_projection`.
    """
    x = encode(params, tiles, c, dtype)[:, :-1]
    x = adapt(params, x, c, dtype).astype(dtype)            # [I, R, F]
    return affine(x, params["vision/projection"]).reshape(
        -1, c.d_model)


# %% book/chapters/17_vision.md, cell 46
class Seen(NamedTuple):
    """What a batch of prompts has seen."""

    features: Any                   # float32 [N, D], all images' rows
    places: Any                     # int32 [B, T], -1 for a word


def places_of(
    tokens: Int[np.ndarray, "B T"], image_id: int
) -> Int32[np.ndarray, "B T"]:
    """Which row of features stands where; in order, -1 for words."""
    here = tokens == image_id
    order = np.cumsum(here).reshape(here.shape) - 1
    return np.where(here, order, -1).astype(np.int32)


# %% book/chapters/17_vision.md, cell 47
def merge(
    h: Float[Array, "B T D"], seen: Seen
) -> Float[Array, "B T D"]:
    """`h` with the rows of images at their places.

    Source: Llama 4, `masked_scatter` of the image features.
    """
    rows = seen.features[jnp.maximum(seen.places, 0)]       # [B, T, D]
    here = seen.places[..., None] >= 0
    return jnp.where(here, rows.astype(h.dtype), h)


# %% book/chapters/17_vision.md, cell 50
def check_tiles(i: int, tiles: Any, c: VisionConfig) -> np.ndarray:
    """The tiles of prompt `i`; ValueError for another shape."""
    shape = (c.channels, c.image_size, c.image_size)
    if tiles is None:
        return np.zeros((0, *shape), np.float32)
    tiles = np.asarray(tiles)
    if tiles.shape[1:] != shape or tiles.dtype.kind != "f":
        raise ValueError(
            f"the image of prompt {i} is {tiles.dtype} of shape "
            f"{tiles.shape}; expected floats (tiles, "
            f"{', '.join(map(str, shape))}), as image_tiles makes them"
        )
    if not np.isfinite(tiles).all():
        raise ValueError(f"the image of prompt {i} is not all finite")
    return tiles.astype(np.float32)


# %% book/chapters/17_vision.md, cell 51
def check_images(
    rows: Iterable[Any], images: Any, c: VisionConfig
) -> np.ndarray:
    """All tiles of a batch, [I, C, Y, X]; ValueError if one is amiss.

    `rows` are the prompts' ids, `images` one array of tiles for each,
    or None where there is no image.
    """
    rows = [np.asarray(row) for row in rows]
    images = [None] * len(rows) if images is None else list(images)
    if len(images) != len(rows):
        raise ValueError(
            f"{len(images)} images for {len(rows)} prompts: give one "
            "array of tiles a prompt, or None where there is no image"
        )
    tiles = [check_tiles(i, image, c) for i, image in enumerate(images)]
    for i, (row, own) in enumerate(zip(rows, tiles)):
        check_count(i, row, len(own), c)
    return np.concatenate(tiles)


# %% book/chapters/17_vision.md, cell 52
def check_count(
    i: int, row: np.ndarray, tiles: int, c: VisionConfig
) -> None:
    """ValueError unless prompt `i` has a place for each row."""
    places, wanted = int((row == c.image_id).sum()), tiles * c.rows
    if places != wanted:
        raise ValueError(
            f"prompt {i} holds the image token {c.image_id} "
            f"{places} times, but its {tiles} tiles make "
            f"{wanted} rows"
        )


# %% book/chapters/17_vision.md, cell 55
HF, META = "vision_model", "vision_embeddings.vision_encoder"
VISION_MODULES: tuple[tuple[str, str, str, str], ...] = (
    (f"{HF}.class_embedding", f"{META}.class_embedding",
     "embed/class", "array"),
    (f"{HF}.positional_embedding_vlm",
     f"{META}.positional_embedding_vlm", "embed/positions", "array"),
    (f"{HF}.patch_embedding.linear", f"{META}.conv1._linear",
     "patch", "matrix"),
    (f"{HF}.layernorm_pre", f"{META}.ln_pre", "norm_before", "norm"),
    (f"{HF}.layernorm_post", f"{META}.ln_post", "norm_after", "norm"),
    (f"{HF}.vision_adapter.mlp.fc1",
     "vision_embeddings.vision_adapter.mlp.c_fc",
     "adapter/linear", "matrix"),
    (f"{HF}.vision_adapter.mlp.fc2",
     "vision_embeddings.vision_adapter.mlp.c_proj",
     "adapter/linear_1", "matrix"),
    ("multi_modal_projector.linear_1", "vision_projection",
     "projection", "matrix"),
)


# %% book/chapters/17_vision.md, cell 56
VISION_LAYER = (                                # {i}: the layer
    ("input_layernorm", "ln_1", "norm", "norm"),
    ("self_attn.q_proj", "attn.wq", "query", "turned"),
    ("self_attn.k_proj", "attn.wk", "key", "turned"),
    ("self_attn.v_proj", "attn.wv", "value", "affine"),
    ("self_attn.o_proj", "attn.wo", "linear", "affine"),
    ("post_attention_layernorm", "ln_2", "norm_1", "norm"),
    ("mlp.fc1", "mlp.c_fc", "up", "affine"),
    ("mlp.fc2", "mlp.c_proj", "down", "affine"),
)
VISION_MODULES += tuple(
    (f"{HF}.model.layers.{{i}}.{hf}",
     f"{META}.transformer.resblocks.{{i}}.{meta}",
     f"layer/{ours}", kind)
    for hf, meta, ours, kind in VISION_LAYER
)


# %% book/chapters/17_vision.md, cell 57
KINDS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "array": (("", "", "as is"),),
    "norm": ((".weight", "/scale", "as is"),
             (".bias", "/offset", "as is")),
    "matrix": ((".weight", "/w", "transpose"),),
    "affine": ((".weight", "/w", "transpose"),
               (".bias", "/b", "as is")),
    "turned": ((".weight", "/w", "image halves"),
               (".bias", "/b", "image halves")),
}


# %% book/chapters/17_vision.md, cell 58
def vision_table(meta: bool) -> tuple[tuple[str, str, str], ...]:
    """(their name, our path, transform) of every parameter."""
    return tuple(
        (names[meta] + theirs, f"vision/{path}{ours}", change)
        for *names, path, kind in VISION_MODULES
        for theirs, ours, change in KINDS[kind]
    )


VISION_HF, VISION_META = vision_table(False), vision_table(True)


# %% book/chapters/17_vision.md, cell 60
def vision_names(theirs: str, c: VisionConfig) -> list[str]:
    """The names that a row of the table stands for, layer by layer."""
    if "{i}" not in theirs:
        return [theirs]
    return [theirs.replace("{i}", str(i)) for i in range(c.layers)]


# %% book/chapters/17_vision.md, cell 61
VISION_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "channels",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "d_ff",
    "vision_output_dim": "features",
}
# `norm_eps` among them: theirs is 1e-5 whatever the file says.
VISION_IGNORED = (
    "model_type", "attention_dropout", "projector_dropout", "dtype",
    "initializer_range", "norm_eps", "vision_feature_layer",
    "torch_dtype",
)
VISION_FIXED = {
    "hidden_act": "gelu",
    "multi_modal_projector_bias": False,
    "vision_feature_select_strategy": "default",
}


# %% book/chapters/17_vision.md, cell 62
IMAGE_IDS = {                   # fields of the whole configuration
    "image_token_index": "image_id",
    "boi_token_index": "start_id",
    "eoi_token_index": "end_id",
}


# %% book/chapters/17_vision.md, cell 63
def read_vision(
    raw: Any, d_model: int, ids: Mapping[str, Any]
) -> VisionConfig:
    """A `vision_config` of Hugging Face; ValueError if unsupported.

    `ids` are the fields around it; IMAGE_IDS names three of them.
    """
    raw = check_fields(raw)
    missing = sorted(set(VISION_FIELDS) - set(raw))
    if missing:
        raise ValueError(f"vision_config lacks {missing[0]!r}")
    values = {ours: raw[n] for n, ours in VISION_FIELDS.items()}
    ratio, rope = raw.get("pixel_shuffle_ratio", 0.5), rope_theta(raw)
    if type(ratio) is not float or not 0 < ratio <= 1 or 1 / ratio % 1:
        raise ValueError(f"pixel_shuffle_ratio must be 1/n: {ratio!r}")
    values |= {o: ids[n] for n, o in IMAGE_IDS.items() if n in ids}
    c = VisionConfig(
        **values, shuffle=round(1 / ratio), d_model=d_model,
        rope_base=rope,
    )
    check_twins(raw, c)
    return c


# %% book/chapters/17_vision.md, cell 64
def check_twins(raw: Mapping[str, Any], c: VisionConfig) -> None:
    """ValueError where a size has another value by another name."""
    twins = [("projector_input_dim", c.features),
             ("projector_output_dim", c.features),
             ("intermediate_size", c.width * c.shuffle**2)]
    for name, size in twins:
        if raw.get(name, size) != size:
            raise ValueError(
                f"vision_config: {name} must be {size}: {raw[name]!r}")


# %% book/chapters/17_vision.md, cell 65
def check_fields(raw: Any) -> dict[str, Any]:
    """`raw` less what has no meaning; ValueError for the unknown."""
    if not isinstance(raw, dict):
        raise ValueError("vision_config must be an object")
    twins = {"projector_input_dim", "projector_output_dim",
             "pixel_shuffle_ratio", "rope_theta", "rope_scaling",
             "rope_parameters"}
    kept = {k: v for k, v in raw.items()
            if k[:1] != "_" and k not in VISION_IGNORED}
    for name, value in kept.items():
        if name not in {*VISION_FIELDS, *VISION_FIXED, *twins}:
            raise ValueError(
                f"vision_config has {name[:40]!r}, unknown")
        if VISION_FIXED.get(name, value) != value:
            raise ValueError(
                f"vision_config: {name} is {value!r}; only "
                f"{VISION_FIXED[name]!r} is supported")
    return kept


# %% book/chapters/17_vision.md, cell 66
def rope_theta(raw: dict[str, Any]) -> Any:
    """RoPE's base, in the newer or the older spelling."""
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or rope
    if not isinstance(scaling, dict) or not isinstance(rope, dict):
        raise ValueError("vision_config: rope must be an object")
    if scaling.get("rope_type", "default") != "default":
        raise ValueError("vision_config: rope_type must be 'default'")
    return rope.get("rope_theta", raw.get("rope_theta", 10000.0))


# %% book/chapters/17_vision.md, cell 67
def write_vision(c: Mapping[str, Any]) -> dict[str, Any]:
    """What `read_vision` reads, from a VisionConfig as a dict."""
    named = {name: c[ours] for name, ours in VISION_FIELDS.items()}
    rope = {"rope_theta": c["rope_base"], "rope_type": "default"}
    return {
        **named, **VISION_FIXED,
        "model_type": "llama4_vision_model",
        "pixel_shuffle_ratio": 1 / c["shuffle"],
        "projector_input_dim": c["features"],
        "projector_output_dim": c["features"],
        "norm_eps": c["norm_eps"],
        "rope_parameters": rope,
    }


# %% book/chapters/17_vision.md, cell 68
def canvas(
    height: int, width: int, c: VisionConfig, most: int = 16
) -> tuple[int, int]:
    """Rows and columns of tiles, at most `most`, for an image.

    Source: Llama 4's image processor, `get_best_fit`.
    """
    sides = range(1, most + 1)
    grids = [(r, n) for r in sides for n in sides if r * n <= most]
    sizes = np.array(grids, np.float32) * c.image_size
    scales = (sizes / np.array([height, width], np.float32)).min(-1)
    up = scales[scales >= 1]
    best = up.min() if len(up) else scales.max()
    fits = [grid for grid, s in zip(grids, scales) if s == best]
    return min(fits, key=math.prod)


# %% book/chapters/17_vision.md, cell 70
def fitted(
    height: int, width: int, grid: tuple[int, int], size: int
) -> tuple[int, int]:
    """Height and width of an image on a canvas of `grid` tiles."""
    tall, wide = (
        min(max(side, size), n * size)
        for side, n in zip((height, width), grid)
    )
    if wide / width < tall / height:
        fit = min(math.floor(height * (wide / width)), tall)
        return max(fit, 1), wide
    fit = min(math.floor(width * (tall / height)), wide)
    return tall, max(fit, 1)


# %% book/chapters/17_vision.md, cell 71
def shares(old: int, new: int) -> Float64[np.ndarray, "new old"]:
    """What each of `new` pixels takes of each of `old`."""
    scale = old / new
    centre = (np.arange(new) + 0.5) * scale
    away = np.abs(np.arange(old) + 0.5 - centre[:, None])
    w = np.maximum(1 - away / max(scale, 1), 0)
    return w / w.sum(axis=1, keepdims=True)


# %% book/chapters/17_vision.md, cell 72
def whole(
    w: Float64[np.ndarray, "new old"],
) -> tuple[Float64[np.ndarray, "new old"], int]:
    """Shares as whole numbers below 2**15, and their binary places.

    Source: PyTorch, `compute_index_ranges_int16_weights`.
    """
    places = 0
    while places < 22 and w.max() * 2 ** (places + 1) + 0.5 < 2**15:
        places += 1
    return np.floor(w * 2**places + 0.5), places


# %% book/chapters/17_vision.md, cell 73
def taps(
    w: Float64[np.ndarray, "new old"],
) -> tuple[Int[np.ndarray, "few new"], Int32[np.ndarray, "few new"]]:
    """Which old pixels each new one looks at, and their shares."""
    few = np.arange((w > 0).sum(axis=1).max())[:, None]
    index = (w > 0).argmax(axis=1) + few                    # [few, new]
    inside = np.minimum(index, w.shape[1] - 1)
    own = np.where(index == inside, w[np.arange(len(w)), inside], 0)
    return inside, own.astype(np.int32)


# %% book/chapters/17_vision.md, cell 74
def stretched(
    pixels: UInt8[np.ndarray, "..."], new: int, axis: int
) -> UInt8[np.ndarray, "..."]:
    """`pixels` with `new` of them along `axis`."""
    old = np.moveaxis(pixels, axis, -1)                     # a view
    if new == old.shape[-1]:
        return pixels
    w, places = whole(shares(old.shape[-1], new))
    sums = np.full((*old.shape[:-1], new), 2**places // 2, np.int32)
    for index, share in zip(*taps(w)):
        sums += old[..., index] * share
    levels = (sums >> places).clip(0, 255).astype(np.uint8)
    return np.moveaxis(levels, -1, axis)


# %% book/chapters/17_vision.md, cell 75
def resized(
    pixels: UInt8[np.ndarray, "y x C"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} C"]:
    """The picture in another size, by linear interpolation.

    Source: torchvision, `resize` of bytes with antialiasing.
    """
    return stretched(stretched(pixels, width, 1), height, 0)


# %% book/chapters/17_vision.md, cell 79
def check_pixels(pixels: Any, c: VisionConfig) -> np.ndarray:
    """`pixels` as an array; ValueError if it is no picture."""
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            f"an image is uint8 [height, width, {c.channels}], not "
            f"{pixels.dtype} of shape {pixels.shape}"
        )
    if pixels.shape[2] != c.channels or 0 in pixels.shape:
        raise ValueError(
            f"an image of shape {pixels.shape} has not {c.channels} "
            "channels of at least one pixel: convert it, to RGB say"
        )
    return pixels


# %% book/chapters/17_vision.md, cell 80
@dataclass(frozen=True)
class ImageSettings:
    """How a picture becomes tiles; Llama 4's unless told otherwise."""

    most: int = 16                          # tiles of a canvas
    factor: float = 1 / 255                 # to which levels are scaled
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    deviation: tuple[float, ...] = (0.5, 0.5, 0.5)


# %% book/chapters/17_vision.md, cell 81
def normalized(
    levels: UInt8[np.ndarray, "I C Y X"], how: ImageSettings
) -> Float32[np.ndarray, "I C Y X"]:
    """Levels as numbers around 0, each step rounded to bfloat16.

    Source: Llama 4's image processor, `rescale_and_normalize`.
    """
    x = levels * np.float32(how.factor)
    mean, deviation = (
        np.array(z, np.float32)[:, None, None].astype(jnp.bfloat16)
        for z in (how.mean, how.deviation)
    )
    x = (x.astype(jnp.bfloat16) - mean) / deviation
    return x.astype(np.float32)


# %% book/chapters/17_vision.md, cell 83
def cut(
    pixels: UInt8[np.ndarray, "y x C"], size: int
) -> UInt8[np.ndarray, "I C {size} {size}"]:
    """Tiles from left to right, from the top down."""
    height, width, c = pixels.shape
    rows, columns = height // size, width // size
    tiles = pixels.reshape(rows, size, columns, size, c)
    return tiles.transpose(0, 2, 4, 1, 3).reshape(-1, c, size, size)


# %% book/chapters/17_vision.md, cell 84
def image_tiles(
    pixels: Any, c: VisionConfig, how: ImageSettings = ImageSettings()
) -> Float32[np.ndarray, "I C Y X"]:
    """A picture, uint8 [height, width, C], as tiles from -1 to 1.

    With more than one tile the last is the whole picture, squeezed.
    ValueError for what is no picture.
    Source: Llama 4's image processor.
    """
    pixels, s = check_pixels(pixels, c), c.image_size
    height, width, channels = pixels.shape
    grid = canvas(height, width, c, how.most)
    part = resized(pixels, *fitted(height, width, grid, s))
    full = np.zeros((grid[0] * s, grid[1] * s, channels), np.uint8)
    full[: part.shape[0], : part.shape[1]] = part
    tiles = cut(full, s)
    if len(tiles) > 1:
        tiles = np.concatenate([tiles, cut(resized(pixels, s, s), s)])
    return normalized(tiles, how)


# %% book/chapters/17_vision.md, cell 85
def image_text(rows: int, columns: int, c: VisionConfig) -> str:
    """What stands for an image in a prompt, in Llama 4's tokens.

    Source: Llama 4's processor, `_prompt_split_image`.
    """
    tile = "<|patch|>" * c.rows
    line = "<|tile_x_separator|>".join([tile] * columns)
    whole = f"<|image|>{tile}<|image_end|>"
    if rows * columns == 1:
        return f"<|image_start|>{whole}"
    lines = f"{line}<|tile_y_separator|>" * rows
    return f"<|image_start|>{lines}{whole}"


# %% book/chapters/17_vision.md, cell 89
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
IMAGE_FIELDS = ("size", "image_mean", "image_std", "max_patches",
                "rescale_factor")


# %% book/chapters/17_vision.md, cell 90
IMAGE_FIXED = {
    "do_resize": True, "do_rescale": True, "do_normalize": True,
    "resample": 2, "resize_to_max_canvas": False,   # 2: linear
    "do_center_crop": False, "do_pad": False,
    "image_processor_type": "Llama4ImageProcessor",
}


# %% book/chapters/17_vision.md, cell 91
IMAGE_IGNORED = (
    "processor_class", "data_format", "default_to_square", "device",
    "do_convert_rgb", "input_data_format", "return_tensors",
    "disable_grouping",
)


# %% book/chapters/17_vision.md, cell 92
def preprocessor_config(c: VisionConfig) -> dict[str, Any]:
    """Llama 4's, as Hugging Face's layout has it in a file."""
    size = {"height": c.image_size, "width": c.image_size}
    own = ImageSettings()
    return {
        "image_processor_type": "Llama4ImageProcessor",
        "do_resize": True, "size": size, "resample": 2,
        "max_patches": own.most, "resize_to_max_canvas": False,
        "do_rescale": True, "rescale_factor": own.factor,
        "do_normalize": True, "image_mean": list(own.mean),
        "image_std": list(own.deviation),
    }


# %% book/chapters/17_vision.md, cell 93
def image_object(
    files: Mapping[str, bytes], c: VisionConfig
) -> dict[str, Any]:
    """The settings among the files beside a tokenizer, less nulls."""
    found = {
        name: parse_json(files[name], repr(name), "a JSON object")
        for name in IMAGE_FILES if name in files
    }
    processor = found.get("processor_config.json", {})
    check_processor(processor, c)
    own = found.get("preprocessor_config.json")
    raw = processor.get("image_processor", own)
    if not isinstance(raw, dict):
        raise ValueError(
            "no preprocessor_config.json beside the tokenizer says how "
            "an image is prepared: copy it from the model's release, "
            "or give generate_ids tiles that are ready"
        )
    return {k: v for k, v in raw.items() if v is not None}


# %% book/chapters/17_vision.md, cell 94
MARKS = marks("image_start image image_end patch tile_x_separator "
              "tile_y_separator")
START, IMAGE, END, PATCH, NEXT, LINE = MARKS


# %% book/chapters/17_vision.md, cell 95
PROCESSOR_MARKS = {
    "start_of_image_token": START, "end_of_image_token": END,
    "image_token": IMAGE, "fake_image_token": IMAGE,
    "patch_token": PATCH, "tile_x_separator_token": NEXT,
    "tile_y_separator_token": LINE,
}


# %% book/chapters/17_vision.md, cell 96
def check_processor(raw: Mapping[str, Any], c: VisionConfig) -> None:
    """ValueError if marks are called otherwise, or otherwise many."""
    counts = {"patch_size": c.patch_size,
              "pixel_shuffle_ratio": 1 / c.shuffle}
    for name, value in {**PROCESSOR_MARKS, **counts}.items():
        if raw.get(name, value) != value:
            raise ValueError(
                f"processor_config.json: {name} is {raw[name]!r}; "
                f"only {value!r} is supported"
            )


# %% book/chapters/17_vision.md, cell 97
def check_settings(raw: Mapping[str, Any], c: VisionConfig) -> None:
    """ValueError for a setting that is unknown, or not ours."""
    fixed = IMAGE_FIXED | {
        "size": {"height": c.image_size, "width": c.image_size}}
    for name in sorted({*IMAGE_FIELDS} - set(raw)):
        raise ValueError(f"preprocessor_config.json lacks {name!r}")
    for name, value in raw.items():
        if name not in {*fixed, *IMAGE_FIELDS, *IMAGE_IGNORED}:
            raise ValueError(
                f"preprocessor_config.json has {name[:40]!r}, unknown")
        if name == "image_processor_type":
            value = str(value).removesuffix("Fast")
        if fixed.get(name, value) != value:
            raise ValueError(
                f"preprocessor_config.json: {name} is {value!r}; "
                f"only {fixed[name]!r} is supported")


# %% book/chapters/17_vision.md, cell 98
def positive(values: Any, count: int, name: str) -> tuple[float, ...]:
    """`count` numbers above 0, or ValueError."""
    good = isinstance(values, list) and len(values) == count
    if not good or not all(
        type(v) in (int, float) and 0 < v < math.inf for v in values
    ):
        raise ValueError(
            f"preprocessor_config.json: {name} must be {count} "
            f"positive numbers: {values!r}"
        )
    return tuple(values)


# %% book/chapters/17_vision.md, cell 99
def image_settings(
    files: Mapping[str, bytes], c: VisionConfig
) -> ImageSettings:
    """The settings beside a tokenizer; ValueError if unsupported."""
    raw = image_object(files, c)
    check_settings(raw, c)
    most, n = raw["max_patches"], c.channels
    if type(most) is not int or not 1 <= most <= 1024:
        raise ValueError(
            "preprocessor_config.json: max_patches must be a whole "
            f"number from 1 to 1024: {most!r}")
    factor = positive([raw["rescale_factor"]], 1, "rescale_factor")
    return ImageSettings(
        most, factor[0], positive(raw["image_mean"], n, "image_mean"),
        positive(raw["image_std"], n, "image_std"))


# %% book/chapters/17_vision.md, cell 100
def mark_ids(
    specials: Mapping[str, int], c: VisionConfig
) -> dict[str, int]:
    """The marks' ids; ValueError if the vocabulary has not these."""
    known = {START: c.start_id, END: c.end_id, PATCH: c.image_id}
    for mark in MARKS:
        if mark not in specials:
            raise ValueError(
                f"the tokenizer has no {mark!r}: give generate_ids "
                "ids and tiles instead of text and images"
            )
        if specials[mark] != known.get(mark, specials[mark]):
            raise ValueError(
                f"{mark} is {specials[mark]} in the tokenizer, but "
                f"{known[mark]} in the model's configuration"
            )
    return {mark: specials[mark] for mark in MARKS}


# %% book/chapters/17_vision.md, cell 101
def image_ids(
    grid: tuple[int, int], ids: Mapping[str, int], c: VisionConfig
) -> list[int]:
    """`image_text` as ids."""
    return [ids[m] for m in re.findall(r"<.*?>", image_text(*grid, c))]


# %% book/chapters/17_vision.md, cell 102
def place_images(
    prompt: list[int], images: list[Any], ids: Mapping[str, int],
    how: ImageSettings, c: VisionConfig,
) -> tuple[list[int], Float32[np.ndarray, "I C Y X"]]:
    """The prompt with its images written out, and all their tiles."""
    count, waiting = prompt.count(ids[IMAGE]), iter(images)
    if count != len(images):
        raise ValueError(
            f"{count} times {IMAGE} in the prompt, for {len(images)} "
            "images: it stands for one; in a chat, the template has "
            "to write it"
        )
    new: list[int] = []
    tiles = [np.zeros((0, c.channels, c.image_size, c.image_size),
                      np.float32)]
    for token in prompt:
        if token != ids[IMAGE]:
            new.append(token)
            continue
        pixels = check_pixels(next(waiting), c)
        tiles.append(image_tiles(pixels, c, how))
        height, width, _ = pixels.shape
        grid = canvas(height, width, c, how.most)
        new += image_ids(grid, ids, c)
    return new, np.concatenate(tiles)


# %% book/chapters/17_vision.md, cell 103
def read_prompt(
    prompt: Any, images: list[Any], words: Any, c: VisionConfig
) -> tuple[list[int], Float32[np.ndarray, "I C Y X"]]:
    """Ids and tiles of a text, or of ids, with images.

    `words` is a Tokenizer. ValueError if something does not fit.
    """
    ids = mark_ids(specials_of(words.processor), c)
    if isinstance(prompt, str):
        mark = {IMAGE: ids[IMAGE]}
        prompt = encode_marked(prompt, mark, words.encode)
    how = image_settings(words.beside, c)
    return place_images(list(prompt), images, ids, how, c)


# %% book/chapters/17_vision.md, cell 104
def read_image(
    path: str | os.PathLike[str],
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture in a file; ValueError if it cannot be read."""
    library = needed("PIL.Image", "an image file", "images")
    turned = needed("PIL.ImageOps", "an image file", "images")
    try:
        with library.open(path) as file:
            picture = turned.exif_transpose(file)
            return np.asarray(opaque(picture, library))
    except (OSError, ValueError, SyntaxError,
            library.DecompressionBombError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} cannot be read as an image: {error}"
        ) from None


# %% book/chapters/17_vision.md, cell 105
def opaque(picture: Any, library: Any) -> Any:
    """The picture in RGB, on white where one sees through it."""
    clear = "A" in picture.getbands() or "transparency" in picture.info
    if not clear:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = library.new("RGBA", picture.size, "white")
    return library.alpha_composite(white, picture).convert("RGB")
