"""Hugging Face's layout: published configurations, fields, names on the hub."""

import json
import os
import subprocess
import sys
import types
import warnings
from dataclasses import fields, replace
from fnmatch import fnmatch
from pathlib import Path

import jax
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import checkpoints
from annotated_moe.convert import convert
from annotated_moe.families.grok import grok_config
from annotated_moe.families.llama import llama_config
from annotated_moe.formats.files import CheckpointError
from annotated_moe.formats.hub import (
    FAMILIES,
    INERT,
    Fields,
    fetch_from_hub,
    hub_config,
    read_rope,
    speaks_of_a_part,
)
from annotated_moe.formats.safetensors import read_header
from annotated_moe.model import init_params
from annotated_moe.rope import Llama3Rope, Rope

# Copied by hand from the config.json beside each model's weights.
PUBLISHED = sorted((Path(__file__).parent / "fixtures" / "configs").glob("*.json"))
# What the generation_config.json of these says besides.
STOPS = {
    "llama-3-": [128001, 128009],
    "llama-3.": [128001, 128008, 128009],
    "qwen3": [151645, 151643],
}


def folder_of(raw, folder, **beside):
    (folder / "config.json").write_text(json.dumps(raw))
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def refused(call, *words):
    with pytest.raises(CheckpointError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    for word in words:
        assert str(word) in text, text


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_configuration_is_the_preset(tmp_path, path):
    stops = [ids for name, ids in STOPS.items() if path.stem.startswith(name)]
    beside = {"generation_config": {"eos_token_id": stops[0]}} if stops else {}
    folder = folder_of(json.loads(path.read_text()), tmp_path, **beside)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = hub_config(folder)
    if path.stem in ("llama-1-7b-early", "smollm2-135m"):
        assert path.stem not in am.PRESETS
        return
    preset = am.PRESETS[path.stem]
    for field in fields(am.ModelConfig):
        if field.name != "pad_id":              # fills rows, unread
            got, want = getattr(config, field.name), getattr(preset, field.name)
            assert got == want, field.name


def test_every_preset_has_a_published_configuration():
    assert set(am.PRESETS) <= {path.stem for path in PUBLISHED}


def test_two_that_have_no_preset(tmp_path):
    published = {path.stem: json.loads(path.read_text()) for path in PUBLISHED}
    early = hub_config(folder_of(published["llama-1-7b-early"], tmp_path))
    want = replace(am.PRESETS["llama-1-7b"], eos_ids=(1,))
    assert early == want
    small = hub_config(folder_of(published["smollm2-135m"], tmp_path))
    assert small == llama_config(
        30, 9, 3, 1536, 64, vocab_size=49152, context=8192,
        rope=Rope(100000.0), tied=True, eos_ids=(0,))


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 640,
}


def read(raw, tmp_path):
    return hub_config(folder_of({**LLAMA, **raw}, tmp_path))


@pytest.mark.parametrize("raw, heads", [
    ({}, 4), ({"num_key_value_heads": None}, 4), ({"num_key_value_heads": 2}, 2),
])  # fmt: skip
def test_key_heads_that_are_not_said(tmp_path, raw, heads):
    assert read(raw, tmp_path).layer(0).attention.kv_heads == heads


def test_an_architecture_by_its_model_type(tmp_path):
    want = read({}, tmp_path)
    assert read({"architectures": None}, tmp_path) == want
    assert read({"architectures": ["LLaMAForCausalLM"]}, tmp_path) == want
    other = {"architectures": ["LlamaForSequenceClassification"]}
    refused(lambda: read(other, tmp_path), "LlamaForSequenceClassification")
    other = {"architectures": [], "model_type": "gemma"}
    refused(lambda: read(other, tmp_path), "'gemma'")


# Fields that change nothing, and those that might


NOTHING = [
    {"max_sequence_length": 2048}, {"unsloth_version": "2024.9"},
    {"unsloth_fixed": True}, {"rope_interleaved": False}, {"is_llama_config": True},
    {"id2label": {"0": "A"}, "label2id": {"A": 0}}, {"num_labels": 3},
    {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "do_sample": True},
    {"repetition_penalty": 1.1, "num_beams": 4, "max_length": 4096},
    {"attention_dropout": 0.1}, {"pretraining_tp": 2}, {"bos_token_id": 1},
    {"_attn_implementation": "flash_attention_2"}, {"attn_implementation": "sdpa"},
    {"use_cache": False}, {"transformers.js_config": {"dtype": "q4"}},
    {"layer_types": ["full_attention"] * 2}, {"tokenizer_class": "LlamaTokenizer"},
    {"attention_bias": False, "mlp_bias": False}, {"head_dim": None},
    {"rope_scaling": None}, {"partial_rotary_factor": 1.0},
    {"use_sliding_window": False}, {"quantization_config": None},
    {"gradient_checkpointing": True}, {"bad_words_ids": [[3]]},
    {"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}, {"pad_token_id": -1},
    {"quantization_config": {"load_in_4bit": False, "load_in_8bit": False}},
    {"auto_map": {"AutoModel": "modeling.X"}}, {"output_router_logits": True},
]  # fmt: skip


@pytest.mark.parametrize("raw", NOTHING, ids=lambda raw: next(iter(raw)))
def test_a_field_that_changes_nothing(tmp_path, raw):
    want = read({}, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(raw, tmp_path) == want


@pytest.mark.parametrize("raw", [
    {"attention_sinks": 4}, {"logit_scale": 0.5}, {"use_qk_norm": True},
    {"residual_multiplier": 0.2}, {"final_logit_softcapping": 30.0},
    {"num_local_experts": 8}, {"sliding_window": 64}, {"rope_interleaved": True},
    {"hidden_act": "gelu"}, {"alibi": True}, {"kv_lora_rank": 512},
    {"layer_types": ["full_attention", "linear_attention"]},
    {"partial_rotary_factor": 0.5}, {"num_nextn_predict_layers": 1},
])  # fmt: skip
def test_a_field_that_might_change_something(tmp_path, raw):
    name = next(iter(raw))
    refused(lambda: read(raw, tmp_path), tmp_path / "config.json", name)


def test_a_name_of_no_part_is_passed_over_with_a_warning(tmp_path):
    want = read({}, tmp_path)
    with pytest.warns(UserWarning, match="config.json: the field 'wandb_run' is not"):
        assert read({"wandb_run": "4f2a"}, tmp_path) == want


def test_what_transformers_writes_into_any_file_is_known():
    transformers = pytest.importorskip("transformers")
    every = {
        **transformers.PreTrainedConfig().to_dict(),
        **transformers.GenerationConfig().to_dict(),
    }
    refusable = {
        name for name in every
        if name[:1] != "_" and name not in INERT and speaks_of_a_part(name)
    }
    assert refusable == set()


MINIMAL = {
    "vocab_size": 60000, "hidden_size": 512, "intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 16,
}  # fmt: skip
CLASSES = {
    "LlamaForCausalLM": "LlamaConfig", "MistralForCausalLM": "MistralConfig",
    "MixtralForCausalLM": "MixtralConfig", "Qwen3MoeForCausalLM": "Qwen3MoeConfig",
    "OlmoeForCausalLM": "OlmoeConfig", "Llama4ForCausalLM": "Llama4TextConfig",
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_absent_fields_are_what_transformers_takes(name):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, CLASSES[name])(**MINIMAL)
    ours = FAMILIES[name].configure(Fields(Path("config.json"), MINIMAL))
    attention = ours.layer(0).attention
    assert attention.kv_heads == theirs.num_key_value_heads
    size = getattr(theirs, "head_dim", None) or 512 // 16
    assert attention.head_size == size
    assert attention.rope == Rope(theirs.rope_parameters["rope_theta"])
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.context == theirs.max_position_embeddings
    stops = theirs.eos_token_id
    assert ours.eos_ids == (() if stops is None else (stops,))
    window = getattr(theirs, "sliding_window", None)
    window = window or getattr(theirs, "attention_chunk_size", None)
    assert getattr(attention.mask, "size", None) == window
    experts = ours.layer(0).feed_forward
    for field in ("num_local_experts", "num_experts"):
        if hasattr(theirs, field):
            assert experts.num_experts == getattr(theirs, field)
            assert experts.top_k == theirs.num_experts_per_tok


# RoPE


INSIDE = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
SHORT = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
ROPE = [
    {}, {"rope_theta": 3e5}, {"rope_theta": 300000}, {"rope_parameters": INSIDE},
    {"rope_parameters": INSIDE, "rope_theta": 3e5},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 3e5},
    {"rope_parameters": {"rope_theta": 7e5}},
    {"rope_parameters": {}, "rope_theta": 9e4},
    {"rope_parameters": None, "rope_scaling": None, "rope_theta": 9e4},
    {"rope_scaling": LLAMA3}, {"rope_scaling": LLAMA3, "rope_theta": 3e5},
    {"rope_scaling": LLAMA3, "rope_parameters": INSIDE},
    {"rope_scaling": {"type": "default"}, "rope_parameters": {**LLAMA3, **INSIDE}},
    {"rope_scaling": {}, "rope_parameters": {**INSIDE, **LLAMA3}},
    {"rope_parameters": {**INSIDE, **LLAMA3}, "rope_theta": 3.0},
    {"rope_scaling": SHORT}, {"rope_scaling": {**SHORT, "type": "default"}},
    {"rope_scaling": {"type": "llama3", **SHORT, "rope_type": "default"}},
    {"rope_scaling": SHORT, "original_max_position_embeddings": 333},
    {"rope_scaling": {"rope_type": "default", "factor": 8.0}, "rope_theta": 2e4},
    {"partial_rotary_factor": 1.0, "rope_theta": 2e4},
]  # fmt: skip


@pytest.mark.parametrize("raw", ROPE, ids=str)
def test_rope_is_read_in_the_order_of_transformers(tmp_path, raw):
    transformers = pytest.importorskip("transformers")
    own = {k: v for k, v in LLAMA.items() if k != "architectures"}
    theirs = transformers.LlamaConfig(**json.loads(json.dumps({**own, **raw})))
    want = theirs.rope_parameters
    got = read(raw, tmp_path).layer(0).attention.rope
    assert got.base == want["rope_theta"]
    if want["rope_type"] == "default":
        assert got == Rope(want["rope_theta"])
        return
    assert got == Llama3Rope(
        want["rope_theta"], want["factor"], want["low_freq_factor"],
        want["high_freq_factor"], want["original_max_position_embeddings"])


@pytest.mark.parametrize("raw, word", [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
    ({"rope_parameters": {"rope_type": 3}}, "rope_type is 3"),
    ({"rope_parameters": {"full_attention": INSIDE}}, "full_attention"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "lacks the field 'factor'"),
    ({"rope_parameters": {"mrope_section": [2, 2]}}, "mrope_section"),
    ({"rope_theta": "10000"}, "rope_theta must be positive"),
    ({"rope_scaling": "llama3"}, "rope_scaling must be an object"),
])  # fmt: skip
def test_a_rope_that_is_not_supported(tmp_path, raw, word):
    refused(lambda: read(raw, tmp_path), "config.json", word)


def test_a_base_of_a_family():
    assert read_rope(Fields(Path("x"), {}), 5e5) == Rope(5e5)


# Tokens that end


def test_generation_config_decides_what_ends(tmp_path):
    def stops(raw, beside):
        folder = folder_of({**LLAMA, **raw}, tmp_path, generation_config=beside)
        return hub_config(folder).eos_ids

    assert stops({"eos_token_id": 2}, {"eos_token_id": [2, 5, 9]}) == (2, 5, 9)
    assert stops({"eos_token_id": 2}, {"eos_token_id": 7}) == (7,)
    assert stops({"eos_token_id": 2}, {"temperature": 0.6}) == (2,)
    assert stops({"eos_token_id": [3, 4]}, {}) == (3, 4)
    assert stops({}, {}) == (2,) and stops({"eos_token_id": None}, {}) == ()
    assert stops({}, {"eos_token_id": [2, 128009]}) == (2,)      # of 64 tokens
    refused(lambda: stops({}, {"eos_token_id": "</s>"}), "eos_token_id")


def test_generation_config_of_a_model_that_sees(tmp_path):
    (path,) = [p for p in PUBLISHED if p.stem == "llama-4-scout"]
    beside = {"generation_config": {"eos_token_id": 200007}}
    folder = folder_of(json.loads(path.read_text()), tmp_path, **beside)
    assert hub_config(folder).eos_ids == (200007,)


# Weights in other formats


SCHEMES = [
    {"quant_method": "fp8", "activation_scheme": "dynamic"},
    {"quant_method": "gptq", "bits": 4}, {"quant_method": "awq", "bits": 4},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "compressed-tensors", "format": "float-quantized"},
    {"bits": 4, "group_size": 128}, "int4",
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_quantized_weights_are_refused_by_what_the_file_says(tmp_path, scheme, field):
    words = tmp_path / "config.json", field, "bfloat16"
    refused(lambda: read({field: scheme}, tmp_path), *words)
    (path,) = [p for p in PUBLISHED if p.stem == "llama-4-maverick"]
    maverick = json.loads(path.read_text())
    for raw in (
        {**maverick, field: scheme},
        {**maverick, "text_config": {**maverick["text_config"], field: scheme}},
    ):
        refused(lambda raw=raw: hub_config(folder_of(raw, tmp_path)), *words)


# Written, and read by others


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Llama 3 of two layers, as `convert --to hf` writes it."""
    home = tmp_path_factory.mktemp("tiny")
    config = replace(llama_config(
        2, 4, 2, 48, 8, vocab_size=64, context=640,
        rope=Llama3Rope(500000.0, 4.0, 1.0, 4.0, 64), eos_ids=(2, 5),
    ), dtype="float32")
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    am.save(am.Model(config, params), home / "ours")
    convert(home / "ours", home / "hf", "hf")
    return home


TOKENS = np.random.default_rng(0).integers(1, 64, (2, 90))


def test_transformers_reads_what_we_write(tiny):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny / "hf")
    assert theirs.config.rope_parameters["rope_theta"] == 500000.0
    with torch.no_grad():
        want = theirs(torch.tensor(TOKENS)).logits.numpy()
    got = am.load(tiny / "hf", dtype="float32").logits(TOKENS)
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert np.std(want) > 0.05


def test_both_spellings_and_the_format(tiny):
    """transformers 4 reads the older, and asks for the format."""
    raw = json.loads((tiny / "hf/config.json").read_text())
    older, newer = raw["rope_scaling"], raw["rope_parameters"]
    assert raw["rope_theta"] == newer["rope_theta"] == 500000.0
    assert {**older, "rope_theta": 500000.0} == newer
    assert raw["torch_dtype"] == raw["dtype"] == "float32"
    data = (tiny / "hf/model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert header["__metadata__"] == {"format": "pt"}
    assert "__metadata__" not in read_header(np.frombuffer(data, np.uint8))[0]


def test_what_no_architecture_can_say_is_not_written(tmp_path):
    config = grok_config(
        vocab_size=64, context=32, d_model=32, d_ff=48, num_layers=2, q_heads=4,
        kv_heads=2, head_size=8, num_experts=1)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    am.save(am.Model(config, params), tmp_path / "a")
    refused(lambda: convert(tmp_path / "a", tmp_path / "b", "hf"), "no architecture")


# A name in place of a folder


def cached(home, name, folder):
    """`folder` as the hub's library keeps it under `home`."""
    place = home / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0123abcd")
    (place / "snapshots").mkdir()
    os.symlink(folder, place / "snapshots/0123abcd")


OFFLINE = """
import sys
import annotated_moe as am
for name in sys.argv[1:]:
    try:
        print(am.load(name, dtype="float32"))
    except am.CheckpointError as error:
        print(error)
"""


def test_a_name_on_the_hub_is_fetched_and_a_folder_goes_before(tiny, tmp_path):
    pytest.importorskip("huggingface_hub")
    cached(tmp_path / "cache", "org/tiny", tiny / "hf")
    cached(tmp_path / "cache", "org/there", tiny / "hf")
    (tmp_path / "org/there").mkdir(parents=True)
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    words = ["org/tiny", "org/absent", "org/there"]
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *words], cwd=tmp_path, env=env, text=True,
        capture_output=True, check=True)
    fetched, absent, there = done.stdout.splitlines()
    assert fetched == "<Model: 2 layers, width 32, 64 tokens, float32>"
    assert absent.startswith("org/absent is no folder, and could not be fetched")
    assert "org/there holds no checkpoint" in there


def test_without_the_hubs_library_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(lambda: am.load("org/name"), "org/name is no folder", "annotated-moe[hub]")


@pytest.mark.parametrize("name", [
    "name", "./org/name", "/org/name", "../name", "a/b/c", "org/", "-org/name",
    "org/.name", "org name/x",
])  # fmt: skip
def test_what_is_no_name(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert fetch_from_hub(name) is None
    refused(lambda: am.load(name), "is not a folder")


def test_a_finder_is_asked_only_for_what_does_not_exist(monkeypatch, tiny):
    asked = []
    monkeypatch.setattr(checkpoints, "FINDERS", [
        lambda name: asked.append(name), lambda name: tiny / "hf"])
    assert am.load("anything").config.num_layers == 2
    am.load(tiny / "ours")
    assert asked == ["anything"]


def test_the_newer_dtype_goes_first(tmp_path):
    assert read({"dtype": "float32"}, tmp_path).dtype == "float32"
    both = {"dtype": "bfloat16", "torch_dtype": "float32"}
    assert read(both, tmp_path).dtype == "bfloat16"
    refused(lambda: read({"dtype": "flaot32"}, tmp_path), "dtype is 'flaot32'")


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_a_part_of_a_head_turned_is_refused_inside_too(tmp_path, place):
    inner = {"rope_type": "default", "partial_rotary_factor": 0.5}
    refused(lambda: read({place: inner}, tmp_path), "partial_rotary_factor")


def test_what_is_fetched(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, **options):
        asked.append(options)
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert fetch_from_hub("org/tiny") == tmp_path

    def taken(file, options):
        return (any(fnmatch(file, p) for p in options["allow_patterns"])
                and not any(fnmatch(file, p) for p in options["ignore_patterns"]))

    small, weights = asked
    for file in ("config.json", "model.safetensors.index.json", "tokenizer.model",
                 "chat_template.jinja"):
        assert taken(file, small) and not taken(file, weights), file
    for file in ("model-00001-of-00002.safetensors", "ckpt-0/tensor00000_000"):
        assert taken(file, weights) and not taken(file, small), file
    for file in ("pytorch_model.bin", "original/consolidated.safetensors",
                 "original/params.json", "model.gguf"):
        assert not any(taken(file, options) for options in asked), file
    asked.clear()
    (tmp_path / "config.json").write_text('{"architectures": ["GemmaForCausalLM"]}')
    refused(lambda: fetch_from_hub("org/gemma"), "GemmaForCausalLM")
    assert len(asked) == 1                      # and no weights
