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

# %% book/chapters/17_vision.md, cell 1
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from annotated_moe.attention import attend
from annotated_moe.rope import rope_angles


# %% book/chapters/17_vision.md, cell 3
@dataclass(frozen=True)
class Tiling:
    """How pixels become rows for the decoder; Llama 4's way."""

    image_size: int = 336           # pixels along a side of a tile
    patch_size: int = 14            # pixels along a side of a patch
    channels: int = 3
    shuffle: int = 2                # so many patches squared: one row
    image_id: int = 200092          # the token that a row replaces

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
def read_vision(raw: Any, d_model: int, image_id: Any) -> VisionConfig:
    """A `vision_config` of Hugging Face; ValueError if unsupported."""
    raw = check_fields(raw)
    missing = sorted(set(VISION_FIELDS) - set(raw))
    if missing:
        raise ValueError(f"vision_config lacks {missing[0]!r}")
    values = {ours: raw[n] for n, ours in VISION_FIELDS.items()}
    ratio, rope = raw.get("pixel_shuffle_ratio", 0.5), rope_theta(raw)
    if type(ratio) is not float or not 0 < ratio <= 1 or 1 / ratio % 1:
        raise ValueError(f"pixel_shuffle_ratio must be 1/n: {ratio!r}")
    c = VisionConfig(
        **values, shuffle=round(1 / ratio), d_model=d_model,
        rope_base=rope, image_id=image_id,
    )
    twins = [("projector_input_dim", c.features),
             ("projector_output_dim", c.features),
             ("intermediate_size", c.width * c.shuffle**2)]
    for name, size in twins:
        if raw.get(name, size) != size:
            raise ValueError(
                f"vision_config: {name} must be {size}: {raw[name]!r}")
    return c


# %% book/chapters/17_vision.md, cell 63
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


# %% book/chapters/17_vision.md, cell 64
def rope_theta(raw: dict[str, Any]) -> Any:
    """RoPE's base, in the newer or the older spelling."""
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or rope
    if not isinstance(scaling, dict) or not isinstance(rope, dict):
        raise ValueError("vision_config: rope must be an object")
    if scaling.get("rope_type", "default") != "default":
        raise ValueError("vision_config: rope_type must be 'default'")
    return rope.get("rope_theta", raw.get("rope_theta", 10000.0))


# %% book/chapters/17_vision.md, cell 65
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


# %% book/chapters/17_vision.md, cell 66
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


# %% book/chapters/17_vision.md, cell 68
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


# %% book/chapters/17_vision.md, cell 69
def resized(
    pixels: np.ndarray, height: int, width: int
) -> np.ndarray:
    """uint8 [height, width, C], by linear interpolation.

    Where it shrinks, each pixel is a mean over all that it covers.
    """
    shape = (height, width, pixels.shape[2])
    y = jax.image.resize(
        jnp.asarray(pixels, jnp.float32), shape, "linear"
    )
    return np.asarray(jnp.clip(jnp.round(y), 0, 255)).astype(np.uint8)


# %% book/chapters/17_vision.md, cell 70
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


# %% book/chapters/17_vision.md, cell 71
def image_tiles(
    pixels: Any, c: VisionConfig, most: int = 16
) -> Float32[np.ndarray, "I C Y X"]:
    """A picture, uint8 [height, width, C], as tiles from -1 to 1.

    With more than one tile the last is the whole picture, squeezed.
    ValueError for what is no picture.
    Source: Llama 4's image processor; mean and deviation 0.5.
    """
    pixels, s = check_pixels(pixels, c), c.image_size
    height, width, channels = pixels.shape
    rows, columns = canvas(height, width, c, most)
    part = resized(pixels, *fitted(height, width, (rows, columns), s))
    full = np.zeros((rows * s, columns * s, channels), np.uint8)
    full[: part.shape[0], : part.shape[1]] = part
    tiles = full.reshape(rows, s, columns, s, channels).swapaxes(1, 2)
    tiles = tiles.reshape(-1, s, s, channels)
    if len(tiles) > 1:
        tiles = np.concatenate([tiles, resized(pixels, s, s)[None]])
    scaled = tiles.transpose(0, 3, 1, 2).astype(np.float32) / 255
    return (scaled - np.float32(0.5)) / np.float32(0.5)


# %% book/chapters/17_vision.md, cell 72
def image_text(rows: int, columns: int, c: VisionConfig) -> str:
    """What stands for an image in a prompt, in Llama 4's tokens.

    `tokenizer.encode(text, specials=True)` makes ids of it, and
    `generate_ids([ids], images=[tiles])` reads those.
    Source: Llama 4's processor, `_prompt_split_image`.
    """
    tile = "<|patch|>" * c.rows
    line = "<|tile_x_separator|>".join([tile] * columns)
    whole = f"<|image|>{tile}<|image_end|>"
    if rows * columns == 1:
        return f"<|image_start|>{whole}"
    lines = f"{line}<|tile_y_separator|>" * rows
    return f"<|image_start|>{lines}{whole}"
