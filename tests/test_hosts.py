"""Several processes, one model: equal tokens, few bytes, no hanging."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import cli, hosts
from annotated_moe.checkpoints import quantize_params
from annotated_moe.families.grok import grok_config
from annotated_moe.model import flat_specs, init_params

LONG = 120                      # seconds; processes give up long before
PROMPTS = [[5, 9, 33], [17, 2, 8, 40, 61], [3]]
TINY = grok_config(
    vocab_size=64, context=32, d_model=64, d_ff=128, num_layers=2, q_heads=8,
    kv_heads=4, head_size=8, num_experts=4, embedding_multiplier=8.0,
)  # fmt: skip
WORKER = """
import json, sys
import numpy as np
from annotated_moe import hosts
address, n, i, data, model, folder, prompts = sys.argv[1:]
hosts.join(address, int(n), int(i), devices=2, heartbeat_timeout=10)
import jax
import annotated_moe as am
from annotated_moe.checkpoints import BYTES_READ

mesh, prompts = am.make_mesh(int(data), int(model)), json.loads(prompts)
net = am.load(folder, mesh=mesh, dtype="float32")
ids = [net.generate_ids(prompts, max_new_tokens=5)]
logits = None
if n == "2":
    how = {"temperature": 1.0, "seed": 3}
    ids.append(net.generate_ids(prompts, max_new_tokens=5, **how))
    logits = np.asarray(net.logits(np.arange(1, 13).reshape(3, 4))).tolist()
print(json.dumps({"ids": ids, "logits": logits,
                  "devices": [jax.local_device_count(), jax.device_count()],
                  "read": BYTES_READ}), flush=True)
for line in sys.stdin:
    method, options, times = json.loads(line)
    if options.get("mesh"):
        options["mesh"] = am.make_mesh(*options["mesh"])
    for _ in range(times):
        try:
            call = am.load if method == "load" else getattr(net, method)
            answer = call(**options)
        except hosts.MismatchError as error:
            answer = str(error)
        print(json.dumps(answer, default=lambda x: type(x).__name__), flush=True)
"""


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(scope="module")
def spawn():
    """Starts Python on some words; whatever still runs at the end is killed."""
    jobs = []
    quick = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}

    def start(*words):
        words = [sys.executable, *map(str, words)]
        pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
        jobs.append(subprocess.Popen(words, text=True, env=os.environ | quick, **pipes))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()
        job.wait(LONG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts") / "tiny"
    make = jax.jit(lambda key: quantize_params(init_params(key, TINY), TINY))
    am.save(am.Model(TINY, make(jax.random.key(0))), folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return am.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def start(spawn, folder, tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "worker.py"
    script.write_text(WORKER)

    def start(n, data, model):
        address = free_address()
        words = [data, model, folder, json.dumps(PROMPTS)]
        return [spawn(script, address, n, i, *words) for i in range(n)]

    return start


def report(job):
    for line in job.stdout:
        if line.startswith("{"):
            return SimpleNamespace(**json.loads(line))
    raise AssertionError(job.stderr.read()[-3000:])


def order(jobs, methods, options, times=1):
    """Job i calls methods[i] with options[i]: each one's first answer."""
    for job, method, own in zip(jobs, methods, options):
        job.stdin.write(json.dumps([method, own, times]) + "\n")
        job.stdin.flush()
    return [json.loads(job.stdout.readline()) for job in jobs]


def ended(job):
    """The exit code and stderr of a process that must end by itself."""
    job.stdout.read()
    return job.wait(LONG), job.stderr.read()


def assert_like_alone(reports, alone):
    n = len(reports)
    wanted = [alone.generate_ids(PROMPTS, max_new_tokens=5, **how)
              for how in ({}, {"temperature": 1.0, "seed": 3})]
    logits = np.asarray(alone.logits(np.arange(1, 13).reshape(3, 4)))
    assert wanted[0] != wanted[1] and len({tuple(row) for row in wanted[1]}) == 3
    for r in reports:
        assert r.devices == [2, 2 * n]
        assert r.ids == (wanted if n == 2 else wanted[:1])
        if n == 2:
            np.testing.assert_allclose(r.logits, logits, atol=1e-5)


def bytes_of(params):
    return {
        f"{module}/{name}": sum(a.nbytes for a in jax.tree.leaves(w))
        for module, leaves in params.items() for name, w in leaves.items()
    }


def assert_a_share_is_read(reports, alone):
    n = len(reports)
    sizes = bytes_of(alone.params)
    specs = flat_specs(alone.config)
    matrices = {"/".join(path) for path, spec in specs.items() if spec.matrix}
    for r in reports:
        assert r.read.keys() == sizes.keys()
        for path, size in sizes.items():
            if path in matrices:                    # scales may be needed twice
                assert size / n <= r.read[path] <= 1.2 * size / n, path
            elif "norm" not in path and "router" not in path:
                assert r.read[path] == size / n, path
            else:
                assert r.read[path] in (size, size / 2), path
        assert sum(r.read.values()) < 1.15 * sum(sizes.values()) / n


@pytest.mark.full
def test_four_processes_are_as_one(start, alone):
    """A grid that crosses processes both ways; 3 rows do not divide by 2."""
    jobs = start(4, 2, 4)
    reports = [report(job) for job in jobs]
    assert_like_alone(reports, alone)
    assert_a_share_is_read(reports, alone)
    for job in jobs:
        job.stdin.close()
    assert [ended(job)[0] for job in jobs] == [0] * 4


@pytest.fixture(scope="module")
def pair(start, alone):
    """Two processes that have shown that they are as one, and wait."""
    jobs = start(2, 1, 4)
    reports = [report(job) for job in jobs]
    assert_like_alone(reports, alone)
    assert_a_share_is_read(reports, alone)
    return jobs


ASKED = {"prompts": PROMPTS, "max_new_tokens": 5}       # compiled already
TOKENS = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
LOADED = {"path": None, "mesh": [1, 4], "dtype": "float32"}
DIFFERENT = {
    "prompts": ("generate_ids", ASKED, {"prompts": [[5, 9, 34], *PROMPTS[1:]]},
                "prompts: process 0 has [[5, 9, 33], [17, "),
    "lengths": ("generate_ids", ASKED, {"prompts": [[5, 9], *PROMPTS[1:]]},
                "prompts: "),
    "rows": ("generate_ids", ASKED, {"prompts": [[5, 9], [1]]},
             "prompts: process 0 has "),
    "new tokens": ("generate_ids", ASKED, {"max_new_tokens": 6},
                   "max_new_tokens: process 0 has 5, process 1 has 6"),
    "seed": ("generate_ids", ASKED, {"seed": 1},
             "seed: process 0 has 0, process 1 has 1"),
    "top_p": ("generate_ids", ASKED, {"top_p": 0.5}, "top_p: "),
    "stop": ("generate_ids", ASKED, {"stop_ids": [3]}, "has [2], process 1 has [3]"),
    "tokens": ("logits", {"tokens": TOKENS}, {"tokens": TOKENS[::-1]}, "tokens: "),
    "mesh": ("load", LOADED, {"mesh": [2, 2]}, "differ in mesh.data (and mesh.model"),
    "dtype": ("load", LOADED, {"dtype": "bfloat16"}, "differ in config.dtype: "),
    "model": ("load", LOADED, {"path": "other"}, "differ in config.vocab_size"),
    "weights": ("load", LOADED, {"path": "twin"}, "differ in weights."),
}  # fmt: skip


@pytest.mark.parametrize(
    "method, same, change, words", DIFFERENT.values(), ids=DIFFERENT)
def test_processes_that_differ_are_told_so(
    pair, folder, tmp_path, method, same, change, words
):
    """Both say the same sentence; what they agree on next is carried out."""
    twin, same = same | change, dict(same)
    if method == "load":
        same["path"], path = str(folder), twin["path"]
        twin["path"] = str(folder)
    if change.get("path"):
        config = TINY if path == "twin" else replace(TINY, vocab_size=80)
        params = jax.jit(lambda key: quantize_params(init_params(key, config), config))
        am.save(am.Model(config, params(jax.random.key(1))), tmp_path / path)
        twin["path"] = str(tmp_path / path)
    first, second = order(pair, [method] * 2, [same, twin])
    assert first == second and first.startswith(f"{method}: the processes differ in ")
    assert words in first and "\n" not in first and len(first) < 400
    again = order(pair, [method] * 2, [same, same])
    assert again[0] == again[1] != first


def test_another_order_of_calls(pair):
    first, second = order(pair, ["generate_ids", "logits"], [ASKED, {"tokens": [[1]]}])
    assert first == second
    assert first.startswith("process 0 runs generate_ids and process 1 logits; ")


def test_a_model_of_ones_own_devices_is_ones_own_business(pair, folder):
    """Loading on one device, process 1 meets nobody."""
    own = {"path": str(folder), "dtype": "float32"}
    assert order(pair[1:], ["load"], [own]) == ["Model"]


def test_the_first_is_killed(pair):
    order(pair, ["generate_ids"] * 2, [ASKED] * 2, times=100_000)
    jobs = pair
    jobs[0].send_signal(signal.SIGKILL)
    code, _ = ended(jobs[1])
    assert code not in (0, None)


# The command line

RUN = "import sys; from annotated_moe.cli import main; sys.exit(main())"


def generate(spawn, new, *more):
    address = free_address()
    words = ["-c", RUN, "generate", "--prompt", "In the beginning", "--dtype",
             "float32", "--max-new-tokens", new, "--temperature", 0]
    shared = ["--hosts", address, "--processes", 2, "--process"]
    return [spawn(*words, *shared, i, *(more if i else ())) for i in range(2)]


def test_only_the_first_process_prints(spawn):
    first, second = generate(spawn, 8)
    out, status = first.communicate(timeout=LONG)
    model = am.load(dtype="float32")
    prompt = model.read_prompt("In the beginning", None, None)[0]
    ids = model.stream_ids(prompt, max_new_tokens=8)
    assert out == "In the beginning" + "".join(cli.read_on(model, prompt, ids)) + "\n"
    assert "Process 0 of 2" in status and "onto 2 CPU devices" in status
    nothing, status = second.communicate(timeout=LONG)
    assert nothing == "" and "Process 1 of 2" in status and "ended" not in status
    assert (first.returncode, second.returncode) == (0, 0)


def test_a_killed_process_ends_the_other(spawn):
    """Process 0 it is: JAX may end the other before it can say a word."""
    first, second = generate(spawn, 230)
    assert first.stdout.read(30).startswith("In the beginning")
    first.send_signal(signal.SIGKILL)
    code, errors = ended(second)
    assert code not in (0, None)
    assert errors.count("annotated-moe: process 1: ") == 1
    assert "stack trace" not in errors
    assert "annotated-moe: process 0: ended, and not by itself" in first.stderr.read()


def test_options_that_differ(spawn):
    """Of two processes, the second is given other ones."""
    jobs = generate(spawn, 8, "--seed", 5, "--prompt", "In the end")
    for i, job in enumerate(jobs):
        out, status = job.communicate(timeout=LONG)
        assert (job.returncode, out) == (2, "")
        assert status.splitlines()[-1].startswith(
            f"annotated-moe: process {i}: the command line: the processes differ in ")
        assert "--prompt (and --seed): " in status and "Loaded" not in status
        assert 'process 0 has "In the beginning", process 1 has "In the end"' in status


def test_a_port_that_is_taken(spawn):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["-c", RUN, "generate", "--prompt", "x", "--processes", 2]
        job = spawn(*words, "--process", 0, "--hosts", f"127.0.0.1:{port}")
        _, status = job.communicate(timeout=LONG)
    assert job.returncode == 2 and status.count("\n") == 2
    last = status.splitlines()[-1]
    assert last.startswith(f"annotated-moe: process 0: port {port}, ")
    assert "is taken by another program" in last


LOST = "E1 coordination_service_agent.cc: Polled\n*** stack trace: ***\n @ 0x7f\n"


@pytest.mark.parametrize(
    "text, passed_on",
    [
        ("done\n", ""),
        ("a warning\ndone\nanother\n", "a warning\nanother\n"),
        ("a warning\n", "a warning\nKILLED\n"),
        ("", "KILLED\n"),
        ("a warning\n" + LOST, "a warning\nLOST\n"),
        ("done\n" + LOST, "LOST\n"),
        (LOST + "said\n" + LOST, ""),
    ],
)
def test_the_guard_has_the_last_word(text, passed_on):
    command = [sys.executable, "-I", "-c", hosts.GUARD, "LOST", "KILLED"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", passed_on)


# Meeting


def call_roll(*calls, timeout=30):
    """What the roll raised in each of several callers, all at one address."""
    address = free_address()
    with ThreadPoolExecutor(len(calls)) as pool:
        jobs = [pool.submit(hosts.call_roll, address, n, i, timeout) for n, i in calls]
        return [job.exception() for job in jobs]


def test_all_come():
    assert call_roll((3, 2), (3, 0), (3, 1)) == [None] * 3
    assert call_roll((1, 0)) == [None]


@pytest.mark.parametrize(
    "calls, words",
    [
        ([(3, 0), (3, 1), (3, 1)], "two processes say that they are process 1"),
        ([(2, 0), (3, 1)], "processes is 2 in process 0 and 3 in process 1"),
        ([(4, 0), (4, 2)], "of 4 processes, 1, 3 did not call process 0 within 1 s"),
        ([(2, 0)], "of 2 processes, 1 did not call"),
    ],
)
def test_who_does_not_belong_or_does_not_come(calls, words):
    for error in call_roll(*calls, timeout=1):
        assert isinstance(error, ValueError) and words in str(error)


def test_strangers_at_the_port_do_not_count():
    address = free_address()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(hosts.call_roll, address, 2, 0, 30)
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": 1}\n'):
            with hosts.connect(address, 30, "") as stranger:
                stranger.sendall(said)
        hosts.call_roll(address, 2, 1, 30)
        assert first.exception() is None


def test_who_answers_is_not_process_0():
    """As a web server would, or a run that began without us."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(hosts.call_roll, address, 2, 1, 30)
            caller, _ = server.accept()
            with caller:
                caller.sendall(b"\x00\x00 HTTP/2\n")
            error = job.exception()
    assert isinstance(error, ConnectionError)
    assert str(error).startswith(f"{address}: what answers is no process 0")


@pytest.mark.parametrize(
    "address, process, words",
    [
        ("nowhere.invalid:9700", 0, "host name 'nowhere.invalid' is unknown"),
        ("nowhere.invalid:9700", 1, "host name 'nowhere.invalid' is unknown"),
        ("192.0.2.1:PORT", 0, "cannot reach itself there"),
        ("127.0.0.1:PORT", 1, "connection refused; is process 0 running"),
        ("[::1]:TAKEN", 0, "is taken by another program"),
    ],
)
def test_addresses_that_lead_nowhere(address, process, words):
    with socket.create_server(("127.0.0.1", 0)) as other:
        _, free = free_address().rsplit(":", 1)
        address = address.replace("TAKEN", str(other.getsockname()[1]))
        address = address.replace("PORT", free)
        with pytest.raises(OSError, match=words) as error:
            hosts.call_roll(address, 2, process, 0)
    assert "\n" not in str(error.value)


# What cannot be tried


@pytest.mark.parametrize(
    "address, processes, process, timeout, words",
    [
        ("10.0.0.1", 2, 0, 20, "'10.0.0.1' is no host:port"),
        (":9700", 2, 0, 20, "no host:port"),
        ("here:99999", 2, 0, 20, "no host:port"),
        ("here:0", 2, 0, 20, "no host:port"),
        ("here:9700", 2, 2, 20, "process 2 of 2"),
        ("here:9700", 2, -1, 20, "process -1 of 2"),
        ("here:9700", 0, 0, 20, "process 0 of 0"),
        ("here:9700", 2, 0, 0, "heartbeat_timeout is 1 second or more"),
    ],
)
def test_numbers_that_make_no_sense(address, processes, process, timeout, words):
    with pytest.raises(ValueError, match=words):
        hosts.join(address, processes, process, heartbeat_timeout=timeout)


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--hosts", "here:9700"], "--hosts needs --processes and --process"),
        (["--hosts", "here:9700", "--processes", "2"], "--hosts needs"),
        (["--processes", "2", "--process", "0"], "go with --hosts"),
        (["--process", "0"], "go with --hosts"),
        (["--hosts", "x", "--processes", "2", "--process", "0"], "no host:port"),
        (["--hosts", "h:1", "--processes", "0", "--process", "0"], "process 0 of 0"),
        (["--hosts", "h:1", "--processes", "2", "--process", "0", "--devices", "3"],
         "--devices 3 must be a multiple of --processes 2"),
    ],
)
def test_options_that_do_not_fit(words, complaint, capsys):
    assert cli.main(["generate", "--prompt", "x", *words]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_every_process_gets_its_share_of_the_devices(monkeypatch):
    calls = []
    monkeypatch.setattr(hosts, "join", lambda *call: calls.append(call))
    for name in ("start_guard", "reserve_stdout"):
        monkeypatch.setattr(hosts, name, lambda process: None)
    for given, own, every in [(1, 1, 4), (8, 2, 8), (32, 8, 32)]:
        args = argparse.Namespace(
            hosts="h:1", processes=4, process=3, devices=given)
        hosts.join_from(args)
        assert calls.pop() == ("h:1", 4, 3, own) and args.devices == every


def test_a_failed_process_does_not_wait_for_the_others(spawn):
    job = spawn("-c", """
import atexit, os, time
from annotated_moe import hosts
atexit.register(time.sleep, 1000)
wrong = ValueError('this is wrong\\nand more')
lost = ValueError('UNKNOWN: Gloo AllGather failed')
for error in (wrong, lost, RuntimeError('gone'), KeyboardInterrupt()):
    child = os.fork()
    if not child:
        hosts.abort(error, 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
""")
    codes, errors = job.communicate(timeout=LONG)
    assert codes.split() == ["2", "3", "3", "3"]
    for words in ["process 1: this is wrong\n", "process 1: KeyboardInterrupt;",
                  "process 1: gone; has another process ended?",
                  "AllGather failed; has another process ended?"]:
        assert words in errors
    assert "said" not in errors.splitlines()    # that is for a guard
