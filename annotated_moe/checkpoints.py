# Generated from book/chapters/09c_layouts.md, book/chapters/14_hub.md, book/chapters/15_meta.md by `make sync`; edit the chapters.
"""Stack the weights of one matrix of Grok-1's 64 layers, and the host
holds 103 GB before the first of eight devices has its 13. And nothing
in the files says which tensor is which parameter: their order does, if
you know it. This chapter turns a folder into a model. By its end you
will have `load`, which recognises a folder, holds every tensor against
the configuration, and hands each device the bytes that it keeps and no
others; `save`, which writes all of a model or nothing; and `verify`,
which finds the one bit that changed on the way.
"""

import hashlib
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from annotated_moe.config import DTYPES, ModelConfig, all_places
from annotated_moe.formats.files import (
    CheckpointError,
    list_folder,
    other_file,
    read_json,
)
from annotated_moe.formats.grok1 import read_release, release_config
from annotated_moe.formats.hub import (
    fetch_from_hub,
    hub_config,
    read_hub,
)
from annotated_moe.formats.lazy import (
    as_bytes,
    first_not_finite,
    iter_blocks,
)
from annotated_moe.formats.meta import (
    find_meta,
    meta_companions,
    meta_config,
    read_meta,
)
from annotated_moe.formats.native import (
    FORMAT,
    flat_arrays,
    is_native,
    native_config,
    native_settings,
    read_native,
)
from annotated_moe.formats.pickles import read_pickled
from annotated_moe.formats.safetensors import (
    describe_weights,
    open_folder,
    safetensors_parts,
)
from annotated_moe.formats.writing import (
    Watcher,
    replace_folder,
    write_file,
    write_json,
)
from annotated_moe.generate import MODEL_CLASSES, Model, announce
from annotated_moe.model import Params, flat_specs
from annotated_moe.parallel import (
    MeshAxis,
    axis_size,
    check_exchange,
    fit_spec,
    group_repeats,
    partition_spec,
    weight_spec,
)
from annotated_moe.params import ParamSpec
from annotated_moe.quantization import (
    QuantizedTensor,
    cpu_has_bfloat16,
    quantize,
)
from annotated_moe.tokenizer import (
    COMPANIONS,
    FORMATS,
    Tokenizer,
    open_tokenizer,
)

# %% book/chapters/09c_layouts.md, cell 22
Tensors = dict[tuple[str, str], Any]        # by module and name
FLOATS = (np.float32, ml_dtypes.bfloat16, np.float16)


def check_scales(where: Path, name: str, w: QuantizedTensor) -> None:
    """CheckpointError unless the scales belong to the integers."""
    *lead, d, f = w.shape
    scales = tuple(w.scales.shape)
    *above, groups, out = scales if len(scales) > 1 else (0, 0)
    fits = above == lead and out == f and groups and d % groups == 0
    dtypes = (w.weight.dtype, w.scales.dtype)
    if not fits or dtypes != (np.int8, ml_dtypes.bfloat16):
        wanted = ", ".join(map(str, (*lead, "G", f)))
        raise CheckpointError(
            f"{where}: {name} is {dtypes[0]} of shape {w.shape} with "
            f"{dtypes[1]} scales of shape {scales}; expected int8, and "
            f"bfloat16 scales ({wanted}) where G divides {d}"
        )


# %% book/chapters/09c_layouts.md, cell 23
def check_tensor(
    where: Path, name: str, w: Any, spec: ParamSpec
) -> None:
    """CheckpointError unless a tensor is what a parameter must be."""
    if 0 in w.shape:
        raise CheckpointError(
            f"{where}: {name} is empty, of shape {tuple(w.shape)}: "
            "it was never written; fetch or save it again"
        )
    if tuple(w.shape) != spec.shape:
        raise CheckpointError(
            f"{where}: {name} has shape {tuple(w.shape)}; the "
            f"configuration expects {spec.shape}"
        )
    if not isinstance(w, QuantizedTensor):
        if w.dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: {name} is {w.dtype}; "
                "expected float32, bfloat16 or float16"
            )
    elif spec.matrix:
        check_scales(where, name, w)
    else:
        raise CheckpointError(f"{where}: {name} may not be quantized")


def check_tensors(
    where: Path, tensors: Tensors, config: ModelConfig
) -> None:
    """CheckpointError unless these are a model's parameters."""
    for path, spec in flat_specs(config).items():
        check_tensor(where, "/".join(path), tensors[path], spec)


# %% book/chapters/09c_layouts.md, cell 26
BYTES_READ: Counter[str] = Counter()            # by a parameter's name


def read_block(
    source: Any, index: tuple[slice, ...], name: str
) -> np.ndarray:
    """`source[index]`, the bytes it takes counted under `name`.

    CheckpointError where it holds NaN or an infinity: says at which
    index of `source`.
    """
    block = np.asarray(source[index])
    BYTES_READ[name] += block.nbytes
    if (wrong := first_not_finite(block)) is not None:
        at = [i + (s.start or 0) for i, s in zip(wrong, index)]
        raise CheckpointError(
            f"{name} holds {float(block[wrong])} at {at}, which is no "
            "weight: the file is damaged, or the training failed"
        )
    return block


# %% book/chapters/09c_layouts.md, cell 27
def on_devices(
    source: Any, spec: P, mesh: Mesh | None, dtype: Any, name: str = ""
) -> jax.Array:
    """An array of which each device reads the part that it keeps."""
    shape = tuple(source.shape)
    if mesh is None:
        whole = (slice(None),) * len(shape)
        return jnp.array(read_block(source, whole, name), dtype)
    where = NamedSharding(mesh, spec)
    indices = where.addressable_devices_indices_map(shape)
    mine: dict[Any, Any] = dict(indices)
    last, shards = None, []
    for device in sorted(mine, key=lambda d: (str(mine[d]), d.id)):
        index = mine[device]
        if index != last:
            block = read_block(source, index, name)
            # Never hand out the file's own memory: it may change.
            block = block.astype(dtype, copy=not block.flags.owndata)
        shard = jax.device_put(block, device)
        shards.append(shard.block_until_ready())
        last = index
    make = jax.make_array_from_single_device_arrays
    return make(shape, where, shards)


# %% book/chapters/09c_layouts.md, cell 30
@dataclass(frozen=True)
class RepeatedScales:
    """`source` with each row of axis -2 `times` times, not copied."""

    source: Any
    times: int

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, g, f = self.source.shape
        return (*lead, g * self.times, f)

    def __getitem__(self, index: tuple) -> np.ndarray:
        *lead, groups, columns = index
        start, stop, _ = groups.indices(self.shape[-2])
        first = start // self.times
        few = slice(first, -(-stop // self.times))
        block = np.asarray(self.source[(*lead, few, columns)])
        block = np.repeat(block, self.times, axis=-2)
        skip = start - first * self.times
        return block[..., skip : skip + stop - start, :]


# %% book/chapters/09c_layouts.md, cell 31
Stored = Callable[[QuantizedTensor, int], QuantizedTensor]
STORED: dict[str, Stored] = {}          # backend -> how it stores them


def place_quantized(
    name: str, w: QuantizedTensor, spec: P, mesh: Mesh | None,
    store: Stored | None = None,
) -> QuantizedTensor:
    """Both arrays; each device's part gets scales of its own."""
    specs, parts = QuantizedTensor(spec, spec), 1
    if mesh is not None:
        times = group_repeats(w, spec, mesh)
        scales = RepeatedScales(w.scales, times)
        w = QuantizedTensor(w.weight, scales)
        parts = axis_size(mesh, fit_spec(spec, w.shape, mesh)[-2])
    if store is not None:
        w = store(w, parts)
    if mesh is not None:
        specs = weight_spec(spec, w, mesh)
    sources, kind = jax.tree.flatten(w)
    cuts = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P))
    dtypes = jnp.int8, jnp.bfloat16
    return jax.tree.unflatten(kind, [
        on_devices(source, cut, mesh, dtype, name)
        for source, cut, dtype in zip(sources, cuts, dtypes)
    ])


# %% book/chapters/09c_layouts.md, cell 32
def place(
    name: str, w: Any, spec: ParamSpec, mesh: Mesh | None, dtype: str,
    store: Stored | None = None,
) -> Any:
    """Put one parameter on its devices; `store`: as what, if int8."""
    cut = partition_spec(spec.axes)
    if isinstance(w, QuantizedTensor):
        return place_quantized(name, w, cut, mesh, store)
    if mesh is not None:
        cut = fit_spec(cut, w.shape, mesh)
    own = jnp.dtype(dtype)
    if spec.float32:                        # unless the file has less
        own = jnp.promote_types(w.dtype, own)
    return on_devices(w, cut, mesh, own, name)


# %% book/chapters/09c_layouts.md, cell 33
def find_tokenizer(
    folder: Path, config: ModelConfig | None = None
) -> Tokenizer | None:
    """The tokenizer of a folder, if there is one."""
    for path in folder.glob("tokenizer.*"):
        with open(path, "rb") as file:
            if sentence := other_file(file.read(64)):
                raise CheckpointError(f"{path} {sentence}")
    try:
        return open_tokenizer(folder)
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from None


class Layout(NamedTuple):
    """A layout of folders: whose it is, and how it is read.

    `find` gives the folder of the weights, or None for another
    layout. `config` reads the configuration of the folder around,
    `tokenizer` finds what cuts texts for that model.
    """

    name: str
    find: Callable[[Path, set[str]], Path | None]
    config: Callable[[Path], ModelConfig]
    read: Callable[[Path, ModelConfig], Tensors]
    tokenizer: Callable[
        [Path, ModelConfig], Tokenizer | None] = find_tokenizer


# %% book/chapters/09c_layouts.md, cell 34
def find_release(folder: Path, names: set[str]) -> Path | None:
    return folder / "ckpt-0" if "ckpt-0" in names else None


def find_native(folder: Path, names: set[str]) -> Path | None:
    return folder if is_native(folder) else None


LAYOUTS = [
    Layout(
        "Grok-1", find_release,
        lambda folder: release_config(folder / "config.json"),
        read_release,
    ),
    Layout(
        FORMAT, find_native,
        lambda folder: native_config(folder / "config.json"),
        read_native,
    ),
]


# %% book/chapters/09c_layouts.md, cell 35
FINDERS: list[Callable[[str], Path | None]] = []


def find_folder(path: str | os.PathLike[str]) -> Path:
    """The folder that is there, or that a finder has for a name."""
    if not (text := os.fspath(path)):
        raise CheckpointError("the path of a checkpoint is empty")
    if not os.path.lexists(text):
        for find in FINDERS:
            if found := find(text):
                return found
    return Path(text)


# %% book/chapters/09c_layouts.md, cell 36
class Opened(NamedTuple):
    """A checkpoint that was found, before its weights are read."""

    folder: Path                            # configuration, tokenizer
    weights: Path                           # where the weights are
    layout: Layout
    config: ModelConfig

    def read(self) -> Tensors:
        """(module, name) -> tensor, mapped and checked."""
        tensors = self.layout.read(self.weights, self.config)
        check_tensors(self.weights, tensors, self.config)
        return tensors

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, if there is one."""
        return self.layout.tokenizer(self.folder, self.config)


# %% book/chapters/09c_layouts.md, cell 37
def open_checkpoint(path: str | os.PathLike[str]) -> Opened:
    """The checkpoint in a folder. CheckpointError if there is none."""
    folder = find_folder(path)
    folder = folder.parent if folder.name == "ckpt-0" else folder
    names = list_folder(folder)
    for layout in LAYOUTS:
        weights = layout.find(folder, names)
        if weights is not None:
            config = layout.config(folder)
            return Opened(folder, weights, layout, config)
    shards = any(name.endswith(".safetensors") for name in names)
    if not shards and (other := describe_weights(names)):
        raise CheckpointError(f"{folder} {other}")
    raise CheckpointError(
        f"{folder} holds no checkpoint: known layouts are "
        + ", ".join(layout.name for layout in LAYOUTS)
    )


# %% book/chapters/09c_layouts.md, cell 40
def small_model() -> Path:
    """The folder of the trained model inside this package."""
    return Path(str(files("annotated_moe") / "small"))


# %% book/chapters/09c_layouts.md, cell 43
def parts_along(axis: MeshAxis, mesh: Mapping[str, int]) -> int:
    """How many parts the mesh axes named by `axis` cut a size into."""
    names = axis if isinstance(axis, tuple) else (axis,)
    return math.prod(mesh[name] for name in names if name is not None)


def indivisible(c: ModelConfig, mesh: Mapping[str, int]) -> str:
    """What a mesh of these sizes cannot cut, or the empty string."""
    for path, spec in flat_specs(c).items():
        if not spec.matrix and "table" not in spec.axes:
            continue
        cut = partition_spec(spec.axes)
        for size, axis, names in zip(spec.shape, spec.axes, cut):
            parts = parts_along(names, mesh)
            if size % parts:
                many = isinstance(names, tuple)
                along = " * ".join(names) if many else names
                return (
                    f"{along} = {parts} does not divide the {axis} of "
                    f"{'/'.join(path)}, of which there are {size}"
                )
    for at in all_places(c):
        heads, model = at.spec.attention.q_heads, mesh["model"]
        if heads % model:
            return (
                f"model = {model} does not divide {heads} query heads"
            )
    return ""


# %% book/chapters/09c_layouts.md, cell 44
def fitting_meshes(c: ModelConfig, n: int) -> Iterator[str]:
    """Meshes of n devices that divide a model, each as a text."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    for data in divisors:
        for expert in divisors:
            model = n // (data * expert)
            sizes = {"data": data, "expert": expert, "model": model}
            if data * expert * model == n and not indivisible(c, sizes):
                yield f"{data} x {expert} x {model}"


def check_mesh(where: Path, c: ModelConfig, mesh: Mesh) -> None:
    """ValueError unless `mesh` has our axes and divides the model."""
    axes = "data", "expert", "model"
    if tuple(getattr(mesh, "axis_names", ())) != axes:
        raise ValueError(f"mesh needs axes {axes}: use make_mesh")
    sizes = dict(mesh.shape)
    wrong = indivisible(c, sizes)
    if not wrong:
        return
    n = math.prod(sizes.values())
    fits = list(fitting_meshes(c, n))
    advice = f"of {n} devices, {' or '.join(fits[:4])} would do"
    if not fits:
        advice = f"no mesh of {n} devices would do, take another number"
    raise CheckpointError(
        f"{where} does not fit a data x expert x model mesh of "
        f"{' x '.join(map(str, sizes.values()))}: {wrong}; {advice}"
    )


# %% book/chapters/09c_layouts.md, cell 47
Loader = Callable[[Opened, Mesh | None, str], Model]
LOADERS: dict[str, Loader] = {}


def load_into_memory(
    opened: Opened, mesh: Mesh | None, dtype: str
) -> Model:
    """The model of a checkpoint, its weights on their devices."""
    config = replace(opened.config, dtype=dtype)
    specs, tensors = flat_specs(config), opened.read()
    params: dict[str, dict[str, Any]] = {}
    named = {"/".join(path): w for path, w in tensors.items()}
    announce(mesh, "load", config=config, weights=named)
    store = STORED.get(jax.default_backend())
    for (module, name), w in tensors.items():
        spec, full = specs[module, name], f"{module}/{name}"
        try:
            own = place(full, w, spec, mesh, dtype, store)
        except CheckpointError as error:
            why = f"{opened.weights}: {error}"
            raise CheckpointError(why) from None
        params.setdefault(module, {})[name] = own
    tokenizer = opened.tokenizer()
    kind = MODEL_CLASSES[type(config)]
    return kind(config, params, tokenizer, mesh)


LOADERS["memory"] = load_into_memory


# %% book/chapters/09c_layouts.md, cell 48
def default_dtype() -> str:
    """What to compute in unless told: bfloat16 where it is fast."""
    if jax.default_backend() != "cpu" or cpu_has_bfloat16():
        return "bfloat16"
    return "float32"


# %% book/chapters/09c_layouts.md, cell 49
def load(
    path: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    stream: bool = False,
    exchange: str = "sum",
) -> Model:
    """A model from a checkpoint folder; without one, the small model.

    `mesh` comes from `make_mesh`; None is one device. `exchange` says
    how tokens reach the experts of other devices, by a name that
    `parallel.EXCHANGES` has. `dtype` is what it computes in,
    "bfloat16" or "float32"; None: what is fast here.
    With `stream`, weights stay on disk, for a model larger than memory.
    Raises CheckpointError for whatever is missing, left over, misshapen
    or unsafe, and ValueError for another dtype or mesh. Source: the
    Grok-1 release, `checkpoint.py`.
    """
    dtype = default_dtype() if dtype is None else dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = " or ".join(DTYPES)
        raise ValueError(f"dtype must be {known}: {dtype!r}")
    if not isinstance(stream, bool):
        raise TypeError(f"stream must be True or False: {stream!r}")
    check_exchange(exchange)
    opened = open_checkpoint(small_model() if path is None else path)
    if mesh is not None:
        check_mesh(opened.folder, opened.config, mesh)
    announce(mesh, "load", exchange=exchange)
    model = LOADERS["disk" if stream else "memory"](opened, mesh, dtype)
    same = model.exchange == exchange
    return model if same else replace(model, exchange=exchange)


# %% book/chapters/09c_layouts.md, cell 55
# What `save` writes, and may therefore replace.
WRITTEN = {
    "config.json", "model.safetensors", "checksums.json",
    *(form.file_name for form in FORMATS),
    *(name.split("/")[0] for name in COMPANIONS),
}


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write `model` in our own layout to the folder `path`.

    An older checkpoint of ours there is replaced; any other folder
    that is not empty is refused (CheckpointError). All of it is
    written, or nothing.
    """
    if not model.in_memory:
        raise CheckpointError(
            "a streamed model is on disk already: copy its folder, or "
            "load it without stream=True to save it elsewhere"
        )
    target = Path(path).absolute()
    if target.is_symlink():
        raise CheckpointError(
            f"{target} is a symbolic link: give the folder it leads to"
        )
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not is_native(target):
        raise CheckpointError(
            f"{target} exists and is no checkpoint of format "
            f"{FORMAT!r}: choose another folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f".{target.name}-"
    )
    with scratch as folder:
        new = Path(folder) / "new"
        new.mkdir()
        write_model(model, new)
        replace_folder(new, target, Path(folder) / "old", WRITTEN)


# %% book/chapters/09c_layouts.md, cell 56
def write_model(model: Model, folder: Path) -> None:
    """The files of a checkpoint in our own layout."""
    tensors = {
        path: model.params[path[0]][path[1]]
        for path in flat_specs(model.config)
    }
    parts = safetensors_parts(flat_arrays(tensors))
    watcher = Watcher()
    write_file(folder / "model.safetensors", parts, watcher)
    ordered = dict(sorted(watcher.sums.items()))
    write_json(folder / "checksums.json", {"sha256": ordered})
    write_json(folder / "config.json", native_settings(model.config))
    if model.tokenizer is not None:
        model.tokenizer.save_in(folder)


# %% book/chapters/09c_layouts.md, cell 59
def stored(opened: Opened) -> dict[str, np.ndarray]:
    """Every array in a checkpoint's files, by the name it has there."""
    where = opened.weights
    if where.name != "ckpt-0":
        return open_folder(where)
    names = [n for n in list_folder(where) if n.startswith("tensor")]
    interpreted: dict[int, Any] = {}
    tensors = {
        n: read_pickled(where / n, interpreted) for n in sorted(names)
    }
    return flat_arrays({(n,): w for n, w in tensors.items()})


def checksums(folder: Path) -> dict[str, str]:
    """Tensor -> sha256, as `checksums.json` says."""
    path = folder / "checksums.json"
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{folder} has no checksums.json: annotated-moe convert "
            "makes a copy that has"
        )
    sums = read_json(path).get("sha256")
    if not isinstance(sums, dict):
        raise CheckpointError(f"{path} lacks the field 'sha256'")
    return sums


# %% book/chapters/09c_layouts.md, cell 60
def verify(path: str | os.PathLike[str] | None = None) -> int:
    """Hold every tensor against its checksum; how many there are.

    Reads the whole checkpoint, a block at a time. Raises
    CheckpointError for the first tensor that is not what was written.
    """
    opened = open_checkpoint(small_model() if path is None else path)
    where = opened.weights
    sums, arrays = checksums(opened.folder), stored(opened)
    for name in sorted(set(arrays) ^ set(sums)):
        lacks = "checksum" if name in arrays else "tensor"
        raise CheckpointError(f"{where}: {name[:80]!r} has no {lacks}")
    for name, array in arrays.items():
        digest = hashlib.sha256()
        for block in iter_blocks(array):
            digest.update(as_bytes(block))
        if digest.hexdigest() != sums[name]:
            raise CheckpointError(
                f"{where}: {name} does not match its checksum; it was "
                "changed or damaged: fetch it again"
            )
    return len(arrays)


# %% book/chapters/09c_layouts.md, cell 63
def groups_for(spec: ParamSpec, most: int = 8) -> int:
    """Groups of scales: several where `model` cuts the inputs."""
    cut = partition_spec(spec.axes)
    several = len(cut) > 1 and cut[-2] == "model"
    return math.gcd(spec.shape[-2], most) if several else 1


def quantize_params(
    params: Params, config: ModelConfig, groups: int = 8
) -> dict[str, dict[str, Any]]:
    """Every matrix in 8 bits; what is so already stays."""
    quantized: dict[str, dict[str, Any]] = {}
    for (module, name), spec in flat_specs(config).items():
        w = params[module][name]
        if spec.matrix and not isinstance(w, QuantizedTensor):
            w = quantize(w, groups_for(spec, groups))
        quantized.setdefault(module, {})[name] = w
    return quantized


# %% book/chapters/14_hub.md, cell 31
def find_hub(folder: Path, names: set[str]) -> Path | None:
    if "config.json" not in names:
        return None
    raw = read_json(folder / "config.json")
    named = raw.keys() & {"architectures", "model_type"}
    return folder if named else None


LAYOUTS.append(Layout("Hugging Face", find_hub, hub_config, read_hub))


# %% book/chapters/14_hub.md, cell 41
FINDERS.append(fetch_from_hub)


# %% book/chapters/15_meta.md, cell 69
def meta_tokenizer(
    folder: Path, config: ModelConfig | None = None
) -> Tokenizer | None:
    """The tokenizer in the folder, or one folder up."""
    found = find_tokenizer(folder) or find_tokenizer(folder / "..")
    if found is not None and config is not None:
        for name, data in meta_companions(config).items():
            found.companions.setdefault(name, data)
    return found


LAYOUTS.append(
    Layout("Meta", find_meta, meta_config, read_meta, meta_tokenizer)
)
