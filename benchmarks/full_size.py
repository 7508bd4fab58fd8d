"""Grok-1 at full size on one small machine: files, tokens, bytes, memory.

Makes a folder in the Grok-1 layout with the real shapes of all 64 layers. One
layer is filled with random int8 and small bfloat16 scales and hard-linked for
the other 63, so that 318 GB of files take 8 GB of disk. Then it runs
`annotated-moe info` and `annotated-moe generate --stream` on the folder as a
user would, watches their memory from outside, and reads the bytes that a token
needs once more, plainly, from start to end, for comparison.

    python benchmarks/full_size.py FOLDER --tokenizer tokenizer.model

The tokenizer is the one that the release publishes. FOLDER must not exist; it
is deleted at the end unless --keep is given.
"""

import argparse
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np

from annotated_moe.checkpoints import groups_for
from annotated_moe.config import ModelConfig
from annotated_moe.families import PRESETS
from annotated_moe.formats.grok1 import our_path, release_names
from annotated_moe.model import flat_specs
from annotated_moe.params import ParamSpec

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PIECE = 2**24                                               # numbers at a time


class QuantizedWeight8bit:
    """Pickled under the name that the release used."""

    def __init__(self, weight: Any, scales: Any) -> None:
        self.weight, self.scales = weight, scales


QuantizedWeight8bit.__module__ = "__main__"


class Later:
    """An array whose bytes are written when its pickle is.

    It pickles exactly as a NumPy array of this shape does, but for the bytes:
    a placeholder stands for them, long enough (over 64 KiB) that pickle gives
    it no frame, as it gives none to the real ones.
    """

    PLACE = bytes(range(256)) * 300

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, fill: Any) -> None:
        self.shape, self.dtype, self.fill = shape, dtype, fill

    def __reduce__(self) -> tuple:
        small = np.empty((1,) * len(self.shape), self.dtype)
        make, args, state = small.__reduce__()
        version, _, dtype, fortran, _ = state
        place = bytes(bytearray(self.PLACE))        # pickle refers to what it knows
        return make, args, (version, self.shape, dtype, fortran, place)


def pieces(later: Later, rng: np.random.Generator) -> Iterator[bytes]:
    left = math.prod(later.shape)
    while left:
        count = min(left, PIECE)
        yield np.asarray(later.fill(rng, count), later.dtype).tobytes()
        left -= count


def write_pickle(path: Path, tensor: Any, arrays: list[Later], rng: Any) -> None:
    """`pickle.dump(tensor, protocol=4)` without the tensor in memory."""
    main = sys.modules["__main__"]
    with patch.object(main, "QuantizedWeight8bit", QuantizedWeight8bit, create=True):
        data = pickle.dumps(tensor, protocol=4)
    parts = data.split(Later.PLACE)
    if len(parts) != len(arrays) + 1:
        raise SystemExit("pickle has written this otherwise than expected")
    head = b"B" + len(Later.PLACE).to_bytes(4, "little")
    with open(path, "wb") as file:
        for part, later in zip(parts, arrays):
            size = math.prod(later.shape) * later.dtype.itemsize
            if part[-5:] != head or size >= 2**32:
                raise SystemExit("pickle has written this otherwise than expected")
            file.write(part[:-5] + b"B" + size.to_bytes(4, "little"))
            for piece in pieces(later, rng):
                file.write(piece)
        file.write(parts[-1])


def write_tensor(file: Path, spec: ParamSpec, shape: tuple[int, ...], rng: Any) -> None:
    """Weights of a size that keeps activations near 1."""
    spread = shape[-2] ** -0.5 if len(shape) > 1 else 1.0
    if not spec.matrix:
        if len(shape) == 1:
            array = 1 + 0.1 * rng.standard_normal(shape, np.float32)
            file.write_bytes(pickle.dumps(array, protocol=4))
            return
        if "vocab" in spec.axes:
            spread = shape[-1] ** -0.5
        fill = lambda r, n: r.standard_normal(n, np.float32) * spread  # noqa: E731
        later = Later(shape, np.dtype("f4"), fill)
        write_pickle(file, later, [later], rng)
        return
    weight = Later(
        shape, np.dtype("i1"), lambda r, n: r.integers(-127, 128, n, np.int8)
    )
    scale = spread / 73.3                                   # of uniform int8
    shape = (*shape[:-2], groups_for(spec), shape[-1])
    scales = np.asarray(scale * (0.5 + rng.random(shape)), BFLOAT16)
    if scales.nbytes < 2**16:
        write_pickle(file, QuantizedWeight8bit(weight, scales), [weight], rng)
        return
    late = Later(shape, BFLOAT16, lambda r, n: scale * (0.5 + r.random(n)))
    write_pickle(file, QuantizedWeight8bit(weight, late), [weight, late], rng)


def specs_of(config: ModelConfig) -> dict[str, ParamSpec]:
    return {"/".join(path): spec for path, spec in flat_specs(config).items()}


def make(folder: Path, config: ModelConfig) -> None:
    inside = folder / "ckpt-0"
    inside.mkdir(parents=True)
    rng, specs = np.random.default_rng(0), specs_of(config)
    first: dict[str, Path] = {}
    for i, name in enumerate(release_names(specs, config.num_layers)):
        path, layer = our_path(name)
        file = inside / f"tensor{i:05d}_000"
        if path in first:
            os.link(first[path], file)
            continue
        shape = specs[path].shape[0 if layer is None else 1 :]
        write_tensor(file, specs[path], shape, rng)
        first[path] = file


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of a process by kind, as the kernel counts them."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.findall(r"(Rss\w+|VmRSS|VmPTE):\s+(\d+) kB", text)
    return {name: int(size) * 1024 for name, size in found}


def watch(pid: int, peak: dict[str, int], done: threading.Event) -> None:
    while not done.wait(0.05):
        try:
            now = memory_of(pid)
        except (OSError, ProcessLookupError):
            return
        for name, size in now.items():
            peak[name] = max(peak.get(name, 0), size)


def run(*words: str) -> tuple[str, float, dict[str, int]]:
    """A command's status lines, its seconds, its peaks."""
    start, done = time.perf_counter(), threading.Event()
    code = "import sys; from annotated_moe.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    peak: dict[str, int] = {}
    watcher = threading.Thread(target=watch, args=(process.pid, peak, done))
    watcher.start()
    lines = []
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        lines.append(line)
    if process.wait():
        raise SystemExit(f"annotated-moe {words[0]} failed")
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return "".join(lines), seconds, peak


def token_bytes(folder: Path, config: ModelConfig) -> list[tuple[Path, int]]:
    """Files, and how much of each a token needs: two experts of eight."""
    needed, specs = [], specs_of(config)
    experts = config.layer(0).feed_forward
    for i, name in enumerate(release_names(specs, config.num_layers)):
        file = folder / f"ckpt-0/tensor{i:05d}_000"
        size = file.stat().st_size
        if "experts" in specs[our_path(name)[0]].axes:
            size = size * experts.top_k // experts.num_experts
        needed.append((file, size))
    return needed


def read_plainly(needed: list[tuple[Path, int]]) -> float:
    """Bytes a second of read() into one buffer, file after file."""
    buffer, start = memoryview(bytearray(2**22)), time.perf_counter()
    for path, size in needed:
        with open(path, "rb", buffering=0) as file:
            while size > 0:
                size -= file.readinto(buffer[: min(size, 2**22)]) or size
    return sum(size for _, size in needed) / (time.perf_counter() - start)


def sum_mapped(needed: list[tuple[Path, int]]) -> float:
    """Bytes a second of NumPy adding up a memory map, file after file."""
    start = time.perf_counter()
    for path, size in needed:
        words = np.memmap(path, np.uint8, "r")[: size // 8 * 8].view(np.int64)
        words.sum()
    return sum(size for _, size in needed) / (time.perf_counter() - start)


def report(text: str, peak: dict[str, int], plain: list[dict[str, float]]) -> None:
    tokens = re.findall(r"token \d+: ([\d.]+) s a token, ([\d.e+]+) GB", text)
    seconds = np.array([float(s) for s, _ in tokens])
    size = float(tokens[-1][1])
    speed = size / float(np.median(seconds[2:]))
    print(f"\nprompt and first token  {seconds[0]:8.1f} s")
    spans = ", ".join(f"{s:.1f}" for s in seconds[1:])
    print(f"seconds a token after it   {spans}")
    print(f"median once compiled    {np.median(seconds[2:]):8.1f} s")
    print(f"read a token            {size:8.1f} GB, so {speed:.1f} GB/s")
    for name in plain[0]:
        found = [run[name] / 1e9 for run in plain]
        mean = sum(found) / len(found)
        print(f"{name:24}{mean:8.1f} GB/s before and after "
              f"({', '.join(f'{x:.1f}' for x in found)}): "
              f"streaming reaches {speed / mean:.0%}")
    for name, most in peak.items():
        print(f"peak {name:19}{most / 2**30:8.2f} GiB")
    print("peak resident memory without page cache is RssAnon; RssFile is page cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="to make, 8 GB; must not exist")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--prompt", default="In the beginning")
    parser.add_argument("--tokens", type=int, default=6, help="[6]")
    parser.add_argument("--keep", action="store_true", help="leave FOLDER there")
    parser.add_argument("--reuse", action="store_true", help="FOLDER is there")
    args = parser.parse_args()
    config, folder = PRESETS["grok-1"], args.folder
    if args.tokens < 3:
        parser.error("--tokens must be 3 or more: two are spent on compiling")
    if not args.reuse:
        start = time.perf_counter()
        make(folder, config)
        shutil.copy(args.tokenizer, folder / "tokenizer.model")
        print(f"made {folder} in {time.perf_counter() - start:.0f} s", flush=True)
    try:
        _, seconds, _ = run("info", str(folder))
        print(f"info took {seconds:.1f} s", flush=True)
        needed, plain = token_bytes(folder, config), []
        kinds = {"plain read()": read_plainly, "sum of a memory map": sum_mapped}
        read_plainly(needed)                                # warms the cache
        plain.append({name: kind(needed) for name, kind in kinds.items()})
        text, _, peak = run(
            "generate", "--stream", "--model", str(folder), "--temperature", "0",
            "--prompt", args.prompt, "--max-new-tokens", str(args.tokens),
        )
        plain.append({name: kind(needed) for name, kind in kinds.items()})
        report(text, peak, plain)
    finally:
        if not args.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
