"""The command line, as a stranger types it."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import annotated_moe as am
from annotated_moe import cli

FIXTURES = Path(__file__).parent / "fixtures"
MAIN = "import sys; from annotated_moe.cli import main; sys.exit(main())"
PROMPT = "In the beginning"
GREEDY = ["--temperature", "0", "--dtype", "float32", "--max-new-tokens", "6"]


def run(*words, **options):
    """In a process of its own: exit code, stdout, stderr."""
    command = [sys.executable, "-c", MAIN, *words]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    return done.returncode, done.stdout, done.stderr


def generate(capsys, *words):
    code = cli.main(["generate", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def refusal(capsys, *words):
    """The one line that a mistake is answered with."""
    try:
        code = cli.main(list(words))
    except SystemExit as done:
        code = done.code
    said = capsys.readouterr()
    assert code == 2 and said.out == ""
    assert said.err.startswith("annotated-moe")
    return said.err


@pytest.fixture(scope="module")
def greedy():
    """What the small model says, straight from the package."""
    model = am.load(dtype="float32")
    ids = model.tokenizer.encode_prompt(PROMPT)
    (new,) = model.generate_ids([ids], 6)
    return model.tokenizer.decode([*ids, *new]) + "\n"


def test_text_on_stdout_and_the_rest_on_stderr(capsys, greedy):
    code, out, err = generate(capsys, "--prompt", PROMPT, *GREEDY)
    assert code == 0 and out == greedy
    assert "Loaded the small model" in err and "1 CPU device " in err
    assert "6 new tokens" in err and "a second" in err


def test_eight_devices_in_a_new_process_say_the_same(greedy):
    """The process starts with one device: the command makes eight."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    words = ["generate", "--devices", "8", "--prompt", PROMPT, *GREEDY]
    code, out, err = run(*words, env=environment)
    assert code == 0, err
    assert out == greedy and "8 CPU devices" in err


def test_experts_dealt_out_say_the_same(capsys, greedy):
    words = ["--mesh", "1x8x1", "--exchange", "ring", "--stream"]
    code, out, err = generate(capsys, *words, "--prompt", PROMPT, *GREEDY)
    assert code == 0 and out == greedy and "8 CPU devices" in err


def test_a_seed_decides_the_text(capsys):
    words = ["--prompt", PROMPT, "--max-new-tokens", "6", "--temperature", "2"]
    texts = [
        generate(capsys, *words, "--seed", seed)[1] for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_any_text_comes_back_as_it_went_in(capsys):
    """Characters that no piece holds are spelled in bytes."""
    prompt = "naïve 漢字 \U0001f600\n\ttabs  and spaces "
    code, out, _ = generate(capsys, "--prompt", prompt, *GREEDY)
    assert code == 0 and out.startswith(prompt)


def test_defaults_are_those_of_the_library():
    args = cli.make_parser("generate").parse_args(["generate", "--prompt", "x"])
    for method in (am.Model.stream, am.Model.generate):
        usual = inspect.signature(method).parameters
        for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed",
                     "speculate"):  # fmt: skip
            assert getattr(args, name) == usual[name].default, name


MISTAKES = {
    "no command": ([], "COMMAND"),
    "another command": (["sing"], "sing"),
    "no prompt": (["generate"], "--prompt"),
    "unknown option": (["generate", "--prompt", "x", "--loud"], "--loud"),
    "no number": (["generate", "--prompt", "x", "--seed", "one"], "one"),
    "dtype": (["generate", "--prompt", "x", "--dtype", "float64"], "float64"),
    "no model": (["generate", "--prompt", "x", "--model", "no/such"], "no/such"),
    "no model to tell of": (["info", "no/such"], "no/such"),
    "no devices": (["generate", "--prompt", "x", "--devices", "0"], "--devices"),
    "too many devices": (["generate", "--prompt", "x", "--devices", "9"], "9 devices"),
    "far too many": (["generate", "--prompt", "x", "--devices", "99999"], "--devices"),
    "no text": (["generate", "--prompt", ""], "empty"),
    "no mesh": (["generate", "--prompt", "x", "--mesh", "8"], "--mesh must be"),
    "two sizes": (
        ["generate", "--prompt", "x", "--mesh", "1x8", "--devices", "8"], "give one"
    ),
    "no exchange": (["generate", "--prompt", "x", "--exchange", "post"], "'ring'"),
    "nothing to exchange": (
        ["generate", "--prompt", "x", "--mesh", "1x8", "--exchange", "ring"],
        "needs a --mesh that deals experts out",
    ),
    "too long": (["generate", "--prompt", "a b " * 500], "context holds 256"),
    "too much": (
        ["generate", "--prompt", "x", "--max-new-tokens", "999"], "context holds 256"
    ),
    "negative": (["generate", "--prompt", "x", "--max-new-tokens", "-1"], "-1"),
    "cold": (["generate", "--prompt", "x", "--temperature", "-1"], "temperature"),
    "nan": (["generate", "--prompt", "x", "--temperature", "nan"], "temperature"),
    "nucleus": (["generate", "--prompt", "x", "--top-p", "0"], "top_p"),
    "top-k": (["generate", "--prompt", "x", "--top-k", "0"], "top_k"),
    "seed": (["generate", "--prompt", "x", "--seed", "-1"], "seed"),
}


@pytest.mark.parametrize("words, said", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(capsys, words, said):
    lines = refusal(capsys, *words).splitlines()
    assert lines[-1].startswith("annotated-moe") and said in lines[-1]
    assert len(lines) == 1


def test_a_model_without_a_tokenizer(capsys, tmp_path):
    small = am.load()
    am.save(am.Model(small.config, small.params), tmp_path / "bare")
    words = ["--prompt", "x", "--model", str(tmp_path / "bare")]
    said = refusal(capsys, "generate", *words)
    assert "bare has no tokenizer" in said and "generate_ids" not in said


def test_info_tells_what_is_in_the_folder(capsys):
    assert cli.main(["info"]) == 0
    said = capsys.readouterr()
    config = json.loads((Path(am.__file__).parent / "small/config.json").read_text())
    lines = dict(line.split(None, 1) for line in said.out.splitlines())
    assert said.err == "" and lines["layout"] == config["format"]
    assert lines["vocab_size"] == str(config["vocab_size"])
    heads = config["layers"][0]["pattern"][0]["attention"]["q_heads"]
    assert lines["layers[0].pattern[0].attention.q_heads"] == str(heads)


def test_info_says_what_memory_will_hold(capsys):
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    for dtype in ("float32", "bfloat16"):
        model = am.load(dtype=dtype)
        size = sum(a.nbytes for a in jax.tree.leaves(model.params))
        assert f" {size:,} with --dtype {dtype}" in said


def test_writers_say_what_they_wrote(capsys, tmp_path):
    small, folder = str(Path(am.__file__).parent / "small"), tmp_path / "new"
    assert cli.main(["quantize", small, str(folder)]) == 0
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("Wrote 5,")
    assert err[-1].endswith(f"to {folder} in the layout annotated-moe-2.")
    assert any("in 8 bits already" in line for line in err)


def test_no_bar_before_the_first_byte(capsys, tmp_path):
    small = str(Path(am.__file__).parent / "small")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for words in (
        ["convert", small, str(tmp_path / "full")],
        ["convert", small, str(tmp_path / "x"), "--max-shard-size", "2MB"],
        ["convert", small, str(tmp_path / "x"), "--max-shard-size", "0", "--to", "hf"],
    ):
        said = refusal(capsys, *words)
        assert said.count("\n") == 1 and "B/s" not in said and "max_shard" not in said


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr() == (f"annotated-moe {am.__version__}\n", "")


def test_help_lists_what_there_is():
    code, out, err = run("--help")
    assert code == 0 and err == ""
    rows = [line.split() for line in out.splitlines() if line.startswith("    ")]
    want = ["generate", "info", "convert", "quantize", "plan", "train", "serve", "chat"]
    assert [row[0] for row in rows] == want


def test_a_reader_who_leaves_is_no_error():
    """`annotated-moe info | true`"""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "info"],
        stdout=write,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    os.close(write)
    assert done.returncode == 0 and done.stderr == b""


def test_interrupted_is_quiet(capsys, monkeypatch):
    def interrupt(*job, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", interrupt)
    assert cli.main(["generate", "--prompt", "x"]) == 130
    assert capsys.readouterr() == ("", "")
