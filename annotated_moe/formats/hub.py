# Generated from book/chapters/14_hub.md by `make sync`; edit the chapter.
"""Nearly every open model is published in one layout: a `config.json`
of thirty to sixty fields, and tensors under PyTorch's names. Read one
of these fields in the wrong place and nothing fails. The model loads,
speaks, and is a little stupid. This chapter reads the layout so that
this is hard to do unnoticed: every field is asked for by name, and one
that nobody asked for stops the loading if its name speaks of a part of
a model. By its end `load` takes such a folder, or just the name of a
model on the hub; `convert --to hf` writes one, in shards; and a new
architecture is a table of names and two small methods.
"""

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from annotated_moe.config import LayerSpec, ModelConfig, all_places
from annotated_moe.formats.files import CheckpointError, read_json
from annotated_moe.formats.lazy import (
    LazyArray,
    as_bytes,
    iter_blocks,
    stack_tensors,
)
from annotated_moe.formats.safetensors import open_folder
from annotated_moe.model import param_specs
from annotated_moe.params import ParamSpec
from annotated_moe.quantization import QuantizedTensor
from annotated_moe.rope import Rope

# %% book/chapters/14_hub.md, cell 6
REQUIRED = object()


class Fields:
    """The fields of a configuration, each asked for by its name.

    `defaults` are values of absent fields. `finish` refuses a field
    that nobody asked for: it might change what is computed.
    """

    def __init__(self, where: Path, raw: Mapping[str, Any]) -> None:
        self.where, self.raw = where, raw
        self.defaults: Mapping[str, Any] = {}
        self.asked: set[str] = set()

    def error(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {why}")

    def get(self, name: str, default: Any = None) -> Any:
        """A field's value; the default where it is absent or null."""
        self.asked.add(name)
        value = self.raw.get(name, self.defaults.get(name))
        if value is None and default is REQUIRED:
            raise CheckpointError(
                f"{self.where} lacks the field {name!r}"
            )
        return default if value is None else value

    def size(self, name: str, default: Any = REQUIRED) -> int:
        """An int from 1 on."""
        value = self.get(name, default)
        if type(value) is not int or not 0 < value < 2**31:
            raise self.error(
                f"{name} must be an int >= 1: {value!r:.80}"
            )
        return value

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """A finite number above zero."""
        value = self.get(name, default)
        real = type(value) in (int, float)
        if not real or not 0 < value < float("inf"):
            raise self.error(f"{name} must be positive: {value!r:.80}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            raise self.error(
                f"{name} must be true or false: {value!r:.80}"
            )
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """A token id, several, or none."""
        value = self.get(name, ())
        many = value if isinstance(value, list | tuple) else [value]
        if any(type(i) is not int or i < 0 for i in many):
            raise self.error(
                f"{name} must be token ids of 0 or more: {value!r:.80}"
            )
        return tuple(many)

    def only(self, name: str, *allowed: Any) -> None:
        """A field that may be absent, or have one of these values."""
        value = self.get(name)
        if value is not None and value not in allowed:
            known = " or ".join(map(repr, allowed))
            raise self.error(
                f"{name} is {value!r:.80}; only {known} is supported"
            )

    def inner(self, name: str) -> "Fields | None":
        """The fields of an object within, or None."""
        value = self.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.error(f"{name} must be an object")
        return Fields(Path(f"{self.where}: {name}"), value)

    def finish(self, inert: frozenset[str] | None = None) -> None:
        """CheckpointError for a field of unknown meaning.

        What is private, known to be inert, false, empty or zero
        changes nothing. A name that speaks of no part of a model is
        let through with a warning.
        """
        known = INERT if inert is None else inert
        for name, value in self.raw.items():
            quiet = name[:1] == "_" or name in known or not value
            if name in self.asked or quiet:
                continue
            if speaks_of_a_part(name):
                raise self.error(
                    f"the field {name[:40]!r} is not supported: what it"
                    " changes in the model is not known here"
                )
            text = f"{self.where}: the field {name[:40]!r} is not read"
            warnings.warn(text, stacklevel=3)


# %% book/chapters/14_hub.md, cell 7
WORDS = """
    act adapter alibi attention attn bias bits block cap causal chunk
    conv cross dense depth dim embed expert factor feed ffn freq func
    gate glu group head hidden image interleav intermediate key kv layer
    local logit lora mask mlp moe mrope multiplier mup norm parallel
    posit quant query rank ratio residual rope rotary rout scal scor
    share shared sink size skip softmax span sparse ssm state swi theta
    tie topk value vision weight width window
"""
PARTS = WORDS.split()


def speaks_of_a_part(name: str) -> bool:
    """Whether a field's name has a word for what a model computes."""
    return any(part in name.lower() for part in PARTS)


# %% book/chapters/14_hub.md, cell 8
# What `transformers` writes into any configuration, and training
# programs add, and no model reads when it computes logits.
NAMES = """
    architectures model_type auto_map transformers_version use_cache
    name_or_path bos_token_id sep_token_id cls_token_id mask_token_id
    unk_token_id decoder_start_token_id tokenizer_class prefix
    initializer_range initializer_factor dtype torch_dtype
    output_router_logits router_aux_loss_coef router_z_loss_coef
    output_attentions output_hidden_states output_logits return_dict
    return_dict_in_generate output_scores torchscript use_bfloat16
    use_return_dict is_decoder is_encoder_decoder add_cross_attention
    tie_encoder_decoder tie_last_hidden_states
    cross_attention_hidden_size chunk_size_feed_forward pruned_heads
    id2label label2id num_labels problem_type finetuning_task
    task_specific_params attention_dropout hidden_dropout
    attention_probs_dropout_prob hidden_dropout_prob dropout
    embd_pdrop resid_pdrop attn_pdrop classifier_dropout
    summary_first_dropout embedding_dropout resid_dropout
    pretraining_tp tf_legacy_loss remove_invalid_values
    max_length min_length max_new_tokens min_new_tokens do_sample
    early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p top_h min_p typical_p epsilon_cutoff
    eta_cutoff penalty_alpha repetition_penalty length_penalty
    encoder_repetition_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids force_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id
    suppress_tokens begin_suppress_tokens renormalize_logits
    exponential_decay_length_penalty sequence_bias stop_strings
    guidance_scale constraints max_time low_memory dola_layers
    token_healing watermarking_config generation_config
    cache_config compile_config disable_compile max_cache_len
    prefill_chunk_size continuous_batching_config speculation_type
    prompt_lookup_num_tokens max_matching_ngram_size use_mtp
    is_assistant num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold assistant_early_exit
    assistant_lookbehind target_lookbehind assistant_ensemble_weight
    max_sequence_length max_seq_len max_seq_length seq_length seq_len
    model_max_length original_max_position_embeddings
    unsloth_version unsloth_fixed unsloth_processed is_llama_config
    attn_implementation experts_implementation cache_implementation
    use_flash_attn use_flash_attention use_flash_attention_2
    flash_attention flash_attn attn_impl use_sdpa
    use_memory_efficient_attention
    use_kernel use_kernels fused_kernels use_liger_kernel
    gradient_checkpointing use_gradient_checkpointing
    neftune_noise_alpha
    for_llm_compressor router_jitter_noise input_jitter_noise
    bos_token eos_token pad_token unk_token pad_token_id eos_token_id
    language license datasets tags base_model batch_size
    train_batch_size micro_batch_size quantization_config
    compression_config quantization transformers.js_config
"""
INERT = frozenset(NAMES.split())


# %% book/chapters/14_hub.md, cell 11
ROPES: dict[str, Callable[[Fields, float], Rope]] = {
    "default": lambda fields, base: Rope(base)
}
# Of the numbers of one type of RoPE another has no use.
NUMBERS = """
    type factor low_freq_factor high_freq_factor attention_factor
    original_max_position_embeddings beta_fast beta_slow mscale
    mscale_all_dim truncate short_factor long_factor finetuned
"""
ROPE_NUMBERS = frozenset(NUMBERS.split())


def read_rope(fields: Fields, base: float = 10000.0) -> Rope:
    """How a configuration turns queries and keys.

    `rope_scaling`, where it says something, goes before
    `rope_parameters`; a `rope_theta` inside before one beside, and
    that before `base`. Source: transformers 5, `modeling_rope_utils`.
    """
    base = fields.number("rope_theta", base)
    partial = fields.get("partial_rotary_factor", 1.0)
    scaling = fields.inner("rope_scaling")
    inner = fields.inner("rope_parameters")
    inner = scaling or inner or Fields(fields.where, {})
    base = inner.number("rope_theta", base)
    kind = inner.get("rope_type", inner.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPES:
        raise inner.error(
            f"rope_type is {kind!r:.40}; known are {', '.join(ROPES)}"
        )
    if inner.get("partial_rotary_factor", partial) != 1:
        raise inner.error(
            "a partial_rotary_factor other than 1 is not supported"
        )
    inner.defaults = {
        "original_max_position_embeddings":
            fields.get("max_position_embeddings")
    }
    rope = ROPES[kind](inner, base)
    inner.finish(ROPE_NUMBERS)
    return rope


# %% book/chapters/14_hub.md, cell 14
ROPE_FIELDS: dict[type, Callable[[Any], dict[str, Any]]] = {}


def write_rope(rope: Rope) -> dict[str, Any]:
    """`rope_parameters`, and the older spelling of the same."""
    more = ROPE_FIELDS.get(type(rope), lambda rope: {})(rope)
    own = {"rope_type": "default", **more}
    old = None if own["rope_type"] == "default" else own
    return {
        "rope_parameters": {"rope_theta": rope.base, **own},
        "rope_theta": rope.base,
        "rope_scaling": old,
    }


# %% book/chapters/14_hub.md, cell 15
def read_dtype(fields: Fields) -> str:
    """What to compute in: "bfloat16", also for halves, or "float32"."""
    for name in ("torch_dtype", "dtype"):
        fields.only(name, "float32", "bfloat16", "float16")
    older = fields.get("torch_dtype", "bfloat16")
    name = fields.get("dtype", older)
    return "float32" if name == "float32" else "bfloat16"


def stop_ids(fields: Fields) -> tuple[int, ...]:
    """The ids that end a text, of those that the model has."""
    count = fields.size("vocab_size")
    return tuple(i for i in fields.ids("eos_token_id") if i < count)


def one_or_many(ids: tuple[int, ...]) -> Any:
    """Token ids as these files hold them: none, one, or a list."""
    if len(ids) < 2:
        return ids[0] if ids else None
    return list(ids)


# %% book/chapters/14_hub.md, cell 16
class WeightName(NamedTuple):
    """A tensor of theirs, a parameter of ours, what is between.

    `{expert}` in their name is one expert's number. Names within a
    layer go without the layer's own.
    """

    theirs: str
    ours: str
    transform: str = "as is"


ENDS = (
    WeightName("model.embed_tokens.weight", "in_out_embed/embeddings"),
    WeightName("model.norm.weight", "rms_norm/scale"),
    WeightName("lm_head.weight", "lm_head/embeddings"),
)


# %% book/chapters/14_hub.md, cell 17
class Family(ABC):
    """An architecture in this layout: names, and a configuration.

    A family overrides `ends`, `layer` and `read`, and `write` if its
    files can be written.
    """

    model_type = ""
    prefix = "model.layers.{layer}."
    ends: tuple[WeightName, ...] = ENDS
    defaults: Mapping[str, Any] = {}        # of absent fields

    @abstractmethod
    def layer(self, spec: LayerSpec) -> tuple[WeightName, ...]:
        """The names of the tensors of one layer."""

    @abstractmethod
    def read(self, fields: Fields) -> ModelConfig:
        """The configuration that their fields describe.

        CheckpointError or ValueError for what is not supported.
        """

    def configure(self, fields: Fields) -> ModelConfig:
        """`read`, with this family's values of absent fields."""
        fields.defaults = self.defaults
        return self.read(fields)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Their fields. ValueError for what they cannot say."""
        raise ValueError("files of this kind are read, not written")


FAMILIES: dict[str, Family] = {}


# %% book/chapters/14_hub.md, cell 20
Change = Callable[[Any, Any], Any]          # of a tensor, by its spec


class WeightTransform(NamedTuple):
    """What is done to a tensor of theirs, and of ours."""

    read: Change
    write: Change


def unchanged(w: Any, spec: Any) -> Any:
    return w


def transposed(w: Any, spec: Any) -> Any:
    return w.T


TRANSFORMS = {
    "as is": WeightTransform(unchanged, unchanged),
    "transpose": WeightTransform(transposed, transposed),
}


# %% book/chapters/14_hub.md, cell 21
class Entry(NamedTuple):
    """One tensor of theirs, and where in ours it stands.

    `index` is its place in the stacks of layers and experts.
    """

    name: str
    path: tuple[str, str]
    index: tuple[int, ...]          # type: ignore[assignment]
    transform: str
    spec: Any


def match(
    names: tuple[WeightName, ...], path: str, what: str
) -> WeightName:
    """The name of a parameter; CheckpointError where it has none."""
    for name in names:
        if name.ours == path:
            return name
    raise CheckpointError(
        f"this architecture has no name for {path} of {what}"
    )


def experts_in(theirs: str, spec: ParamSpec) -> Any:
    """The experts that have tensors of their own; [None]: no such."""
    if "{expert}" not in theirs:
        return [None]
    return range(spec.shape[spec.axes.index("experts")])


# %% book/chapters/14_hub.md, cell 22
def end_entries(
    family: Family, config: ModelConfig, path: tuple[str, str]
) -> Iterator[Entry]:
    """The tensors of a parameter that belongs to no decoder layer."""
    name = match(family.ends, "/".join(path), "the model")
    count = param_specs(config)[path[0]][path[1]].shape[0]
    if "{layer}" not in name.theirs:
        yield Entry(name.theirs, path, (), name.transform, config)
        return
    for i in range(count):
        theirs = name.theirs.format(layer=i)
        yield Entry(theirs, path, (i,), name.transform, config)


def entries(family: Family, config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of theirs that a model has, in our order."""
    places = {place.name: place for place in all_places(config)}
    for module, leaves in param_specs(config).items():
        top, _, rest = module.partition("/")
        for leaf, spec in leaves.items():
            path = module, leaf
            if top not in places:
                yield from end_entries(family, config, path)
                continue
            place = places[top]
            names = family.layer(place.spec)
            name = match(names, f"{rest}/{leaf}", f"layer {place.name}")
            for i, layer in enumerate(place.layers):
                theirs = family.prefix.format(layer=layer) + name.theirs
                for e in experts_in(theirs, spec):
                    index = (i,) if e is None else (i, e)
                    yield Entry(
                        theirs.format(expert=e), path, index,
                        name.transform, place.spec,
                    )


# %% book/chapters/14_hub.md, cell 24
class HubFolder:
    """The arrays of a folder, and which of them were taken."""

    def __init__(self, where: Path) -> None:
        self.where, self.arrays = where, open_folder(where)
        self.taken: set[str] = set()

    def find(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise CheckpointError(f"{self.where} lacks {name}")
        self.taken.add(name)
        if 0 in (w := self.arrays[name]).shape:
            raise CheckpointError(
                f"{self.where}: {name} is empty, of shape {w.shape}: "
                "it was never written; fetch or save it again"
            )
        return w

    def read(self, entry: Entry) -> Any:
        """One tensor, with its scales, as ours: only views."""
        w = self.find(entry.name)
        change = TRANSFORMS[entry.transform].read
        scale = f"{entry.name}_scale"
        if w.dtype == np.int8 or scale in self.arrays:
            scales = self.find(scale)
            return QuantizedTensor(
                change(w, entry.spec), change(scales, entry.spec)
            )
        return change(w, entry.spec)


# %% book/chapters/14_hub.md, cell 25
Found = list[tuple[tuple[int, ...], Any]]       # index, tensor


def stacked(where: Path, name: str, found: Found) -> Any:
    """One tensor of those at all indices, in the order of these."""
    if not found[0][0]:
        return found[0][1]
    parts: dict[int, Found] = {}
    for (first, *rest), w in found:
        parts.setdefault(first, []).append((tuple(rest), w))
    inner = [stacked(where, name, parts[i]) for i in sorted(parts)]
    return stack_tensors(where, name, inner)


# %% book/chapters/14_hub.md, cell 26
def check_head(folder: HubFolder, embedding: str, head: str) -> None:
    """CheckpointError if a tied model's output matrix is another."""
    if head in folder.taken or head not in folder.arrays:
        return
    a, b = folder.find(head), folder.find(embedding)
    same = (a.dtype, a.shape) == (b.dtype, b.shape)
    pairs = zip(iter_blocks(a), iter_blocks(b))
    if not same or any(as_bytes(x) != as_bytes(y) for x, y in pairs):
        raise CheckpointError(
            f"{folder.where}: {head} is not the embedding, with which "
            "its configuration ties it"
        )


NO_WEIGHTS = ".rotary_emb.inv_freq"             # older files have it


# %% book/chapters/14_hub.md, cell 27
def read_hub(
    folder: Path, config: ModelConfig
) -> dict[tuple[str, str], Any]:
    """(module, name) -> tensor of a folder, mapped from disk."""
    family = family_of(folder / "config.json", read_config(folder))
    there = HubFolder(folder)
    parts: dict[tuple[str, str], Found] = {}
    for entry in entries(family, config):
        found = parts.setdefault(entry.path, [])
        found.append((entry.index, there.read(entry)))
    names = {name.ours: name.theirs for name in family.ends}
    if config.tied and "lm_head/embeddings" in names:
        check_head(there, names["in_out_embed/embeddings"],
                   names["lm_head/embeddings"])
    for name in sorted(set(there.arrays) - there.taken):
        if not name.endswith(NO_WEIGHTS):
            raise CheckpointError(
                f"{folder} holds {name[:80]!r}, which its configuration"
                " has no place for"
            )
    return {
        path: stacked(folder, "/".join(path), found)
        for path, found in parts.items()
    }


# %% book/chapters/14_hub.md, cell 28
def family_of(path: Path, raw: Mapping[str, Any]) -> Family:
    """The family of a configuration, by its first architecture.

    The case of letters does not count: early files have LLaMA.
    """
    found = raw.get("architectures") or raw.get("model_type")
    name = found[0] if isinstance(found, list) else found
    for architecture, family in FAMILIES.items():
        named = raw.get("architectures")
        known = architecture if named else family.model_type
        if isinstance(name, str) and name.lower() == known.lower():
            return family
    shown = repr(name[:40]) if isinstance(name, str) else "none"
    raise CheckpointError(
        f"{path} names the architecture {shown}; other layouts are "
        f"not supported: known are {', '.join(FAMILIES)}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, with the stop ids of generation_config.json."""
    raw = read_json(folder / "config.json")
    beside = folder / "generation_config.json"
    if not beside.is_file():
        return raw
    ids = read_json(beside).get("eos_token_id")
    text = raw.get("text_config")
    inner = text if isinstance(text, dict) else raw
    if ids is not None:
        inner["eos_token_id"] = ids
    return raw


# %% book/chapters/14_hub.md, cell 29
def check_scheme(path: Path, raw: Mapping[str, Any]) -> None:
    """CheckpointError for quantized weights of another format."""
    for where in (raw, raw.get("text_config")):
        for name in (
            "quantization_config", "compression_config", "quantization"
        ):
            own = where if isinstance(where, dict) else {}
            scheme = own.get(name)
            if isinstance(scheme, dict):
                method = scheme.get("quant_method")
                if method == "int8-weight-scale" or not any(
                    scheme.values()
                ):
                    continue
                scheme = method or "a method without a name"
            if scheme:
                raise CheckpointError(
                    f"{path}: {name} is not supported "
                    f"({scheme!r:.40}); "
                    "fetch the weights in bfloat16"
                )


# %% book/chapters/14_hub.md, cell 30
def hub_config(folder: Path) -> ModelConfig:
    """The configuration of a folder, by its family."""
    path, raw = folder / "config.json", read_config(folder)
    family = family_of(path, raw)
    check_scheme(path, raw)
    fields = Fields(path, raw)
    try:
        config = family.configure(fields)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    fields.finish()
    return config


# %% book/chapters/14_hub.md, cell 40
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL_FILES = ["*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
WEIGHT_FILES = ["*.safetensors", "ckpt-0/*"]


def fetch_from_hub(name: str) -> Path | None:
    """The folder of the model `name` of the hub, fetched if need be.

    None for what is no name, as `./folder`. CheckpointError where it
    cannot be had, or has a configuration that we do not support: then
    no weights are fetched.
    """
    if not HUB_NAME.fullmatch(name):
        return None
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{name} is no folder; to fetch a model of this name from "
            'the Hugging Face hub, pip install "annotated-moe[hub]"'
        ) from None
    for files in (SMALL_FILES, WEIGHT_FILES):
        try:
            found = Path(snapshot_download(
                name, allow_patterns=files,
                ignore_patterns=["original/*"],
            ))
        except Exception as error:  # the network's: many classes
            why = str(error).strip().split("\n")[0]
            raise CheckpointError(
                f"{name} is no folder, and could not be fetched from "
                f"the Hugging Face hub: {why:.200}"
            ) from None
        config = found / "config.json"
        if config.is_file() and "architectures" in read_json(config):
            hub_config(found)       # refused before weights are fetched
    return found


# %% book/chapters/14_hub.md, cell 43
def halves(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the second half of the last axis."""
    middle = w.shape[-1] // 2
    return w[..., :middle], w[..., middle:]


# What is written together is joined by whoever writes.
TRANSFORMS["first half"] = WeightTransform(
    lambda w, spec: halves(w)[0], unchanged
)
TRANSFORMS["second half"] = WeightTransform(
    lambda w, spec: halves(w)[1], unchanged
)


# %% book/chapters/14_hub.md, cell 44
class HalvesFromPairs(LazyArray):
    """[D, heads * size], each head's halves from neighbouring pairs.

    `source` is [heads * size, D], or a bias [heads * size]. What is
    read is what an index names, in whole heads.
    """

    def __init__(self, source: Any, size: int) -> None:
        self.source, self.size = source, size
        self.shape, self.dtype = source.shape[::-1], source.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        *rows, columns = (*index, *[slice(None)] * 2)[: len(self.shape)]
        start, stop, _ = columns.indices(self.shape[-1])
        first, size = start // self.size * self.size, self.size
        few = slice(first, -(-stop // size) * size)
        part = np.asarray(self.source[(few, *rows)])
        pairs = part.reshape(-1, size // 2, 2, *part.shape[1:])
        turned = pairs.swapaxes(1, 2).reshape(part.shape)
        return turned[start - first : stop - first].T


class PairsFromHalves(HalvesFromPairs):
    """The way back: `source` is [D, heads * size], or a bias."""

    def __getitem__(self, index: Any) -> np.ndarray:
        part = np.asarray(self.source).T
        pairs = part.reshape(-1, 2, self.size // 2, *part.shape[1:])
        return pairs.swapaxes(1, 2).reshape(part.shape)[index]


TRANSFORMS["halves"] = WeightTransform(
    lambda w, spec: HalvesFromPairs(w, spec.attention.head_size),
    lambda w, spec: PairsFromHalves(w, spec.attention.head_size),
)
