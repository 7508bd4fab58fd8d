# Generated from book/chapters/95_recipes.md by `make sync`; edit the chapter.
"""`annotated-moe train run.toml` trains a model. This appendix reads
the file: which model, which texts, how fast, on which devices, written
down where. Whatever is wrong in it is answered with one sentence that
names the file, the section and the key. It is plumbing around a run,
and nothing in it is needed to understand one.
"""

import contextlib
import difflib
import fcntl
import glob
import inspect
import json
import os
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import jax
from jax.sharding import Mesh

from annotated_moe import hosts
from annotated_moe.checkpoints import indivisible, save, small_model
from annotated_moe.config import ModelConfig
from annotated_moe.data import pack, split_texts
from annotated_moe.families import PRESETS
from annotated_moe.families.grok import (
    grok_config,
    grok_sizes,
    like_grok,
)
from annotated_moe.generate import Model
from annotated_moe.model import Params
from annotated_moe.moe import MoESpec
from annotated_moe.parallel import EXCHANGES, make_mesh
from annotated_moe.runs import (
    Checkpoints,
    RunSpec,
    check_same_run,
    digest,
    gathered,
    naming,
    train,
)
from annotated_moe.specs import (
    OneOf,
    Positive,
    Size,
    Spec,
    expected_by,
    fits_type,
    to_json,
)
from annotated_moe.tokenizer import Tokenizer, open_tokenizer
from annotated_moe.training import (
    LossSpec,
    MeshTrainer,
    OptimizerSpec,
    ScheduleSpec,
    Share,
    Trainer,
    TrainSpec,
    bits_per_byte,
    within_documents,
)


# %% book/chapters/95_recipes.md, cell 4
@dataclass(frozen=True)
class DataSpec(Spec):
    """Texts. Paths are read from where the file that names them is."""

    files: tuple[str, ...]                  # or folders, or patterns
    tokenizer: str | None = None            # None: the small model's
    validation: Share = 0.05                # of the texts, held back
    separator: str | None = None            # None: a file is a text


@dataclass(frozen=True)
class MeshSpec(Spec):
    """How many devices cut what; see `make_mesh`."""

    data: Size = 1
    expert: Size = 1
    model: Size = 1
    exchange: Annotated[str, OneOf(EXCHANGES)] = "sum"

    @property
    def devices(self) -> int:
        return self.data * self.expert * self.model


# %% book/chapters/95_recipes.md, cell 5
def near(word: str, known: Any) -> str:
    """What was probably meant, as the end of a sentence."""
    close = difflib.get_close_matches(word, known, 1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; it has {', '.join(sorted(known))}"


def read_section(
    where: str, kind: type[Spec], raw: Any, **more: Any
) -> Any:
    """A spec from a table of TOML; `more` are fields from elsewhere.

    ValueError, beginning with `where`, for a key that is unknown or
    missing and for a value of another kind.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{where} must be a section: [{raw!r:.40}]")
    known = {f.name: f for f in fields(kind)  # type: ignore[arg-type]
             if f.name not in more}
    for key in raw:
        if key not in known:
            raise ValueError(
                f"{where} has no key {key!r}{near(key, known)}")
    for name, field in known.items():
        if name not in raw and field.default is MISSING:
            raise ValueError(
                f"{where} needs the key {name!r}, "
                f"{expected_by(field.type)}"
            )
    own = {key: tuple(value) if isinstance(value, list) else value
           for key, value in raw.items()}
    try:
        return kind(**own, **more)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None


# %% book/chapters/95_recipes.md, cell 6
def check_sizes(where: str, raw: dict[str, Any], known: Any) -> None:
    """ValueError for a key or value that `grok_config` cannot take."""
    for key, value in raw.items():
        if key not in known:
            raise ValueError(
                f"{where} has no key {key!r}{near(key, known)}")
        hint = known[key].annotation
        plain = {int: Size, float: Positive}
        hint = plain.get(hint, hint) if key != "pad_id" else hint
        if not fits_type(value, hint):
            raise ValueError(f"{where} {key} must be "
                             f"{expected_by(hint)}: {value!r:.60}")


# %% book/chapters/95_recipes.md, cell 7
def read_model(
    where: str, raw: dict[str, Any], tokenizer: Tokenizer
) -> ModelConfig:
    """A configuration from the section `model`, for a vocabulary."""
    own: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in raw.items()
    }
    experts: dict[str, Any] = {
        key: own.pop(key) for key in ("router",) if key in own}
    sizes: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id or 0,
        "eos_ids": (tokenizer.eos_id,),
    }
    preset = own.pop("preset", None)
    known = inspect.signature(grok_config).parameters
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"{where} has no preset {preset!r:.40}"
                             f"{near(str(preset), PRESETS)}")
        base = PRESETS[preset]
        if like_grok(base) != base:
            return other_model(where, base, own | experts, sizes)
        sizes = grok_sizes(base) | sizes
    check_sizes(where, own, known)
    if preset is None and "d_model" in own:
        sizes["embedding_multiplier"] = own["d_model"] ** 0.5
    if preset is None and "head_size" in own:
        sizes["attn_multiplier"] = own["head_size"] ** -0.5
    try:
        config = grok_config(**{**sizes, **own})
        return with_experts(config, experts)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None


# %% book/chapters/95_recipes.md, cell 8
def with_experts(
    config: ModelConfig, changes: dict[str, Any]
) -> ModelConfig:
    """A model whose experts have other fields."""
    def changed(layer: Any) -> Any:
        if not isinstance(layer.feed_forward, MoESpec):
            raise ValueError(
                f"{', '.join(changes)}: this model has no experts")
        experts = replace(layer.feed_forward, **changes)
        return replace(layer, feed_forward=experts)

    if not changes:
        return config
    return replace(config, layers=tuple(
        replace(segment, pattern=tuple(map(changed, segment.pattern)))
        for segment in config.layers))


def other_model(
    where: str, base: ModelConfig, own: dict[str, Any],
    sizes: dict[str, Any],
) -> ModelConfig:
    """Another family's preset, of which little can be changed."""
    known = "vocab_size", "context", "dtype", "pad_id", "eos_ids"
    for key in own:
        if key not in known:
            raise ValueError(
                f"{where} cannot change {key!r} of this preset"
                f"{near(key, known)}")
    try:
        return replace(base, **{**sizes, **own})
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None


# %% book/chapters/95_recipes.md, cell 9
@dataclass(frozen=True)
class Recipe:
    """What a file of TOML asks for, all of it checked."""

    path: Path
    model: dict[str, Any]                   # needs a vocabulary first
    data: DataSpec
    train: TrainSpec
    mesh: MeshSpec
    run: RunSpec

    @property
    def folder(self) -> Path:
        return self.path.parent / self.run.folder


TRAIN_SECTIONS = {"loss": LossSpec, "optimizer": OptimizerSpec,
         "schedule": ScheduleSpec}
OWN_SECTIONS = {"data": DataSpec, "mesh": MeshSpec, "run": RunSpec}


# %% book/chapters/95_recipes.md, cell 10
def check_trainable(where: str, model: dict[str, Any]) -> None:
    """ValueError without sizes, or for a preset that cannot train."""
    if not model.keys() & {"preset", "d_model"}:
        raise ValueError(
            f"{where} needs a preset, or sizes: d_model first")
    preset = model.get("preset")
    if not isinstance(preset, str) or preset not in PRESETS:
        return                              # `read_model` says so
    try:
        within_documents(PRESETS[preset])
    except ValueError as error:
        raise ValueError(
            f"{where} preset {preset!r} cannot be trained: {error}"
        ) from None


# %% book/chapters/95_recipes.md, cell 11
def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """A recipe from a file; ValueError says file, section and key."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    known = "model", "train", *TRAIN_SECTIONS, *OWN_SECTIONS
    for name in raw:
        if name not in known:
            raise ValueError(
                f"{path} has no section {name!r}{near(name, known)}")

    def section(name: str, kind: type[Spec], **more: Any) -> Any:
        where = f"{path}: [{name}]"
        return read_section(where, kind, raw.get(name, {}), **more)

    model = raw.get("model", {})
    if not isinstance(model, dict):
        raise ValueError(f"{path}: model must be a section, [model]")
    check_trainable(f"{path}: [model]", model)
    parts = {n: section(n, kind) for n, kind in TRAIN_SECTIONS.items()}
    whole = {n: section(n, kind) for n, kind in OWN_SECTIONS.items()}
    train = section("train", TrainSpec, **parts)
    return Recipe(path, model, train=train, **whole)


# %% book/chapters/95_recipes.md, cell 12
def read_texts(where: Path, spec: DataSpec, own: Path) -> list[str]:
    """The texts that a recipe names; ValueError where there is none.

    Each file once, and none of the run's `own` folder.
    """
    found: list[Path] = []
    for pattern in spec.files:
        path = where / pattern
        wanted = os.path.join(glob.escape(str(where)), pattern)
        if path.exists():       # a name, even one with a [ in it
            wanted = glob.escape(str(path))
        if path.is_dir():
            wanted = os.path.join(wanted, "**")
        paths = map(Path, glob.glob(wanted, recursive=True))
        files = [p.resolve() for p in paths if p.is_file()]
        files = [p for p in files if own not in p.parents]
        if not files:
            raise ValueError(
                f"[data] files: nothing in {where} is {pattern!r}")
        found += sorted(files)
    texts = []
    for path in dict.fromkeys(found):
        try:
            with naming(path, "read"):
                text = path.read_text("utf-8")
        except UnicodeDecodeError:
            raise ValueError(
                f"{path} is no text in UTF-8: leave it out of [data] "
                "files, or convert it"
            ) from None
        parts = [text] if spec.separator is None else (
            text.split(spec.separator))
        texts += [part for part in parts if part.strip()]
    return texts


# %% book/chapters/95_recipes.md, cell 13
def read_vocabulary(where: Path, name: str | None) -> Tokenizer:
    """A tokenizer from a file or a model's folder."""
    path = small_model() if name is None else where / name
    with naming(path, "read"):
        found = (open_tokenizer(path) if path.is_dir()
                 else Tokenizer(path))
    if found is None or found.eos_id is None:
        raise ValueError(
            f"[data] tokenizer: {path} holds no tokenizer with a token "
            "that ends a text"
        )
    return found


# %% book/chapters/95_recipes.md, cell 16
def recipe_mesh(recipe: Recipe, config: ModelConfig) -> Mesh | None:
    """The mesh that a recipe asks for, simulated where there are CPUs.

    None for one device. ValueError where it does not fit the model.
    """
    sizes = {name: getattr(recipe.mesh, name)
             for name in ("data", "expert", "model")}
    if recipe.mesh.exchange != "sum" and sizes["expert"] == 1:
        raise ValueError(
            f"{recipe.path}: [mesh] exchange = "
            f"{recipe.mesh.exchange!r} would do nothing with expert = "
            "1: let expert divide the experts, or leave it out"
        )
    if recipe.mesh.devices == 1:
        return None
    with contextlib.suppress(RuntimeError):
        # Only CPUs heed this, and only before a device is first used.
        jax.config.update("jax_num_cpu_devices", recipe.mesh.devices)
    where = f"{recipe.path}: [mesh]"
    if wrong := indivisible(config, sizes):
        raise ValueError(f"{where} {wrong}")
    part = recipe.train.batch // recipe.train.accumulate
    if part % sizes["data"]:
        raise ValueError(
            f"{where} data = {sizes['data']} cannot cut {part} rows, "
            "batch / accumulate, into equal parts"
        )
    try:
        return make_mesh(**sizes)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None


# %% book/chapters/95_recipes.md, cell 17
def read_inputs(
    recipe: Recipe,
) -> tuple[ModelConfig, Tokenizer, list[str]]:
    """The model, the vocabulary and the texts that a recipe names."""
    where = recipe.path.parent
    try:
        tokenizer = read_vocabulary(where, recipe.data.tokenizer)
        texts = read_texts(where, recipe.data, recipe.folder.resolve())
    except ValueError as error:
        raise ValueError(f"{recipe.path}: {error}") from None
    config = read_model(f"{recipe.path}: [model]", recipe.model,
                        tokenizer)
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"{recipe.path}: [model] vocab_size must be at least "
            f"{tokenizer.vocab_size}, as the tokenizer's: "
            f"{config.vocab_size}"
        )
    return config, tokenizer, texts


# %% book/chapters/95_recipes.md, cell 18
@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Be the one run of a folder; ValueError where there is another."""
    with naming(folder / "lock"):
        lock = (folder / "lock").open("w")
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is at work in {folder}: wait until it "
                "ends, or give this one another folder"
            ) from None
        yield


# %% book/chapters/95_recipes.md, cell 19
def trainer_on(
    mesh: Mesh | None, config: ModelConfig, spec: TrainSpec,
    exchange: str = "sum",
) -> Trainer:
    if mesh is None:
        return Trainer(config, spec)
    return MeshTrainer(config, spec, mesh, exchange)


# %% book/chapters/95_recipes.md, cell 20
def check_start(recipe: Recipe, about: dict[str, Any]) -> None:
    """ValueError where a folder's states are not of this recipe."""
    kept = Checkpoints(recipe.folder / "checkpoints", recipe.run.keep)
    if kept.latest is None:
        return
    check_same_run(recipe.folder, kept.about(), about)
    if kept.latest > recipe.train.steps:
        raise ValueError(
            f"{recipe.path}: [train] steps is {recipe.train.steps}, "
            f"and {recipe.folder} is at step {kept.latest} already: "
            "ask for more, or give another folder"
        )


# %% book/chapters/95_recipes.md, cell 21
def train_recipe(recipe: Recipe) -> Model:
    """Do what a recipe asks for; the trained model, which is saved too.

    Goes on where its folder left off. ValueError for what cannot be.
    """
    config, tokenizer, texts = read_inputs(recipe)
    to_learn, aside = split_texts(texts, recipe.data.validation)
    if not to_learn:
        raise ValueError(
            f"{recipe.path}: [data] validation holds all of the "
            f"{len(texts)} texts back: give more texts, or a smaller "
            "share"
        )
    if recipe.run.evaluate_every and not aside:
        raise ValueError(
            f"{recipe.path}: [run] evaluate_every has nothing to "
            f"measure: [data] validation holds none of {len(texts)} "
            "texts back"
        )
    rows = pack(to_learn, tokenizer, recipe.train.length)
    mesh = recipe_mesh(recipe, config)
    try:
        trainer = trainer_on(
            mesh, config, recipe.train, recipe.mesh.exchange)
    except ValueError as error:
        raise ValueError(f"{recipe.path}: [train] {error}") from None
    about = {"model": to_json(config), "train": to_json(recipe.train),
             "data": digest(rows)}
    about = json.loads(json.dumps(about))
    if mesh is not None:
        hosts.check_same(mesh, "train", about)
    folder, first = recipe.folder, jax.process_index() == 0
    with naming(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)
    evaluate: Callable[[Params], float] | None = None
    if aside:
        held = pack(aside, tokenizer, recipe.train.length)

        def bits(params: Params) -> float:
            return bits_per_byte(trainer, params, held, aside)

        evaluate = bits

    with alone_in(folder) if first else contextlib.nullcontext():
        check_start(recipe, about)
        state = train(
            trainer, rows, recipe.run, folder, about, evaluate)
        params = gathered(state.params, trainer)
        model = Model(config, params, tokenizer)
        if first:
            with naming(folder / "model"):
                save(model, folder / "model")
    return model
