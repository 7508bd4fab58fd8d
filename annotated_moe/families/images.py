# Generated from book/chapters/17b_pictures.md, book/chapters/93_images.md by `make sync`; edit the chapters.
"""The encoder of the last chapter sees 336 x 336 pixels, and no
photograph has that size. Squeezed into it, a page of print becomes
grey; cut into squares, it falls apart unless the prompt says how the
squares lie. This chapter does to a picture what was done to those that
Llama 4 was trained on, to the bit: it is laid on a grid of tiles,
resized as an image library resizes, and written out in the prompt
between two tokens. By its end you will have a model to which you can
show a photograph of any size and ask what is on it.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Float64, Int, Int32, UInt8

from annotated_moe.specs import Positive, Size, Spec
from annotated_moe.tokenizer import Tokenizer, needed, split_at


# %% book/chapters/17b_pictures.md, cell 5
def best_grid(
    height: int, width: int, image_size: int, max_tiles: int = 16
) -> tuple[int, int]:
    """Lines and columns of tiles, at most `max_tiles`, for a picture.

    `height` and `width` of the picture and `image_size`, a tile's
    side, are in pixels.
    Source: Llama 4's image processor, `get_best_fit`.
    """
    sides = range(1, max_tiles + 1)
    grids = [(y, x) for y in sides for x in sides if y * x <= max_tiles]
    sizes = np.array(grids, np.float32) * image_size
    scales = (sizes / np.array([height, width], np.float32)).min(-1)
    up = scales[scales >= 1]
    best = up.min() if len(up) else scales.max()
    fits = [grid for grid, scale in zip(grids, scales) if scale == best]
    return min(fits, key=math.prod)


# %% book/chapters/17b_pictures.md, cell 9
def size_on_grid(
    height: int, width: int, grid: tuple[int, int], image_size: int
) -> tuple[int, int]:
    """Height and width, in pixels, that a picture has on a grid."""
    most_y, most_x = (
        min(max(side, image_size), tiles * image_size)
        for side, tiles in zip((height, width), grid)
    )
    if most_x / width < most_y / height:
        fit = min(math.floor(height * (most_x / width)), most_y)
        return max(fit, 1), most_x
    fit = min(math.floor(width * (most_y / height)), most_x)
    return most_y, max(fit, 1)


# %% book/chapters/17b_pictures.md, cell 10
def interpolation_weights(
    old: int, new: int
) -> Float64[np.ndarray, "new old"]:
    """How much each of `new` pixels takes of each of `old`.

    Those of one new pixel add up to 1.
    """
    scale = old / new
    centre = (np.arange(new) + 0.5) * scale
    distance = np.abs(np.arange(old) + 0.5 - centre[:, None])
    w = np.maximum(1 - distance / max(scale, 1), 0)
    return w / w.sum(axis=1, keepdims=True)


# %% book/chapters/17b_pictures.md, cell 12
def fixed_point(
    w: Float64[np.ndarray, "new old"],
) -> tuple[Int32[np.ndarray, "new old"], int]:
    """Weights times 2**bits, as whole numbers below 2**15; and bits.

    `bits` is as large as that allows, at most 22.
    Source: PyTorch, `compute_index_ranges_int16_weights`.
    """
    bits = 0
    while bits < 22 and w.max() * 2 ** (bits + 1) + 0.5 < 2**15:
        bits += 1
    return np.floor(w * 2**bits + 0.5).astype(np.int32), bits


# %% book/chapters/17b_pictures.md, cell 14
def nonzero_weights(
    w: Int32[np.ndarray, "new old"],
) -> tuple[Int[np.ndarray, "few new"], Int32[np.ndarray, "few new"]]:
    """Which old pixels each new one takes, and how much of each.

    They stand side by side; a new pixel with fewer of them than
    another takes nothing of the rest.
    """
    few = np.arange((w > 0).sum(axis=1).max())[:, None]
    index = (w > 0).argmax(axis=1) + few                    # [few, new]
    inside = np.minimum(index, w.shape[1] - 1)
    own = np.where(index == inside, w[np.arange(len(w)), inside], 0)
    return inside, own


# %% book/chapters/17b_pictures.md, cell 17
def resize_axis(
    pixels: UInt8[np.ndarray, "..."], new: int, axis: int
) -> UInt8[np.ndarray, "..."]:
    """`pixels` with `new` of them along `axis`."""
    old = np.moveaxis(pixels, axis, -1)                     # a view
    if new == old.shape[-1]:
        return pixels
    w, bits = fixed_point(interpolation_weights(old.shape[-1], new))
    half = 2**bits // 2                                     # rounds
    sums = np.full((*old.shape[:-1], new), half, np.int32)
    for index, weight in zip(*nonzero_weights(w)):
        sums += old[..., index] * weight
    levels = (sums >> bits).clip(0, 255).astype(np.uint8)
    return np.moveaxis(levels, -1, axis)


# %% book/chapters/17b_pictures.md, cell 18
def resize(
    pixels: UInt8[np.ndarray, "y x C"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} C"]:
    """The picture in another size, by linear interpolation.

    Source: torchvision, `resize` of bytes with antialiasing.
    """
    return resize_axis(resize_axis(pixels, width, 1), height, 0)


# %% book/chapters/17b_pictures.md, cell 22
@dataclass(frozen=True)
class ImageSettings(Spec):
    """How a picture becomes tiles; Llama 4's unless told otherwise."""

    image_size: Size = 336                  # pixels, a tile's side
    max_tiles: Size = 16                    # of a grid
    rescale_factor: Positive = 1 / 255      # of the levels 0 to 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)       # one a channel
    std: tuple[Positive, ...] = (0.5, 0.5, 0.5)

    def check(self) -> None:
        if self.max_tiles > 1024:
            raise ValueError(
                f"max_tiles must be at most 1024: {self.max_tiles}"
            )
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError("mean and std need a number a channel")


# %% book/chapters/17b_pictures.md, cell 23
def normalize(
    levels: UInt8[np.ndarray, "I C Y X"], settings: ImageSettings
) -> Float32[np.ndarray, "I C Y X"]:
    """Levels as numbers around 0, each step rounded to bfloat16.

    Source: Llama 4's image processor, `rescale_and_normalize`.
    """
    x = levels * np.float32(settings.rescale_factor)
    mean, std = (
        np.array(z, np.float32)[:, None, None].astype(jnp.bfloat16)
        for z in (settings.mean, settings.std)
    )
    x = (x.astype(jnp.bfloat16) - mean) / std
    return x.astype(np.float32)


# %% book/chapters/17b_pictures.md, cell 26
def check_pixels(pixels: Any, channels: int) -> np.ndarray:
    """`pixels` as an array; ValueError if it is no picture."""
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            f"an image is uint8 [height, width, {channels}], not "
            f"{pixels.dtype} of shape {pixels.shape}"
        )
    if pixels.shape[2] != channels or 0 in pixels.shape:
        raise ValueError(
            f"an image of shape {pixels.shape} has not {channels} "
            "channels of at least one pixel: convert it, to RGB say"
        )
    return pixels


# %% book/chapters/17b_pictures.md, cell 27
def cut_tiles(
    pixels: UInt8[np.ndarray, "y x C"], size: int
) -> UInt8[np.ndarray, "I C {size} {size}"]:
    """Tiles from left to right, from the top down."""
    height, width, c = pixels.shape
    lines, columns = height // size, width // size
    tiles = pixels.reshape(lines, size, columns, size, c)
    return tiles.transpose(0, 2, 4, 1, 3).reshape(-1, c, size, size)


# %% book/chapters/17b_pictures.md, cell 28
def image_tiles(
    pixels: Any, settings: ImageSettings = ImageSettings()
) -> Float32[np.ndarray, "I C Y X"]:
    """A picture, uint8 [height, width, C], as tiles from -1 to 1.

    With more than one tile the last is the whole picture, squeezed.
    ValueError for what is no picture.
    Source: Llama 4's image processor.
    """
    pixels = check_pixels(pixels, len(settings.mean))
    (height, width, c), s = pixels.shape, settings.image_size
    grid = best_grid(height, width, s, settings.max_tiles)
    part = resize(pixels, *size_on_grid(height, width, grid, s))
    canvas = np.zeros((grid[0] * s, grid[1] * s, c), np.uint8)
    canvas[: part.shape[0], : part.shape[1]] = part
    tiles = cut_tiles(canvas, s)
    if len(tiles) > 1:
        squeezed = cut_tiles(resize(pixels, s, s), s)
        tiles = np.concatenate([tiles, squeezed])
    return normalize(tiles, settings)


# %% book/chapters/17b_pictures.md, cell 32
IMAGE, PATCH = "<|image|>", "<|patch|>"
START, END = "<|image_start|>", "<|image_end|>"
NEXT_COLUMN, NEXT_LINE = "<|tile_x_separator|>", "<|tile_y_separator|>"
MARKS = START, IMAGE, END, PATCH, NEXT_COLUMN, NEXT_LINE


# %% book/chapters/17b_pictures.md, cell 33
def image_marks(grid: tuple[int, int], patches: int) -> list[str]:
    """What stands for a picture in a prompt, in Llama 4's tokens.

    `patches` is how many embeddings a tile becomes.
    Source: Llama 4's processor, `_prompt_split_image`.
    """
    lines, columns = grid
    tile = [PATCH] * patches
    if lines * columns == 1:
        return [START, IMAGE, *tile, END]
    line = [*tile, *[NEXT_COLUMN, *tile] * (columns - 1), NEXT_LINE]
    return [START, *line * lines, IMAGE, *tile, END]


# %% book/chapters/17b_pictures.md, cell 36
def mark_ids(
    specials: Mapping[str, int], known: Mapping[str, int]
) -> dict[str, int]:
    """The ids of MARKS in a tokenizer, given its special strings.

    ValueError if one is missing, or has another id than is `known`.
    """
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


# %% book/chapters/17b_pictures.md, cell 37
def encode_with_images(
    text: str, tokenizer: Tokenizer, image_id: int,
    add_bos: bool | None = None,
) -> list[int]:
    """Ids of a prompt in which each `<|image|>` is the one `image_id`.

    All other special strings are text. `add_bos`: as for `generate`.
    """
    first, *rest = split_at(text, [IMAGE])
    ids = tokenizer.encode_prompt(first, add_bos)
    for part in rest:
        ids += [image_id] if part == IMAGE else tokenizer.encode(part)
    return ids


# %% book/chapters/17b_pictures.md, cell 38
def expand_images(
    prompt: list[int], images: list[Any], ids: Mapping[str, int],
    settings: ImageSettings, patches: int,
) -> tuple[list[int], Float32[np.ndarray, "I C Y X"]]:
    """The prompt with its images written out, and all their tiles.

    `ids` are those of MARKS; `patches` is how many embeddings a tile
    becomes. ValueError unless there is an `<|image|>` for each image.
    """
    count, waiting = prompt.count(ids[IMAGE]), iter(images)
    if count != len(images):
        raise ValueError(
            f"{count} times {IMAGE} in the prompt, for {len(images)} "
            "images: it stands for one; in a chat, the template has "
            "to write it"
        )
    new: list[int] = []
    size, channels = settings.image_size, len(settings.mean)
    tiles = [np.zeros((0, channels, size, size), np.float32)]
    for token in prompt:
        if token != ids[IMAGE]:
            new.append(token)
            continue
        pixels = check_pixels(next(waiting), channels)
        tiles.append(image_tiles(pixels, settings))
        height, width, _ = pixels.shape
        grid = best_grid(height, width, size, settings.max_tiles)
        new += [ids[mark] for mark in image_marks(grid, patches)]
    return new, np.concatenate(tiles)


# %% book/chapters/93_images.md, cell 6
def read_image(
    path: str | os.PathLike[str],
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture in a file; ValueError if it cannot be read."""
    library = needed("PIL.Image", "an image file", "images")
    operations = needed("PIL.ImageOps", "an image file", "images")
    try:
        with library.open(path) as file:
            picture = operations.exif_transpose(file)
            return np.asarray(on_white(picture, library))
    except (OSError, ValueError, SyntaxError,
            library.DecompressionBombError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} cannot be read as an image: {error}"
        ) from None


# %% book/chapters/93_images.md, cell 7
def on_white(picture: Any, library: Any) -> Any:
    """The picture in RGB, on white where one sees through it."""
    clear = "A" in picture.getbands() or "transparency" in picture.info
    if not clear:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = library.new("RGBA", picture.size, "white")
    return library.alpha_composite(white, picture).convert("RGB")
