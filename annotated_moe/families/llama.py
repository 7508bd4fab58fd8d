# Generated from book/chapters/15_llama.md by `make sync`; edit the chapter.
"""Give the small model of this book, which learned on 256 tokens at a
time, a text of 1,024, and it reads the second half worse, by more than
half a nat a token, than if it forgot everything every 256 tokens. Llama
3.1 went from 8,192 tokens to 131,072, and its file says how in four
numbers. This chapter is about Llama, of which many open models are a
variation: what it leaves out of Grok-1, what each of its generations
changed, and how those four numbers work. By its end you will have
eighteen Llamas, from 1 to 405 billion parameters, as a page of plain
data, a proof that the complex numbers in which they were published
compute what this book computes, and the small model reading its 1,024
tokens, mended in a line and without training.
"""

from typing import Any

from annotated_moe.attention import AttentionSpec
from annotated_moe.config import (
    LayerSpec,
    ModelConfig,
    Segment,
    as_segments,
)
from annotated_moe.formats.hub import (
    FAMILIES,
    ROPE_FIELDS,
    ROPES,
    Family,
    Fields,
    WeightName,
    one_or_many,
    read_dtype,
    read_rope,
    stop_ids,
    write_rope,
)
from annotated_moe.moe import FeedForwardSpec
from annotated_moe.rope import Llama3Rope, Rope

# %% book/chapters/15_llama.md, cell 12
PLAIN = Rope(10000.0)


def llama_config(
    layers: int, q_heads: int, kv_heads: int, d_ff: int,
    head_size: int = 128,
    *,
    vocab_size: int = 32000,
    context: int = 2048,
    norm_eps: float = 1e-5,
    rope: Rope = PLAIN,
    tied: bool = False,
    eos_ids: tuple[int, ...] = (2,),
    d_model: int | None = None,
) -> ModelConfig:
    """A dense model as all Llamas are. Source: Llama's releases."""
    attention = AttentionSpec(
        q_heads, kv_heads, head_size, head_size**-0.5, rope=rope
    )
    network = FeedForwardSpec(d_ff, "silu")
    layer = LayerSpec(attention, network, norm_eps)
    return ModelConfig(
        vocab_size, context, d_model or q_heads * head_size,
        (Segment((layer,), layers),), norm_eps=norm_eps, tied=tied,
        eos_ids=eos_ids,
    )


# %% book/chapters/15_llama.md, cell 42
LLAMA_1: dict[str, Any] = {"context": 2048, "norm_eps": 1e-6}
LLAMA_2: dict[str, Any] = {"context": 4096}
CODE_LLAMA: dict[str, Any] = {
    "vocab_size": 32016, "context": 16384, "rope": Rope(1000000.0),
}
LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256, "context": 8192, "rope": Rope(500000.0),
    "eos_ids": (128001, 128009),
}
LLAMA_3_1: dict[str, Any] = LLAMA_3 | {
    "context": 131072,
    "rope": Llama3Rope(500000.0, 8.0, 1.0, 4.0, 8192),
    "eos_ids": (128001, 128008, 128009),
}
LLAMA_3_2: dict[str, Any] = LLAMA_3_1 | {
    "rope": Llama3Rope(500000.0, 32.0, 1.0, 4.0, 8192), "tied": True,
}


# %% book/chapters/15_llama.md, cell 43
# Source: the params.json or config.json beside each model's weights.
LLAMAS = {
    "llama-1-7b": llama_config(32, 32, 32, 11008, **LLAMA_1),
    "llama-1-13b": llama_config(40, 40, 40, 13824, **LLAMA_1),
    "llama-1-33b": llama_config(60, 52, 52, 17920, **LLAMA_1),
    "llama-1-65b": llama_config(
        80, 64, 64, 22016, **LLAMA_1 | {"norm_eps": 1e-5}),
    "llama-2-7b": llama_config(32, 32, 32, 11008, **LLAMA_2),
    "llama-2-13b": llama_config(40, 40, 40, 13824, **LLAMA_2),
    "llama-2-70b": llama_config(80, 64, 8, 28672, **LLAMA_2),
    "code-llama-7b": llama_config(32, 32, 32, 11008, **CODE_LLAMA),
    "code-llama-13b": llama_config(40, 40, 40, 13824, **CODE_LLAMA),
    "code-llama-34b": llama_config(
        48, 64, 8, 22016, **CODE_LLAMA | {"vocab_size": 32000}),
    "llama-3-8b": llama_config(32, 32, 8, 14336, **LLAMA_3),
    "llama-3-70b": llama_config(80, 64, 8, 28672, **LLAMA_3),
    "llama-3.1-8b": llama_config(32, 32, 8, 14336, **LLAMA_3_1),
    "llama-3.1-70b": llama_config(80, 64, 8, 28672, **LLAMA_3_1),
    "llama-3.1-405b": llama_config(126, 128, 8, 53248, **LLAMA_3_1),
    "llama-3.2-1b": llama_config(16, 32, 8, 8192, 64, **LLAMA_3_2),
    "llama-3.2-3b": llama_config(28, 24, 8, 8192, **LLAMA_3_2),
    "llama-3.3-70b": llama_config(80, 64, 8, 28672, **LLAMA_3_1),
}


# %% book/chapters/15_llama.md, cell 50
NORMS = (
    WeightName("input_layernorm.weight", "rms_norm/scale"),
    WeightName("post_attention_layernorm.weight", "rms_norm_2/scale"),
)


def projections(
    theirs: str, ours: str, names: dict[str, str],
    transforms: dict[str, str] | None = None,
) -> tuple[WeightName, ...]:
    """Names of matrices and biases; `names` maps theirs to ours."""
    changes = transforms or {}
    found = []
    for a, b in names.items():
        matrix = changes.get(a, "transpose")
        vector = "as is" if matrix == "transpose" else matrix
        name = f"{theirs}{a}_proj"
        found += [
            WeightName(f"{name}.weight", f"{ours}{b}/w", matrix),
            WeightName(f"{name}.bias", f"{ours}{b}/b", vector),
        ]
    return tuple(found)


QKVO = {"q": "query", "k": "key", "v": "value", "o": "linear"}
GLU = {"gate": "linear", "up": "linear_v", "down": "linear_1"}
ATTENTION = projections("self_attn.", "multi_head_attention/", QKVO)
MLP = projections("mlp.", "", GLU)


# %% book/chapters/15_llama.md, cell 52
def read_llama3_rope(fields: Fields, base: float) -> Rope:
    return Llama3Rope(
        base, fields.number("factor"), fields.number("low_freq_factor"),
        fields.number("high_freq_factor"),
        fields.size("original_max_position_embeddings"),
    )


ROPES["llama3"] = read_llama3_rope
ROPE_FIELDS[Llama3Rope] = lambda rope: {
    "rope_type": "llama3", "factor": rope.factor,
    "low_freq_factor": rope.low, "high_freq_factor": rope.high,
    "original_max_position_embeddings": rope.context,
}


# %% book/chapters/15_llama.md, cell 53
def check_layer_types(fields: Fields, name: str) -> None:
    """CheckpointError unless all layers, if any are named, are so."""
    types = fields.get("layer_types", [])
    if not isinstance(types, list) or set(map(str, types)) - {name}:
        raise fields.error(
            f"layer_types may name {name!r} alone: {types!r:.80}"
        )


def write_attention(spec: AttentionSpec) -> dict[str, Any]:
    """The fields of attention that all these families share."""
    return {
        "num_attention_heads": spec.q_heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_size,
        "attention_bias": spec.bias,
        **(write_rope(spec.rope) if spec.rope else {}),
    }


# %% book/chapters/15_llama.md, cell 54
class LlamaFamily(Family):
    """Llama, and what its relatives have in common with it."""

    model_type = "llama"
    rope_base = 10000.0
    norm_eps = 1e-6
    defaults = {"eos_token_id": 2}

    def layer(self, spec: LayerSpec) -> tuple[WeightName, ...]:
        return NORMS + ATTENTION + MLP

    def read_attention(self, fields: Fields) -> AttentionSpec:
        heads = fields.size("num_attention_heads")
        size = fields.size("head_dim", max(
            1, fields.size("hidden_size") // heads))
        fields.only("rope_interleaved", False)
        return AttentionSpec(
            heads, fields.size("num_key_value_heads", heads), size,
            size**-0.5, rope=read_rope(fields, self.rope_base),
            bias=fields.flag("attention_bias"),
        )

    def read_layers(self, fields: Fields) -> list[LayerSpec]:
        """What each layer is."""
        network = FeedForwardSpec(
            fields.size("intermediate_size"), "silu",
            fields.flag("mlp_bias"),
        )
        layer = LayerSpec(
            self.read_attention(fields), network, self.read_eps(fields)
        )
        check_layer_types(fields, "full_attention")
        return [layer] * fields.size("num_hidden_layers")

    def read_eps(self, fields: Fields) -> float:
        return fields.number("rms_norm_eps", self.norm_eps)

    def read(self, fields: Fields) -> ModelConfig:
        fields.only("hidden_act", "silu")
        if fields.size("num_hidden_layers") > 9999:
            raise fields.error("num_hidden_layers is beyond any model")
        pad = fields.get("pad_token_id", 0)
        return ModelConfig(
            fields.size("vocab_size"),
            fields.size("max_position_embeddings", 2048),
            fields.size("hidden_size"),
            as_segments(self.read_layers(fields)),
            norm_eps=self.read_eps(fields),
            tied=fields.flag("tie_word_embeddings"),
            pad_id=0 if pad == -1 else pad,
            eos_ids=stop_ids(fields),
            dtype=read_dtype(fields),
        )

    def write_layers(self, config: ModelConfig) -> dict[str, Any]:
        """The fields that `read_layers` reads."""
        layer = config.layer(0)
        network = layer.feed_forward
        if not isinstance(network, FeedForwardSpec):
            raise ValueError("this architecture has no experts")
        return {
            **write_attention(layer.attention),
            "intermediate_size": network.width,
            "mlp_bias": network.bias,
            "rms_norm_eps": layer.norm_eps,
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.context,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.num_layers,
            "tie_word_embeddings": config.tied,
            "hidden_act": "silu",
            "pad_token_id": config.pad_id,
            "eos_token_id": one_or_many(config.eos_ids),
            "dtype": config.dtype,
            "torch_dtype": config.dtype,
            **self.write_layers(config),
        }


FAMILIES["LlamaForCausalLM"] = LlamaFamily()
