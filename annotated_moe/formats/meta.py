# Generated from book/chapters/15_meta.md by `make sync`; edit the chapter.
"""Llama 3.1 405B lies in eight files of 101 GB. Each is a zip with a
pickle inside, and none holds one whole matrix: every file has an eighth
of each. This chapter reads such a folder without running the pickle and
without ever holding the model. By its end `load` understands
`params.json` beside `consolidated.00.pth`, for every Llama that Meta
has published, and models of the hub whose weights are still a
`pytorch_model.bin`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from annotated_moe.config import (
    LayerSpec,
    ModelConfig,
    Segment,
    all_places,
)
from annotated_moe.families.llama import (
    CODE_LLAMA,
    LLAMA_1,
    LLAMA_2,
    LLAMA_3,
    LLAMA_3_1,
    LLAMAS,
    llama_config,
)
from annotated_moe.formats.files import (
    CheckpointError,
    list_folder,
    read_json,
)
from annotated_moe.formats.hub import (
    TRANSFORMS,
    Entry,
    Family,
    Fields,
    Found,
    WeightName,
    entries,
    stacked,
)
from annotated_moe.formats.lazy import ShardedArray, as_bytes
from annotated_moe.formats.pth import open_pth
from annotated_moe.model import flat_specs
from annotated_moe.rope import Llama3Rope, Rope

# %% book/chapters/15_meta.md, cell 44
META_ENDS = (
    WeightName("tok_embeddings.weight", "in_out_embed/embeddings"),
    WeightName("norm.weight", "rms_norm/scale"),
    WeightName("output.weight", "lm_head/embeddings"),
)
META_LAYER = (
    WeightName("attention_norm.weight", "rms_norm/scale"),
    WeightName("ffn_norm.weight", "rms_norm_2/scale"),
    *(
        WeightName(f"attention.{theirs}.weight",
                   f"multi_head_attention/{ours}/w", change)
        for theirs, ours, change in (
            ("wq", "query", "halves"), ("wk", "key", "halves"),
            ("wv", "value", "transpose"), ("wo", "linear", "transpose"),
        )
    ),
    *(
        WeightName(f"feed_forward.{theirs}.weight", f"{ours}/w",
                   "transpose")
        for theirs, ours in (
            ("w1", "linear"), ("w3", "linear_v"), ("w2", "linear_1"))
    ),
)


# %% book/chapters/15_meta.md, cell 48
def join_shares(
    entry: Entry, shares: list[np.ndarray], shape: tuple[int, ...]
) -> Any:
    """One tensor of ours, of `shape`, from each file's share of theirs.

    CheckpointError, the end of a sentence, where they do not fit.
    """
    change = TRANSFORMS[entry.transform].read
    parts = [change(w, entry.spec) for w in shares]
    size = tuple(parts[0].shape)
    cut = [
        axis for axis, (n, expected) in enumerate(zip(size, shape))
        if n != expected
    ]
    if len(size) != len(shape) or len(cut) > 1 or any(
        size[axis] * len(parts) != shape[axis] for axis in cut
    ):
        many = f" in each of {len(parts)} files" if parts[1:] else ""
        raise CheckpointError(
            f"has shape {size}{many}; the configuration expects {shape}"
        )
    if cut:
        return ShardedArray(parts, cut[0])
    if any(as_bytes(w) != as_bytes(shares[0]) for w in shares[1:]):
        raise CheckpointError(
            "is not the same in all files: they are not of one model"
        )
    return parts[0]


# %% book/chapters/15_meta.md, cell 51
def pth_files(folder: Path) -> list[Path]:
    """consolidated.00.pth and on; CheckpointError for a gap."""
    found = sorted(
        name for name in list_folder(folder)
        if name.startswith("consolidated.") and name.endswith(".pth")
    )
    wanted = [f"consolidated.{i:02d}.pth" for i in range(len(found))]
    for there, name in zip(found, wanted):
        if there != name:
            raise CheckpointError(
                f"{folder} lacks {name} but has {there}: fetch it"
            )
    return [folder / name for name in found]


def check_alike(
    files: list[Path], contents: list[dict[str, np.ndarray]]
) -> None:
    """CheckpointError unless all files hold like shares of all."""
    first = contents[0]
    for file, content in zip(files, contents):
        for name in sorted(set(first) ^ set(content)):
            lacks = file if name in first else files[0]
            raise CheckpointError(
                f"{lacks} lacks {name[:80]!r}, which other files have"
            )
        for name, w in content.items():
            like = first[name]
            if (like.shape, like.dtype) != (w.shape, w.dtype):
                raise CheckpointError(
                    f"{file}: {name[:80]!r} is {w.dtype} {w.shape}; in "
                    f"{files[0].name} it is {like.dtype} {like.shape}"
                )


# %% book/chapters/15_meta.md, cell 52
def open_shares(folder: Path) -> dict[str, list[np.ndarray]]:
    """Name -> each file's share; tables of angles are left out."""
    files = pth_files(folder)
    contents = [open_pth(file) for file in files]
    check_alike(files, contents)
    return {
        name: [content[name] for content in contents]
        for name in contents[0] if not name.endswith("rope.freqs")
    }


# %% book/chapters/15_meta.md, cell 53
def check_heads(where: Path, config: ModelConfig, files: int) -> None:
    """CheckpointError where a file would hold part of a head."""
    for place in all_places(config):
        for name in ("q_heads", "kv_heads"):
            heads = getattr(place.spec.attention, name)
            if heads % files:
                raise CheckpointError(
                    f"{where} has {files} files, which do not divide "
                    f"{name} = {heads}; Meta publishes such models "
                    "with each key head repeated and counted"
                )


# %% book/chapters/15_meta.md, cell 54
def check_tied(
    where: Path, shares: dict[str, list[np.ndarray]]
) -> None:
    """CheckpointError if a tied model's output is no copy."""
    table = shares.get("tok_embeddings.weight", [])
    output = shares.get("output.weight", table)
    if any(as_bytes(a) != as_bytes(b) for a, b in zip(table, output)):
        raise CheckpointError(
            f"{where}: output.weight is not tok_embeddings.weight, as "
            "it "
            "is in the published model of these sizes"
        )


# %% book/chapters/15_meta.md, cell 55
class MetaFamily(Family):
    """Llama 1 to 3, as Meta publishes them."""

    prefix = "layers.{layer}."
    ends: tuple[WeightName, ...] = META_ENDS

    def matches(
        self, raw: Mapping[str, Any], names: Collection[str]
    ) -> bool:
        """Whether a params.json and names of tensors are of these.

        Where only the configuration is wanted there are no names.
        """
        return True

    def layer(self, spec: LayerSpec) -> tuple[WeightName, ...]:
        return META_LAYER

    def read(self, fields: Fields) -> ModelConfig:
        return read_params(fields)


META_FAMILIES = [MetaFamily()]


def meta_family(
    raw: Mapping[str, Any], names: Collection[str] = ()
) -> MetaFamily:
    """The first that matches."""
    return next(f for f in META_FAMILIES if f.matches(raw, names))


# %% book/chapters/15_meta.md, cell 56
def read_meta(
    folder: Path, config: ModelConfig
) -> dict[tuple[str, str], Any]:
    """(module, name) -> tensor of Meta's layout, mapped from disk and
    joined lazily. CheckpointError for one missing, left over or
    misshapen.
    """
    shares = open_shares(folder)
    check_heads(folder, config, len(next(iter(shares.values()), "x")))
    family = meta_family(read_json(folder / "params.json"), shares)
    specs, used = flat_specs(config), set()
    found: dict[tuple[str, str], Found] = {}
    for entry in entries(family, config):
        if entry.name not in shares:
            raise CheckpointError(f"{folder} lacks {entry.name}")
        shape = specs[entry.path].shape[len(entry.index) :]
        try:
            w = join_shares(entry, shares[entry.name], shape)
        except CheckpointError as error:
            raise CheckpointError(
                f"{folder}: {entry.name} {error}"
            ) from None
        found.setdefault(entry.path, []).append((entry.index, w))
        used.add(entry.name)
    if config.tied:
        check_tied(folder, shares)
        used.add("output.weight")
    for name in sorted(set(shares) - used):
        raise CheckpointError(
            f"{folder} holds {name[:80]!r}, which its params.json has "
            "no place for"
        )
    return {
        path: stacked(folder, "/".join(path), parts)
        for path, parts in found.items()
    }


# %% book/chapters/15_meta.md, cell 58
def ffn_width(
    hidden: int, multiplier: float, multiple: int, share: float = 1.0
) -> int:
    """Two thirds of `hidden`, scaled, up to a multiple of `multiple`.

    Source: llama-models, `FeedForward` and, with `share`, `MoE`.
    """
    hidden = int(multiplier * int(2 * hidden / 3))
    return -(-int(hidden / share) // multiple) * multiple


def dense_width(fields: Fields) -> int:
    """The width of a block without experts."""
    return ffn_width(
        4 * fields.size("dim"),
        fields.number("ffn_dim_multiplier", 1.0),
        fields.size("multiple_of", 256),
    )


# %% book/chapters/15_meta.md, cell 61
def read_heads(fields: Fields) -> tuple[int, int, int]:
    """Query heads, key heads, and the features of one."""
    dim, heads = fields.size("dim"), fields.size("n_heads")
    size, rest = divmod(dim, heads)
    if rest:
        raise fields.error(
            "a head has dim / n_heads features, and "
            f"{dim} / {heads} is no whole number"
        )
    fields.only("head_dim", size)
    return heads, fields.size("n_kv_heads", heads), size


def read_rope_base(fields: Fields) -> float:
    """The base; its default is that of the file's generation."""
    newer = "use_scaled_rope" in fields.raw
    return fields.number("rope_theta", 500000.0 if newer else 10000.0)


# %% book/chapters/15_meta.md, cell 63
def sizes_of(config: ModelConfig) -> tuple[Any, ...]:
    """What tells published Llamas apart."""
    attention = config.layer(0).attention
    base = attention.rope and attention.rope.base
    return (
        config.d_model, config.num_layers, attention.kv_heads,
        config.norm_eps, type(attention.rope), base,
    )


def as_published(config: ModelConfig) -> ModelConfig:
    """`config` with what its file left out, where sizes are known."""
    for known in LLAMAS.values():
        if sizes_of(known) == sizes_of(config):
            break
    else:
        return config
    layer, rope = config.layer(0), known.layer(0).attention.rope
    attention = replace(layer.attention, rope=rope)
    layer = replace(layer, attention=attention)
    same = config.vocab_size == known.vocab_size
    return replace(
        config, context=known.context, tied=known.tied,
        layers=(Segment((layer,), config.num_layers),),
        eos_ids=known.eos_ids if same else config.eos_ids,
    )


# %% book/chapters/15_meta.md, cell 64
def generation_of(rope: Rope, norm_eps: float) -> dict[str, Any]:
    """What a file of such a model most likely is of."""
    if isinstance(rope, Llama3Rope):
        return LLAMA_3_1
    if rope.base == 10000.0:
        return LLAMA_1 if norm_eps == 1e-6 else LLAMA_2
    return CODE_LLAMA if rope.base == 1000000.0 else LLAMA_3


# Which tokens end a text is known to the tokenizer only.
STOPS: dict[int, tuple[int, ...]] = {128256: LLAMA_3_1["eos_ids"]}


def read_params(fields: Fields) -> ModelConfig:
    """The configuration of Llama 1 to 3."""
    base, eps = read_rope_base(fields), fields.number("norm_eps", 1e-5)
    scaled = fields.flag("use_scaled_rope")
    rope = Llama3Rope(base) if scaled else Rope(base)
    heads, kv_heads, size = read_heads(fields)
    words = fields.size("vocab_size")
    return as_published(llama_config(
        fields.size("n_layers"), heads, kv_heads, dense_width(fields),
        size, vocab_size=words, norm_eps=eps, rope=rope,
        context=generation_of(rope, eps)["context"],
        eos_ids=STOPS.get(words, (2,)),
    ))


# %% book/chapters/15_meta.md, cell 65
def count_words(folder: Path, dim: Any) -> int:
    """V, by the embedding: cut along words, or along features."""
    shares = open_shares(folder).get("tok_embeddings.weight", [])
    if not shares or shares[0].ndim != 2:
        raise CheckpointError(f"{folder} lacks tok_embeddings.weight")
    words, width = shares[0].shape
    return words * len(shares) if width == dim else words


META_INERT = frozenset(["max_batch_size", "max_seq_len"])


def meta_config(folder: Path) -> ModelConfig:
    """`params.json` as a configuration.

    Raises CheckpointError for a field that is unknown or wrong.
    """
    path = folder / "params.json"
    raw = read_json(path)
    if raw.get("vocab_size") in (None, -1):
        raw["vocab_size"] = count_words(folder, raw.get("dim"))
    fields = Fields(path, raw)
    try:
        config = meta_family(raw).read(fields)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    fields.finish(META_INERT)
    return config


# %% book/chapters/15_meta.md, cell 68
# Files of other layouts that this one leaves out: how to make them.
META_COMPANIONS: dict[str, Callable[[ModelConfig], bytes | None]] = {}


def meta_companions(config: ModelConfig) -> dict[str, bytes]:
    """Those that a model needs, by their names."""
    made = {
        name: make(config) for name, make in META_COMPANIONS.items()
    }
    return {
        name: data for name, data in made.items() if data is not None
    }


def find_meta(folder: Path, names: set[str]) -> Path | None:
    """The folder, if these are the names of Meta's files."""
    found = {"params.json", "consolidated.00.pth"} <= names
    return folder if found else None
