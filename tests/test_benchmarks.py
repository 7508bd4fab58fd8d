"""The table that `make bench` prints: what it says and keeps, without any timing."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def program(name: str) -> ModuleType:
    """A file of `benchmarks`, imported as it would be run."""
    path = ROOT / f"benchmarks/{name}.py"
    found = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    sys.path.insert(0, str(path.parent))
    try:
        found.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return program("table")


def figure(median: float) -> dict[str, float]:
    return {"median": median, "least": 0.9 * median, "most": 1.1 * median}


def run_of(**medians: float) -> dict[str, Any]:
    return {
        "date": "2026-01-02", "rounds": 5, "versions": {"jax": "0.10.2"},
        "processor": {"name": "a processor", "flags": ["avx2"], "threads": 2},
        "missing": {},
        "figures": {
            name: {"decode, batch 1": figure(x)} for name, x in medians.items()
        },
    }  # fmt: skip


def test_a_change_of_a_quarter_is_said_and_a_smaller_one_is_not(bench):
    old = run_of(faster=100, slower=100, less=100, more=100, gone=100)
    new = run_of(faster=125, slower=75, less=75.1, more=124.9, new=1)
    lines = bench.changes(old, new)
    assert [line.split(",")[0] for line in lines] == ["faster", "slower"]
    assert "+25%" in lines[0] and "-25% against 100 of 2026-01-02" in lines[1]


def test_what_is_not_installed_has_a_line_that_says_how(bench, monkeypatch):
    """Measuring goes on without it, and the table tells."""
    monkeypatch.setitem(
        bench.PROGRAMS, "llama.cpp, Q8_0", (type("X", (), {"needs": ("no_such",)}), "")
    )
    found = bench.measure(["llama.cpp, Q8_0"], Path("nowhere"), 1)
    assert found["figures"] == {}
    text = bench.table(run_of(ours=7) | {"missing": found["missing"]})
    line = text.splitlines()[-1]
    assert line.startswith("llama.cpp, Q8_0: no_such is not installed: pip install")
    assert (ROOT / line.split()[-1]).exists()           # the file that it names


def test_the_file_keeps_the_last_few_runs(bench, tmp_path):
    path = tmp_path / "bench-x.json"
    assert bench.runs_of(path) == []
    for i in range(bench.KEPT + 2):
        bench.keep(path, run_of(ours=i + 1))
    medians = [
        run["figures"]["ours"]["decode, batch 1"]["median"]
        for run in bench.runs_of(path)
    ]
    assert medians == [3, 4, 5]


def test_one_disturbed_first_token_spoils_no_rate(bench):
    """Batch 1: 32 tokens in 1 s, after a first one of 0.1 s, or once of 5."""
    calm = {row: [0.1, 1.1] for row in bench.ROWS} | {"prefill of 512": [0.5]}
    found = bench.rates([calm, calm | {"decode, batch 1": [5.0, 1.1]}], 32)
    assert found["decode, batch 1"] == pytest.approx([32, 32])
    assert found["decode, batch 8"] == pytest.approx([256, 256])
    assert found["prefill of 512"] == [1024, 1024]


def test_a_step_reads_what_the_model_needs(bench):
    """Two experts of eight at batch 1, nearly all at 8, and the head whole."""
    d, f, layers, vocab = 512, 1792, 8, 8192
    expert = 3 * d * f
    rest = 2 * d * d + 2 * d * 128 + 2 * d + 8 * d
    one = layers * (2 * expert + rest) + vocab * d + d
    assert bench.step_bytes(1, 2) == 2 * one
    more = bench.step_bytes(8, 1) - bench.step_bytes(1, 1)
    assert more == pytest.approx(layers * expert * (8 * (1 - 0.75**8) - 2))


def test_another_model_is_refused(bench):
    """A program whose log-probabilities are elsewhere is not timed."""
    class Answers:
        name = "transformers, float32"

        def __init__(self, shift: float) -> None:
            self.shift = shift

        def ask(self, call: str, prompt: list[int]) -> list[Any]:
            return [None, -2.0 + self.shift, -3.0]      # llama.cpp leaves some out

    reference, gap = bench.check(Answers(0.0), None)
    assert gap is None and np.isnan(reference[:, 0]).all()
    assert bench.check(Answers(1e-5), reference)[1] == pytest.approx(5e-6)
    with pytest.raises(SystemExit, match="another model: .* 5.0e-03 from our"):
        bench.check(Answers(1e-2), reference)


def test_llama_cpp_reads_the_rows_of_queries_in_pairs(bench):
    """Half-split heads become interleaved ones, for the same rotation."""
    programs = sys.modules[bench.shapes.__module__]
    w = np.arange(12)[:, None] * np.ones((1, 2))        # 2 heads of 6
    turned = programs.turned(w, 2)[:, 0]
    assert turned.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


KEPT = sorted(ROOT.glob("annotated_moe/measured/bench-*.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_figures_are_of_all_programs(bench, path):
    last = json.loads(path.read_text())["runs"][-1]
    lines = {name for name in bench.PROGRAMS if name != "plain read"}
    assert lines <= last["figures"].keys() | last["missing"].keys()
    assert bench.kind_of(last["processor"]) in path.stem
    for one in last["figures"].values():
        assert all(f["least"] <= f["median"] <= f["most"] for f in one.values())


def test_growth_keeps_the_axes_that_were_not_measured_anew(tmp_path):
    growth, path = program("growth"), tmp_path / "growth-x.csv"

    def lines_of(axis: str, milliseconds: float) -> list[dict[str, Any]]:
        line = dict.fromkeys(growth.COLUMNS, milliseconds)
        return [line | {"axis": axis, "value": value} for value in (1, 2)]

    growth.keep(path, lines_of("depth", 3))
    growth.keep(path, lines_of("batch", 5))
    growth.keep(path, lines_of("depth", 7))
    lines = list(csv.DictReader(path.read_text().splitlines()))
    assert [line["axis"] for line in lines] == ["batch"] * 2 + ["depth"] * 2
    assert [line["step_ms"] for line in lines] == ["5", "5", "7", "7"]
