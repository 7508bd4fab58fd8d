# Generated from book/chapters/17_vision.md, book/chapters/17b_pictures.md, book/chapters/93_images.md by `make sync`; edit the chapters.
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

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from annotated_moe.attention import attend
from annotated_moe.config import LayerSpec, ModelConfig, TokenId
from annotated_moe.families.images import (
    END,
    IMAGE,
    NEXT_COLUMN,
    NEXT_LINE,
    PATCH,
    START,
    ImageSettings,
    encode_with_images,
    expand_images,
    mark_ids,
)
from annotated_moe.formats.files import CheckpointError, parse_json
from annotated_moe.formats.hub import (
    TRANSFORMS,
    Family,
    Fields,
    HalvesFromPairs,
    PairsFromHalves,
    WeightName,
    WeightTransform,
    read_rope,
    write_rope,
)
from annotated_moe.generate import MODEL_CLASSES, Model, Rows, pad_rows
from annotated_moe.model import Params
from annotated_moe.params import get_parameter
from annotated_moe.rope import Rope, rope_angles
from annotated_moe.specs import Positive, Size, Spec
from annotated_moe.tokenizer import COMPANIONS


# %% book/chapters/17_vision.md, cell 3
@dataclass(frozen=True)
class VisionSpec(Spec):
    """An image encoder; Llama 4's unless told otherwise."""

    image_size: Size = 336          # pixels along a side of a tile
    patch_size: Size = 14           # pixels along a side of a patch
    channels: Size = 3
    width: Size = 1408              # features of a patch
    layers: Size = 34
    heads: Size = 16                # of width / heads features each
    d_ff: Size = 5632               # hidden features of a layer
    shuffle: Size = 2               # so many patches squared become one
    adapter_width: Size = 4096
    d_model: Size = 5120            # the decoder's width
    norm_eps: Positive = 1e-5
    rope_base: Positive = 10000.0
    image_id: TokenId = 200092      # where an embedding will stand
    start_id: TokenId = 200080      # stands before an image,
    end_id: TokenId = 200081        # and after it

    def check(self) -> None:
        size, side, width = self.image_size, self.side, self.width
        for name, whole, by, part in (
            ("image_size", size, "patch_size", self.patch_size),
            ("image_size / patch_size", side, "shuffle", self.shuffle),
            ("width", width, "4 * heads", 4 * self.heads),
        ):
            if whole % part:
                raise ValueError(
                    f"vision: {by} = {part} must divide "
                    f"{name} = {whole}"
                )

    @property
    def side(self) -> int:
        """Patches along a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def embeddings(self) -> int:
        """What the decoder reads of one tile."""
        return (self.side // self.shuffle) ** 2

    @property
    def head_size(self) -> int:
        return self.width // self.heads


# %% book/chapters/17_vision.md, cell 9
def patches_of(
    tiles: Float[Array, "I C Y X"], size: int
) -> Float[Array, "I P {size*size}*C"]:
    """Squares of `size` x `size` pixels, from left to right, from the
    top down; a patch lists channel after channel, line after line.

    Source: torch.nn.Unfold, as Llama 4 uses it.
    """
    i, c, y, x = tiles.shape
    cut = tiles.reshape(i, c, y // size, size, x // size, size)
    patches = cut.transpose(0, 2, 4, 1, 3, 5)
    return patches.reshape(i, -1, c * size * size)


# %% book/chapters/17_vision.md, cell 14
Weights = Mapping[str, Any]


def layer_norm(
    x: Float[Array, "*B W"], w: Weights, eps: float
) -> Float32[Array, "*B W"]:
    """Mean 0 and variance 1, times `scale`, plus `offset`; float32.

    Source: Ba et al. (2016), section 3.
    """
    y = x.astype(jnp.float32)
    y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + eps)
    return y * w["scale"] + w["offset"]


# %% book/chapters/17_vision.md, cell 15
def affine(
    x: Float[Array, "*B D"], w: Weights
) -> Float32[Array, "*B F"]:
    """x times `w` in `x.dtype`, plus `b` if there is one; float32."""
    matrix = w["w"].astype(x.dtype)
    y = jnp.dot(x, matrix, preferred_element_type=jnp.float32)
    return y + w["b"] if "b" in w else y


# %% book/chapters/17_vision.md, cell 16
Stack = int | None                      # how many layers; None: one


def replicated(
    name: str, shape: tuple[int, ...], init: Any, stack: Stack = None,
    float32: bool = False,
) -> Array:
    """A parameter of which every device has all; maybe a stack."""
    above = () if stack is None else (stack,)
    axes = ("layers",) * len(above) + (None,) * len(shape)
    return get_parameter(
        name, (*above, *shape), axes, init, float32=float32
    )


# %% book/chapters/17_vision.md, cell 17
class LayerNorm(hk.Module):
    """`layer_norm` with parameters of its own."""

    def __init__(
        self, eps: float, name: str, stack: Stack = None
    ) -> None:
        super().__init__(name=name)
        self.eps, self.stack = eps, stack

    def weights(self, size: int) -> Weights:
        inits = {"scale": jnp.ones, "offset": jnp.zeros}
        return {
            name: replicated(name, (size,), init, self.stack, True)
            for name, init in inits.items()
        }

    def __call__(
        self, x: Float[Array, "*B W"]
    ) -> Float32[Array, "*B W"]:
        return layer_norm(x, self.weights(x.shape[-1]), self.eps)


# %% book/chapters/17_vision.md, cell 18
class Affine(hk.Module):
    """`affine` with parameters of its own.

    At first the columns of the matrix have a length of about 1.
    """

    def __init__(
        self, size: int, name: str, bias: bool = False,
        stack: Stack = None,
    ) -> None:
        super().__init__(name=name)
        self.size, self.bias, self.stack = size, bias, stack

    def weights(self, features: int) -> Weights:
        shape = features, self.size
        init = hk.initializers.RandomNormal(features**-0.5)
        w = replicated("w", shape, init, self.stack)
        if not self.bias:
            return {"w": w}
        b = replicated("b", shape[1:], jnp.zeros, self.stack)
        return {"w": w, "b": b}

    def __call__(
        self, x: Float[Array, "*B D"]
    ) -> Float32[Array, "*B F"]:
        return affine(x, self.weights(x.shape[-1]))


# %% book/chapters/17_vision.md, cell 19
class PatchPositions(hk.Module):
    """The class token behind the patches; a learned vector a place."""

    def __call__(
        self, x: Float32[Array, "I P W"]
    ) -> Float32[Array, "I P+1 W"]:
        i, p, w = x.shape
        init = hk.initializers.RandomNormal(w**-0.5)
        token = replicated("class", (w,), init)
        places = replicated("positions", (p + 1, w), init)
        last = jnp.broadcast_to(token, (i, 1, w))
        return jnp.concatenate([x, last], axis=1) + places


# %% book/chapters/17_vision.md, cell 20
def angles_2d(spec: VisionSpec) -> Float32[Array, "T half"]:
    """Angle of each feature pair of a head, at each patch, in radians.

    The first half of the pairs turns with the column, the second with
    the line. The class token, last, has angle 0.
    Source: Llama 4, `VisionEncoder`; Heo et al. (2024), section 3.
    """
    patch = jnp.arange(spec.side**2)
    at = jnp.stack([patch % spec.side, patch // spec.side])  # [2, P]
    at = jnp.pad(at + 1, ((0, 0), (0, 1)))                  # [2, T]
    x, y = rope_angles(at, spec.head_size // 2, spec.rope_base)
    return jnp.concatenate([x, y], axis=-1)


# %% book/chapters/17_vision.md, cell 23
def rotate(
    x: Float[Array, "I T heads H"], angles: Float32[Array, "T half"]
) -> Float32[Array, "I T heads H"]:
    """Turn the feature pairs (i, i + H/2) of `x`, in float32."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    y = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate(y, axis=-1)


# %% book/chapters/17_vision.md, cell 28
def attend_patches(
    x: Float[Array, "I T W"],
    w: Mapping[str, Weights],
    angles: Float32[Array, "T half"],
    heads: int,
) -> Float32[Array, "I T W"]:
    """Attention of every patch to every patch of its tile."""
    q, k, v = (
        affine(x, w[name]).reshape(*x.shape[:2], heads, -1)
        for name in ("query", "key", "value")
    )
    q, k = rotate(q, angles), rotate(k, angles)
    q, k, v = (z.astype(x.dtype) for z in (q, k, v))
    tiles, t = x.shape[:2]
    all_seen = jnp.ones((tiles, t, t), bool)
    y = attend(q, k, v, all_seen, q.shape[-1] ** -0.5)
    return affine(y.reshape(x.shape), w["linear"])


# %% book/chapters/17_vision.md, cell 29
gelu = partial(jax.nn.gelu, approximate=False)


def vision_layer(
    h: Float32[Array, "I T W"],
    w: Mapping[str, Weights],
    angles: Float32[Array, "T half"],
    spec: VisionSpec,
    dtype: str = "float32",
) -> Float32[Array, "I T W"]:
    """One layer; `dtype` is that of the factors of its products."""
    x = layer_norm(h, w["norm"], spec.norm_eps).astype(dtype)
    h = h + attend_patches(x, w, angles, spec.heads)
    x = layer_norm(h, w["norm_1"], spec.norm_eps).astype(dtype)
    up = gelu(affine(x, w["up"])).astype(dtype)             # [I, T, F]
    return h + affine(up, w["down"])


# %% book/chapters/17_vision.md, cell 30
class VisionLayers(hk.Module):
    """All layers: weights in stacks, `vision_layer` compiled once."""

    def __init__(
        self, spec: VisionSpec, dtype: str, name: str = "layer"
    ) -> None:
        super().__init__(name=name)
        self.spec, self.dtype = spec, dtype

    def __call__(
        self, h: Float32[Array, "I T W"],
        angles: Float32[Array, "T half"],
    ) -> Float32[Array, "I T W"]:
        spec, stack = self.spec, self.spec.layers
        width, d_ff, eps = spec.width, spec.d_ff, spec.norm_eps
        w = {
            name: LayerNorm(eps, name, stack).weights(width)
            for name in ("norm", "norm_1")
        }
        for name in ("query", "key", "value", "linear"):
            w[name] = Affine(width, name, True, stack).weights(width)
        w["up"] = Affine(d_ff, "up", True, stack).weights(width)
        w["down"] = Affine(width, "down", True, stack).weights(d_ff)

        def body(h: Array, w: Any) -> Any:
            return vision_layer(h, w, angles, spec, self.dtype), None

        return jax.lax.scan(body, h, w)[0]


# %% book/chapters/17_vision.md, cell 31
def pixel_shuffle(
    x: Float[Array, "I P W"], side: int
) -> Float[Array, "I P/{side}**2 W*{side}**2"]:
    """Each square of `side` x `side` patches as one vector.

    The features of the upper left patch first, then line by line.
    """
    i, p, w = x.shape
    n = math.isqrt(p) // side
    squares = x.reshape(i, n, side, n, side, w)
    merged = squares.transpose(0, 1, 3, 2, 4, 5)
    return merged.reshape(i, n * n, side * side * w)


# %% book/chapters/17_vision.md, cell 35
class Adapter(hk.Module):
    """Squares of encoded patches, mixed by two matrices."""

    def __init__(
        self, width: int, shuffle: int, dtype: str,
        name: str = "adapter",
    ) -> None:
        super().__init__(name=name)
        self.width, self.shuffle, self.dtype = width, shuffle, dtype

    def __call__(
        self, x: Float32[Array, "I P W"]
    ) -> Float32[Array, "I R F"]:
        x = pixel_shuffle(x, self.shuffle)
        for name in ("linear", "linear_1"):
            x = gelu(Affine(self.width, name)(x.astype(self.dtype)))
        return x


# %% book/chapters/17_vision.md, cell 36
class VisionEncoder(hk.Module):
    """Tiles to image embeddings, for a decoder to read among tokens.

    `dtype` is that of the factors of its products.
    Source: Llama 4, `VisionEmbeddings` and `vision_projection`.
    """

    def __init__(
        self, spec: VisionSpec, dtype: str = "float32",
        name: str = "vision",
    ) -> None:
        super().__init__(name=name)
        self.spec, self.dtype = spec, dtype

    @hk.name_like("__call__")
    def embed(
        self, tiles: Float[Array, "I C Y X"]
    ) -> Float32[Array, "I T W"]:
        """Patches and, last, the class token, each with its place."""
        s = self.spec
        x = patches_of(tiles, s.patch_size).astype(self.dtype)
        x = Affine(s.width, "patch")(x)                     # [I, P, W]
        x = PatchPositions("embed")(x)
        return LayerNorm(s.norm_eps, "norm_before")(x)

    @hk.name_like("__call__")
    def encode(
        self, tiles: Float[Array, "I C Y X"],
        angles: Float32[Array, "T half"] | None = None,
    ) -> Float32[Array, "I T W"]:
        """What becomes of each patch; the class token last.

        `angles` are `angles_2d` unless given.
        """
        s = self.spec
        turns = angles_2d(s) if angles is None else angles
        h = VisionLayers(s, self.dtype)(self.embed(tiles), turns)
        return LayerNorm(s.norm_eps, "norm_after")(h)

    def __call__(
        self, tiles: Float[Array, "I C Y X"]
    ) -> Float32[Array, "N D"]:
        s, x = self.spec, self.encode(tiles)[:, :-1]
        x = Adapter(s.adapter_width, s.shuffle, self.dtype)(x)
        y = Affine(s.d_model, "projection")(x.astype(self.dtype))
        return y.reshape(-1, s.d_model)


# %% book/chapters/17_vision.md, cell 39
@partial(jax.jit, static_argnames=("spec", "dtype"))
def image_embeddings(
    params: Params,
    tiles: Float[Array, "I C Y X"],
    spec: VisionSpec,
    dtype: str = "float32",
) -> Float32[Array, "N D"]:
    """What a decoder reads of these tiles, N = I * spec.embeddings.

    `params` are the encoder's, module -> name -> array.
    """
    run = hk.transform(lambda tiles: VisionEncoder(spec, dtype)(tiles))
    return run.apply(params, None, tiles)


# %% book/chapters/17_vision.md, cell 52
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ImageInputs:
    """What a batch of prompts shows, and where.

    `embeddings` is float32 [N, D], all images' one after another;
    `index` int32 [B, T] says which of them stands at a token, -1 none.
    """

    embeddings: Any
    index: Any

    def __getitem__(self, part: Any) -> "ImageInputs":
        """The same for some of the batch rows, or of their tokens."""
        return ImageInputs(self.embeddings, self.index[part])


def embedding_index(
    tokens: Int[np.ndarray, "B T"], image_id: int
) -> Int32[np.ndarray, "B T"]:
    """Which image embedding stands where; in order, -1 for none."""
    here = tokens == image_id
    order = np.cumsum(here).reshape(here.shape) - 1
    return np.where(here, order, -1).astype(np.int32)


# %% book/chapters/17_vision.md, cell 53
@dataclass(frozen=True)
class SeeingConfig(ModelConfig):
    """A decoder with an image encoder before it."""

    vision: VisionSpec = VisionSpec()

    def check(self) -> None:
        super().check()
        if self.vision.d_model != self.d_model:
            raise ValueError(
                f"vision.d_model={self.vision.d_model}, but "
                f"d_model={self.d_model}"
            )
        if self.vision.image_id >= self.vocab_size:
            raise ValueError(
                f"vision.image_id={self.vision.image_id} is beyond "
                f"vocab_size={self.vocab_size}"
            )

    def other_parameters(self) -> None:
        size = self.vision.image_size
        tile = jnp.zeros((1, self.vision.channels, size, size))
        VisionEncoder(self.vision, self.dtype)(tile)

    def merge(
        self, h: Float[Array, "B T D"], inputs: ImageInputs
    ) -> Float[Array, "B T D"]:
        """`h` with image embeddings in place of some tokens'.

        Source: Llama 4, `masked_scatter` of the image features.
        """
        found = inputs.embeddings[jnp.maximum(inputs.index, 0)]
        here = inputs.index[..., None] >= 0                 # [B, T, 1]
        return jnp.where(here, found.astype(h.dtype), h)


# %% book/chapters/17_vision.md, cell 54
def seeing(config: ModelConfig, vision: VisionSpec) -> SeeingConfig:
    """The same decoder, with an encoder before it."""
    own = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(ModelConfig)
    }
    return SeeingConfig(**own, vision=vision)


# %% book/chapters/17b_pictures.md, cell 41
def check_tiles(i: int, tiles: Any, spec: VisionSpec) -> np.ndarray:
    """The tiles of prompt `i`; ValueError for another shape."""
    shape = (spec.channels, spec.image_size, spec.image_size)
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


# %% book/chapters/17b_pictures.md, cell 42
def check_images(
    rows: Iterable[Any], images: Any, spec: VisionSpec
) -> np.ndarray:
    """All tiles of a batch, [I, C, Y, X]; ValueError if one is amiss.

    `rows` are the prompts' ids, `images` one array of tiles for each,
    or None where there is no image. A prompt must have a place for
    each embedding of its tiles.
    """
    rows = [np.asarray(row) for row in rows]
    images = [None] * len(rows) if images is None else list(images)
    if len(images) != len(rows):
        raise ValueError(
            f"{len(images)} images for {len(rows)} prompts: give one "
            "array of tiles a prompt, or None where there is no image"
        )
    tiles = [check_tiles(i, own, spec) for i, own in enumerate(images)]
    for i, (row, own) in enumerate(zip(rows, tiles)):
        places = int((row == spec.image_id).sum())
        wanted = len(own) * spec.embeddings
        if places != wanted:
            raise ValueError(
                f"prompt {i} holds the image token {spec.image_id} "
                f"{places} times, but its {len(own)} tiles make "
                f"{wanted} embeddings"
            )
    return np.concatenate(tiles)


# %% book/chapters/17b_pictures.md, cell 45
@dataclass(frozen=True, eq=False, repr=False)
class SeeingModel(Model):
    """A model in whose prompts pictures stand."""

    config: SeeingConfig

    def read_prompt(
        self, prompt: Any, images: Any = None,
        add_bos: bool | None = None,
    ) -> tuple[list[int], Any]:
        """Ids of a prompt, and tiles of its images, or None.

        Each `<|image|>` in a prompt, text or ids, stands for one of
        `images`: one array uint8 [height, width, C], or a list.
        ValueError for what does not fit.
        """
        given = [] if images is None else images
        pictures = given if isinstance(given, list | tuple) else [given]
        in_text = isinstance(prompt, str) and IMAGE in prompt
        if not pictures and not in_text:
            return super().read_prompt(prompt, None, add_bos)
        spec, tokenizer = self.config.vision, self.require_tokenizer()
        known = {
            START: spec.start_id, END: spec.end_id, PATCH: spec.image_id
        }
        ids = mark_ids(tokenizer.backend.specials, known)
        if isinstance(prompt, str):
            row = encode_with_images(
                prompt, tokenizer, ids[IMAGE], add_bos
            )
            tokenizer.check_ids(row, self.config.vocab_size)
        else:
            row, _ = super().read_prompt(prompt)
        settings = image_settings(tokenizer.companions, spec)
        return expand_images(
            row, list(pictures), ids, settings, spec.embeddings
        )

    def inputs(self, rows: Rows, width: int, tiles: Any) -> Any:
        """The image embeddings of all rows, and where they stand."""
        spec = self.config.vision
        tiles = check_images(rows, tiles, spec)
        if not len(tiles):
            return None
        with self.on_mesh():
            embeddings = image_embeddings(
                self.encoder, tiles, spec, self.config.dtype
            )
        tokens = pad_rows(rows, width, -1)
        index = embedding_index(tokens, spec.image_id)
        return ImageInputs(embeddings, index)

    @property
    def encoder(self) -> Params:
        """The parameters of the image encoder."""
        return {
            module: leaves for module, leaves in self.params.items()
            if module.startswith("vision/")
        }


MODEL_CLASSES[SeeingConfig] = SeeingModel


# %% book/chapters/17b_pictures.md, cell 49
IMAGE_FILES = ["preprocessor_config.json", "processor_config.json"]
COMPANIONS += [f for f in IMAGE_FILES if f not in COMPANIONS]


def image_fields(
    companions: Mapping[str, bytes], spec: VisionSpec
) -> Fields:
    """The fields that say how a picture is prepared.

    In the older file they stand alone, in the newer one in an object.
    """
    found: dict[str, Fields] = {}
    for name in IMAGE_FILES:
        if name in companions:
            try:
                raw = parse_json(companions[name])
            except CheckpointError as error:
                raise ValueError(f"{name!r} {error}") from None
            found[name] = Fields(Path(name), raw)
    own, around = map(found.get, IMAGE_FILES)
    if around is not None:
        check_processor(around, spec)
        own = around.inner("image_processor") or own
    if own is None:
        raise ValueError(
            "no preprocessor_config.json beside the tokenizer says how "
            "an image is prepared: copy it from the model's release, "
            "or give generate_ids tiles that are ready"
        )
    return own


# %% book/chapters/17b_pictures.md, cell 50
PROCESSOR_MARKS = {
    "start_of_image_token": START, "end_of_image_token": END,
    "image_token": IMAGE, "fake_image_token": IMAGE,
    "patch_token": PATCH, "tile_x_separator_token": NEXT_COLUMN,
    "tile_y_separator_token": NEXT_LINE,
}


def check_processor(around: Fields, spec: VisionSpec) -> None:
    """ValueError if marks are called otherwise, or otherwise many."""
    for name, mark in PROCESSOR_MARKS.items():
        around.only(name, mark)
    around.only("patch_size", spec.patch_size)
    around.only("pixel_shuffle_ratio", 1 / spec.shuffle)


# %% book/chapters/17b_pictures.md, cell 51
IMAGE_FIXED = {
    "do_resize": True, "do_rescale": True, "do_normalize": True,
    "resample": 2, "resize_to_max_canvas": False,   # 2: linear
    "do_center_crop": False, "do_pad": False,
}
IMAGE_INERT = frozenset([
    "processor_class", "data_format", "default_to_square", "device",
    "do_convert_rgb", "input_data_format", "return_tensors",
    "disable_grouping",
])
PROCESSORS = "Llama4ImageProcessor", "Llama4ImageProcessorFast"


# %% book/chapters/17b_pictures.md, cell 52
def numbers_in(
    own: Fields, name: str, count: int
) -> tuple[float, ...]:
    """`count` numbers above 0, or CheckpointError."""
    values = own.get(name)
    good = isinstance(values, list) and len(values) == count
    if not good or not all(
        type(v) in (int, float) and 0 < v < math.inf for v in values
    ):
        raise own.error(
            f"{name} must be {count} positive numbers: {values!r:.80}"
        )
    return tuple(values)


# %% book/chapters/17b_pictures.md, cell 53
def image_settings(
    companions: Mapping[str, bytes], spec: VisionSpec
) -> ImageSettings:
    """The settings beside a tokenizer; ValueError if unsupported."""
    own = image_fields(companions, spec)
    size = {"height": spec.image_size, "width": spec.image_size}
    fixed = IMAGE_FIXED | {"size": size}
    for name, value in fixed.items():
        own.only(name, value)
    own.only("image_processor_type", *PROCESSORS)
    mean, std = (
        numbers_in(own, name, spec.channels)
        for name in ("image_mean", "image_std")
    )
    settings = ImageSettings(
        spec.image_size, own.size("max_patches"),
        own.number("rescale_factor"), mean, std,
    )
    own.finish(IMAGE_INERT)
    return settings


# %% book/chapters/17b_pictures.md, cell 56
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


# %% book/chapters/17b_pictures.md, cell 57
VISION_LAYER = (
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
    (f"{HF}.model.layers.{{layer}}.{hf}",
     f"{META}.transformer.resblocks.{{layer}}.{meta}",
     f"layer/{ours}", kind)
    for hf, meta, ours, kind in VISION_LAYER
)


# %% book/chapters/17b_pictures.md, cell 58
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


# %% book/chapters/17b_pictures.md, cell 59
def vision_names(meta: bool) -> tuple[WeightName, ...]:
    """What a layout calls each parameter, Hugging Face's or Meta's."""
    return tuple(
        WeightName(names[meta] + theirs, f"vision/{path}{ours}", change)
        for *names, path, kind in VISION_MODULES
        for theirs, ours, change in KINDS[kind]
    )


VISION_HF, VISION_META = vision_names(False), vision_names(True)


# %% book/chapters/17b_pictures.md, cell 61
TRANSFORMS["image halves"] = WeightTransform(
    lambda w, config: HalvesFromPairs(w, config.vision.head_size),
    lambda w, config: PairsFromHalves(w, config.vision.head_size),
)


# %% book/chapters/17b_pictures.md, cell 63
VISION_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "channels",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "d_ff",
    "vision_output_dim": "adapter_width",
}
IMAGE_IDS = {                   # fields of the whole configuration
    "image_token_index": "image_id",
    "boi_token_index": "start_id",
    "eoi_token_index": "end_id",
}
VISION_FIXED = {
    "hidden_act": "gelu",
    "multi_modal_projector_bias": False,
    "vision_feature_select_strategy": "default",
}
# `norm_eps` among them: theirs is 1e-5 whatever the file says.
VISION_INERT = frozenset([
    "model_type", "attention_dropout", "projector_dropout", "dtype",
    "norm_eps", "torch_dtype", "initializer_range",
    "vision_feature_layer",
])


# %% book/chapters/17b_pictures.md, cell 64
def read_vision(
    fields: Fields, around: Fields, d_model: int
) -> VisionSpec:
    """The encoder that a `vision_config` describes.

    `around` are the fields beside it; IMAGE_IDS names three of them.
    """
    for name, value in VISION_FIXED.items():
        fields.only(name, value)
    ratio = fields.number("pixel_shuffle_ratio", 0.5)
    rope = read_rope(fields)
    if 1 / ratio % 1:
        raise fields.error(f"pixel_shuffle_ratio must be 1/n: {ratio}")
    if type(rope) is not Rope:
        raise fields.error("rope_type must be 'default'")
    sizes = {ours: fields.size(n) for n, ours in VISION_FIELDS.items()}
    found = {ours: around.get(n) for n, ours in IMAGE_IDS.items()}
    ids = {ours: i for ours, i in found.items() if i is not None}
    spec = VisionSpec(
        **sizes, **ids, shuffle=round(1 / ratio), d_model=d_model,
        rope_base=rope.base,
    )
    # One size, by three names.
    fields.only("projector_input_dim", spec.adapter_width)
    fields.only("projector_output_dim", spec.adapter_width)
    fields.only("intermediate_size", spec.width * spec.shuffle**2)
    fields.finish(VISION_INERT)
    return spec


# %% book/chapters/17b_pictures.md, cell 65
def write_vision(spec: VisionSpec) -> dict[str, Any]:
    """The `vision_config` that `read_vision` reads."""
    sizes = {
        name: getattr(spec, ours)
        for name, ours in VISION_FIELDS.items()
    }
    return {
        **sizes, **VISION_FIXED, **write_rope(Rope(spec.rope_base)),
        "model_type": "llama4_vision_model",
        "pixel_shuffle_ratio": 1 / spec.shuffle,
        "projector_input_dim": spec.adapter_width,
        "projector_output_dim": spec.adapter_width,
        "norm_eps": spec.norm_eps,
    }


# %% book/chapters/17b_pictures.md, cell 67
class SeeingFamily(Family):
    """A family's decoder with an image encoder before it."""

    def __init__(self, decoder: Family, model_type: str) -> None:
        self.decoder, self.model_type = decoder, model_type
        self.prefix = f"language_model.{decoder.prefix}"
        ends = [
            name._replace(theirs=f"language_model.{name.theirs}")
            for name in decoder.ends
        ]
        self.ends = (*ends, *VISION_HF)

    def layer(self, spec: LayerSpec) -> tuple[WeightName, ...]:
        return self.decoder.layer(spec)

    def read(self, fields: Fields) -> SeeingConfig:
        text = fields.inner("text_config")
        vision = fields.inner("vision_config")
        if text is None or vision is None:
            raise fields.error("needs text_config and vision_config")
        dtypes = {
            name: fields.get(name) for name in ("dtype", "torch_dtype")
        }
        fields.get("tie_word_embeddings")
        own = {
            k: v for k, v in text.raw.items() if k not in dtypes or v
        }
        text = Fields(text.where, dtypes | own)
        config = self.decoder.configure(text)
        text.finish()
        spec = read_vision(vision, fields, config.d_model)
        return seeing(config, spec)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        if not isinstance(config, SeeingConfig):
            raise ValueError("this architecture has an image encoder")
        ids = {
            name: getattr(config.vision, ours)
            for name, ours in IMAGE_IDS.items()
        }
        text = {
            "model_type": self.decoder.model_type,
            **self.decoder.write(config),
        }
        return {
            "text_config": text,
            "vision_config": write_vision(config.vision), **ids,
        }


# %% book/chapters/93_images.md, cell 11
def preprocessor_config(spec: VisionSpec) -> bytes:
    """The file that says how Llama 4's pictures are prepared.

    Meta's layout has none. Source: Llama 4's release on the hub.
    """
    settings = ImageSettings(spec.image_size)
    size = {"height": spec.image_size, "width": spec.image_size}
    return json.dumps({
        "image_processor_type": PROCESSORS[0],
        "do_resize": True, "size": size, "resample": 2,
        "max_patches": settings.max_tiles,
        "resize_to_max_canvas": False,
        "do_rescale": True, "rescale_factor": settings.rescale_factor,
        "do_normalize": True, "image_mean": list(settings.mean),
        "image_std": list(settings.std),
    }, indent=1).encode()
