"""The package as it is installed."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import annotated_moe as am

REPOSITORY = Path(__file__).parent.parent


def test_the_front_door_holds_what_it_names():
    source = (REPOSITORY / "annotated_moe/__init__.py").read_text("utf-8")
    bound = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("annotated_moe")
        for alias in node.names
    }
    assert len(am.__all__) == len(set(am.__all__)) and set(am.__all__) <= bound
    assert {"load", "save", "Model", "Session", "PRESETS"} <= set(am.__all__)
    assert all(getattr(am, name) is not None for name in am.__all__)


def test_chapters_1_to_8_alone_are_grok_1_alone(tmp_path):
    script = REPOSITORY / "annotated_moe/tangle.py"
    options = ["--root", str(REPOSITORY), "--upto", "8", "--into", str(tmp_path)]
    command = [sys.executable, "-P", str(script), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    modules = {p.stem: p.read_text("utf-8") for p in tmp_path.rglob("*.py")}
    assert {"model", "generate", "grok"} <= set(modules)
    for word in ("llama", "mixtral", "qwen", "olmoe", "vision"):
        assert [m for m, text in modules.items() if word in text.lower()] == []


def test_the_version_is_the_package_s():
    from importlib.metadata import version

    assert am.__version__ == version("annotated-moe")


def test_without_arguments_the_small_model_is_loaded():
    model = am.load()
    assert model.config.dtype == "bfloat16"
    assert model.tokenizer.vocab_size == model.config.vocab_size
    assert model.config.eos_ids == (model.tokenizer.eos_id,)
    assert model.config.pad_id == model.tokenizer.pad_id


def test_the_small_model_is_small():
    folder = REPOSITORY / "annotated_moe/small"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000


def test_the_wheel_holds_the_model_and_nothing_of_the_book(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        path.relative_to(REPOSITORY).as_posix()
        for path in REPOSITORY.glob("annotated_moe/**/*.py")
    }
    small = ("config.json", "model.safetensors", "tokenizer.model")
    assert modules <= names and "annotated_moe/py.typed" in names
    assert {f"annotated_moe/small/{name}" for name in small} <= names
    others = {name for name in names if not name.startswith("annotated_moe/")}
    assert all(".dist-info/" in name for name in others)
    assert not any("__pycache__" in name for name in names)
