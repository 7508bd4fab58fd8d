"""The programs that `benchmarks/table.py` compares, each in a process of its own.

    python benchmarks/programs.py NAME FOLDER       # speaks JSON, a line a call

Every program answers two calls on the same weights: `complete` gives the greedy
continuation of some prompts, and `logprobs` what may follow a prompt, to check that
all compute the same model. Two are of another kind: the release's formulation runs
Grok-1's layer, so it holds itself to ours on that layer; the plain read has no model.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
Rows = list[list[int]]


def shapes(c: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face's names, and the shapes as their files have them."""
    d, f, h = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * h, c["num_key_value_heads"] * h
    yield "model.embed_tokens.weight", (c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (d,)
        yield f"{layer}.post_attention_layernorm.weight", (d,)
        for name, out, into in (
            ("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q)
        ):
            yield f"{layer}.self_attn.{name}_proj.weight", (out, into)
        moe = f"{layer}.block_sparse_moe"
        yield f"{moe}.gate.weight", (c["num_local_experts"], d)
        for e in range(c["num_local_experts"]):
            for name, out, into in (("w1", f, d), ("w2", d, f), ("w3", f, d)):
                yield f"{moe}.experts.{e}.{name}.weight", (out, into)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (c["vocab_size"], d)


def write_model(folder: Path, sizes: dict[str, Any] = SIZES) -> None:
    """A Mixtral of random float32 weights, as Hugging Face lays it out."""
    from safetensors.numpy import save_file

    rng, tensors = np.random.default_rng(0), {}
    for name, shape in shapes(sizes):
        x = rng.standard_normal(shape, np.float32)
        gain = len(shape) == 1
        tensors[name] = 1 + 0.1 * x if gain else x * shape[-1] ** -0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(sizes))


def turned(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in the order of llama.cpp, which pairs neighbours."""
    halves = w.reshape(heads, 2, -1, w.shape[1])
    return halves.swapaxes(1, 2).reshape(w.shape)


def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """The same model as llama.cpp reads it; `kind` is "Q8_0" or "F16"."""
    import gguf
    from safetensors.numpy import load_file

    c = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_rope_dimension_count(c["head_dim"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_expert_count(c["num_local_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_tokenizer_model("llama")         # of made-up words: ids go in and out
    words = [f"w{i}" for i in range(c["vocab_size"])]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([1] * len(words))
    writer.add_add_bos_token(False)

    wide = gguf.GGMLQuantizationType[kind]

    def add(name: str, w: np.ndarray, float32: bool = False) -> None:
        own = gguf.GGMLQuantizationType.F32 if float32 else wide
        data = np.ascontiguousarray(w, np.float32)
        data = data if float32 else gguf.quants.quantize(data, own)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=own)

    add("token_embd", tensors["model.embed_tokens.weight"])
    for i in range(c["num_hidden_layers"]):
        theirs, ours = f"model.layers.{i}", f"blk.{i}"
        add(f"{ours}.attn_norm", tensors[f"{theirs}.input_layernorm.weight"], True)
        after = tensors[f"{theirs}.post_attention_layernorm.weight"]
        add(f"{ours}.ffn_norm", after, True)
        q, k, v, o = (
            tensors[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkvo"
        )
        add(f"{ours}.attn_q", turned(q, heads))
        add(f"{ours}.attn_k", turned(k, kv))
        add(f"{ours}.attn_v", v)
        add(f"{ours}.attn_output", o)
        moe = f"{theirs}.block_sparse_moe"
        add(f"{ours}.ffn_gate_inp", tensors[f"{moe}.gate.weight"], True)
        for name, part in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            stack = np.stack([
                tensors[f"{moe}.experts.{e}.{name}.weight"]
                for e in range(c["num_local_experts"])
            ])
            add(f"{ours}.ffn_{part}_exps", stack)
    add("output_norm", tensors["model.norm.weight"], True)
    add("output", tensors["lm_head.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_logprobs(y: np.ndarray) -> np.ndarray:
    y = y.astype(np.float64)
    return y - y.max() - np.log(np.exp(y - y.max()).sum())


class Ours:
    """The package, through its front door."""

    needs = ("jax", "annotated_moe")

    def __init__(self, folder: Path, kind: str) -> None:
        import annotated_moe as am

        if kind == "int8":
            from annotated_moe.convert import quantize_files

            files = folder.with_name(f"{folder.name}-int8")
            if not files.exists():
                quantize_files(folder, files)
            self.model = am.load(files)
        else:
            self.model = am.load(folder, dtype=kind)

    def complete(self, prompts: Rows, count: int) -> Rows:
        return self.model.generate_ids(prompts, max_new_tokens=count, stop_ids=[])

    def logprobs(self, prompt: list[int]) -> np.ndarray:
        y = np.asarray(self.model.logits(np.array([prompt])))[0, -1]
        return as_logprobs(y)


class Transformers:
    """Hugging Face's Mixtral: a forward pass a token, without `generate`'s checks."""

    needs = ("torch", "transformers")

    def __init__(self, folder: Path, kind: str) -> None:
        import torch
        import transformers

        kind, _, experts = kind.partition("/")
        torch.set_num_threads(os.cpu_count() or 1)
        self.torch, self.cache = torch, transformers.DynamicCache
        self.model = transformers.MixtralForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, kind),
            experts_implementation=experts or None,
        ).eval()

    def complete(self, prompts: Rows, count: int) -> Rows:
        torch, new = self.torch, []
        with torch.inference_mode():
            cache = self.cache(config=self.model.config)
            token = torch.tensor(prompts)
            for _ in range(count):
                y = self.model(
                    token, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                token = y.logits[:, -1:].argmax(-1)
                new.append(token[:, 0].tolist())
        return [list(row) for row in zip(*new)]

    def logprobs(self, prompt: list[int]) -> np.ndarray:
        with self.torch.inference_mode():
            y = self.model(self.torch.tensor([prompt]), logits_to_keep=1)
        return as_logprobs(y.logits[0, -1].float().numpy())


class LlamaCpp:
    """llama.cpp's server, asked from within its process."""

    needs = ("xllamacpp", "gguf")
    slots = 8

    def __init__(self, folder: Path, kind: str) -> None:
        import xllamacpp

        path = folder / f"{kind}.gguf"
        if not path.exists():
            write_gguf(folder, path, kind)
        p = xllamacpp.CommonParams()
        p.model.path = str(path)
        p.n_parallel, p.n_threads_http = self.slots, 16
        p.n_ctx = self.slots * 1024
        p.n_batch = p.n_ubatch = 512
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = os.cpu_count() or 1
        p.cache_ram_mib, p.warmup, p.verbosity = 0, True, 1
        self.server = xllamacpp.Server(p)
        self.vocab = json.loads((folder / "config.json").read_text())["vocab_size"]

    def ask(self, prompts: Rows, count: int, **more: Any) -> list[dict[str, Any]]:
        job = {
            "prompt": prompts if len(prompts) > 1 else prompts[0],
            "n_predict": count, "temperature": 0, "samplers": ["temperature"],
            "ignore_eos": True, "cache_prompt": False, **more,
        }
        answer = self.server.handle_completions(job)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        if "choices" not in answer:
            raise SystemExit(f"llama.cpp answers {str(answer)[:200]}")
        return sorted(answer["choices"], key=lambda one: one["index"])

    def complete(self, prompts: Rows, count: int) -> Rows:
        words = [one["text"].split("w")[1:] for one in self.ask(prompts, count)]
        return [[int(word) for word in row] for row in words]

    def logprobs(self, prompt: list[int]) -> np.ndarray:
        (one,) = self.ask([prompt], 1, n_probs=64)
        found = np.full(self.vocab, np.nan)
        for entry in one["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found


class Release:
    """The formulation that was published with Grok-1, of `decode.py`."""

    needs = ("jax",)
    steps = 4                                   # of decoding, where others make 32

    def __init__(self, folder: Path, kind: str) -> None:
        import decode
        import jax.numpy as jnp

        self.decode, self.jnp = decode, jnp
        params = decode.random_params(decode.CONFIG)
        self.sides = {
            context: decode.Published(params, replace(decode.SIZES, context=context))
            for context in (64, 512)
        }
        exact = replace(decode.SIZES, dtype="float32", context=64)
        prompt = jnp.arange(3, 19)[None]
        one = decode.Published(params, exact).start(prompt)
        other = decode.Ours(params, exact).start(prompt)
        if not np.abs(one - other).max() < 1e-3:
            raise SystemExit("the release's formulation and ours do not agree")

    def complete(self, prompts: Rows, count: int) -> Rows:
        longest = len(prompts[0]) + count - 1
        side = self.sides[min(c for c in self.sides if c >= longest)]
        y, new = side.start(self.jnp.asarray(prompts)), []
        for i in range(count):
            token = self.decode.greedy(y)
            new.append(np.asarray(token).tolist())
            y = side.step(token) if i + 1 < count else y
        return [list(row) for row in zip(*new)]

    def logprobs(self, prompt: list[int]) -> None:
        return None


class PlainRead:
    """NumPy adds up memory, a thread a core: bytes a second, and nothing else."""

    needs = ()
    size = 2**29

    def __init__(self, folder: Path, kind: str) -> None:
        self.words = np.ones(self.size // 8, np.int64)

    def read(self) -> float:
        parts = np.array_split(self.words, os.cpu_count() or 1)
        with ThreadPoolExecutor(len(parts)) as pool:
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            return self.size / (time.perf_counter() - start)


def serve(program: Any, reply: Callable[[Any], None]) -> None:
    for line in sys.stdin:
        call = json.loads(line)
        if call["call"] == "read":
            reply(program.read())
        elif call["call"] == "logprobs":
            y = program.logprobs(call["prompt"])
            reply(y if y is None else [None if np.isnan(x) else float(x) for x in y])
        else:
            start = time.perf_counter()
            new = program.complete(call["prompts"], call["count"])
            seconds = time.perf_counter() - start
            if [len(row) for row in new] != [call["count"]] * len(call["prompts"]):
                raise SystemExit("not as many new tokens as were asked for")
            reply(seconds)


PROGRAMS: dict[str, tuple[Any, str]] = {
    "ours, float32": (Ours, "float32"),
    "ours, bfloat16": (Ours, "bfloat16"),
    "ours, int8": (Ours, "int8"),
    "transformers, float32": (Transformers, "float32"),
    "transformers, bfloat16": (Transformers, "bfloat16"),
    "llama.cpp, f16": (LlamaCpp, "F16"),
    "llama.cpp, Q8_0": (LlamaCpp, "Q8_0"),
    "the release's formulation, int8": (Release, "int8"),
    "plain read": (PlainRead, ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PROGRAMS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")             # what libraries print goes elsewhere
    os.dup2(2, 1)

    def reply(value: Any) -> None:
        print(json.dumps(value), file=out, flush=True)

    kind, word = PROGRAMS[args.name]
    program = kind(args.folder, word)
    reply("ready")
    serve(program, reply)


if __name__ == "__main__":
    main()
