# Generated from book/chapters/12_hosts.md by `make sync`; edit the chapter.
"""Sixteen accelerators rarely sit in one machine. They sit in two or
four, each a *host* with an operating system, a disk and a process of
its own, and if each of four hosts began by reading all of Grok-1, they
would pull 1.27 terabytes through the network to use 318 gigabytes. This
chapter runs one model on several processes at once. By its end they
will load together, each reading only the bytes that its devices keep,
which we count; generate together, token for token what a single process
does; a process that was given another prompt, another seed or another
model will be found out before a token is computed; and when one of them
is killed, the others will stop with an error instead of waiting for
ever.
"""

import argparse
import atexit
import errno
import functools
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from annotated_moe.generate import RUN_CHECKS
from annotated_moe.quantization import QuantizedTensor

# %% book/chapters/12_hosts.md, cell 3
HEARTBEAT_TIMEOUT = 20                      # seconds


# %% book/chapters/12_hosts.md, cell 4
def join(
    address: str,
    processes: int,
    process: int,
    devices: int | None = None,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
    """Become process `process` of `processes`, which meet at `address`.

    Call it before JAX computes anything. `devices`: how many this one
    simulates, where there are only CPUs. A process that is silent for
    `heartbeat_timeout` seconds is given up, and with it the run; they
    wait three times as long for each other at the start. ValueError for
    numbers that make no sense or differ; OSError if they cannot meet.
    """
    check_join(address, processes, process, heartbeat_timeout)
    call_roll(address, processes, process, 3 * heartbeat_timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    jax.distributed.initialize(
        address, processes, process,
        cluster_detection_method="deactivate",
        initialization_timeout=3 * heartbeat_timeout,
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=heartbeat_timeout,
    )
    jax.devices()                           # settles who has how many
    RUN_CHECKS.append(check_same)


# %% book/chapters/12_hosts.md, cell 23
def identity(x: Any) -> Any:
    return x


# %% book/chapters/12_hosts.md, cell 24
def gather(mine: np.ndarray) -> np.ndarray:
    """[processes, ...]: everyone's `mine`, all of one shape."""
    first = {d.process_index: d for d in reversed(jax.devices())}
    mesh = Mesh([first[i] for i in sorted(first)], "process")
    split, whole = (NamedSharding(mesh, p) for p in (P("process"), P()))
    rows = jax.make_array_from_process_local_data(split, mine[None])
    return np.asarray(jax.jit(identity, out_shardings=whole)(rows))


# %% book/chapters/12_hosts.md, cell 25
class MismatchError(ValueError):
    """The processes were not given the same."""


# %% book/chapters/12_hosts.md, cell 26
def agree(call: str, **values: Any) -> None:
    """MismatchError, on every process, unless all give the same values.

    Every process must call it, and in the same order as the others.
    `call` says what is about to be done; it is compared as well.
    """
    mine = {"call": call, **named_leaves(describe(values))}
    text = json.dumps(mine).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.int32)
    digests = gather(np.append(digest, np.int32(len(text))))
    if (digests == digests[0]).all():
        return
    padded = text.ljust(digests[:, -1].max())
    texts = gather(np.frombuffer(padded, np.uint8))
    told = [json.loads(bytes(row)) for row in texts]
    raise MismatchError(difference(told))


# %% book/chapters/12_hosts.md, cell 27
def difference(told: list[dict[str, Any]]) -> str:
    """In what the first two processes that disagree do so."""
    i = next(i for i, other in enumerate(told) if other != told[0])
    first, other = told[0], told[i]
    call = first["call"]
    if call != other["call"]:
        return (
            f"process 0 runs {call} and process {i} {other['call']}; "
            "all must make the same calls in the same order"
        )
    names = [name for name in {**first, **other}
             if first.get(name) != other.get(name)]
    a, b = quotes(first.get(names[0]), other.get(names[0]))
    more = f" (and {', '.join(names[1:3])})" if names[1:] else ""
    return (
        f"{call}: the processes differ in {names[0]}{more}: process 0 "
        f"has {a}, process {i} has {b}; give every process the same"
    )


# %% book/chapters/12_hosts.md, cell 28
def quotes(a: Any, b: Any) -> tuple[str, str]:
    """Both values, from shortly before they differ."""
    a, b = json.dumps(a), json.dumps(b)
    same = len(os.path.commonprefix([a, b]))
    start = 0 if max(len(a), len(b)) <= 48 else max(0, same - 16)

    def quote(text: str) -> str:
        end = "..." if len(text) > start + 48 else ""
        return "..." * (start > 0) + text[start : start + 48] + end

    return quote(a), quote(b)


# %% book/chapters/12_hosts.md, cell 29
def describe(value: Any) -> Any:
    """`value` in what JSON can say, equal where the values are."""
    if isinstance(value, dict):
        return {str(key): describe(v) for key, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(describe, value))
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return describe(asdict(value))
    if isinstance(value, jax.Array):
        value = np.asarray(value)
    if isinstance(value, (np.ndarray, np.generic)) and value.size <= 64:
        return value.tolist()
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(value.tobytes()).hexdigest()[:16]
        return f"{value.dtype}{list(value.shape)} {digest}"
    known = value is None or isinstance(value, (bool, int, float, str))
    return value if known else str(value)


# %% book/chapters/12_hosts.md, cell 30
def named_leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dictionaries as one: {"config.d_model": 64, ...}."""
    if not isinstance(value, dict):
        return {name: value}
    found: dict[str, Any] = {}
    for key, v in value.items():
        found |= named_leaves(v, f"{name}.{key}" if name else key)
    return found


# %% book/chapters/12_hosts.md, cell 31
def beginning(w: Any) -> Any:
    """Shape, dtype and first numbers, for which little is read."""
    if isinstance(w, QuantizedTensor):
        return {"int8": beginning(w.weight),
                "scales": beginning(w.scales)}
    few = (*(slice(0, 1) for _ in w.shape[:-1]), slice(0, 16))
    some = np.asarray(w[few] if w.shape else w)
    return f"{some.dtype}{list(w.shape)} from {some.ravel().tolist()}"


# %% book/chapters/12_hosts.md, cell 32
def check_same(mesh: Any, call: str, inputs: dict[str, Any]) -> None:
    """`agree` on a run, where it is one of all processes."""
    devices = [] if mesh is None else mesh.devices.ravel().tolist()
    if len({d.process_index for d in devices}) < jax.process_count():
        return
    if "weights" in inputs:
        weights = inputs["weights"]
        read = {name: beginning(w) for name, w in weights.items()}
        inputs = {**inputs, "weights": read}
    agree(call, mesh=dict(mesh.shape), **inputs)


# %% book/chapters/12_hosts.md, cell 37
def add_options(parser: argparse.ArgumentParser) -> None:
    """What a command needs to know to run on several hosts."""
    add = parser.add_argument
    add("--hosts", metavar="HOST:PORT",
        help="run as one of several processes, which meet at this "
             "address of process 0's machine")
    add("--processes", type=int, metavar="N",
        help="with --hosts: how many processes there are")
    add("--process", type=int, metavar="I",
        help="with --hosts: which of them this is, 0 to N - 1")


# %% book/chapters/12_hosts.md, cell 38
OWN_OPTIONS = {"process", "model", "image"}     # compared when loaded


# %% book/chapters/12_hosts.md, cell 39
def join_from(args: argparse.Namespace) -> None:
    """`join` as the options say; ValueError if they do not fit.

    What goes wrong from then on ends this process, with one line.
    """
    n, i = args.processes, args.process
    if n is None or i is None:
        raise ValueError("--hosts needs --processes and --process too")
    given = {f"--{name.replace('_', '-')}": value
             for name, value in vars(args).items()
             if name not in OWN_OPTIONS and not callable(value)}
    args.devices = n if args.devices == 1 else args.devices
    if args.devices % max(n, 1):
        raise ValueError(
            f"--devices {args.devices} must be a multiple of "
            f"--processes {n}: each simulates as many as the others"
        )
    check_join(args.hosts, n, i, HEARTBEAT_TIMEOUT)
    print(f"Process {i} of {n}: meeting at {args.hosts}, for at most "
          f"{3 * HEARTBEAT_TIMEOUT} s ...", file=sys.stderr, flush=True)
    start_guard(i)
    reserve_stdout(i)
    try:
        join(args.hosts, n, i, args.devices // n)
        agree("the command line", **given)
    except (ValueError, OSError) as error:
        abort(error, i)


# %% book/chapters/12_hosts.md, cell 40
Command = Callable[[argparse.Namespace], Any]


# %% book/chapters/12_hosts.md, cell 41
def run_multihost(run: Command) -> Command:
    """`run`, in step with other processes where --hosts is given."""
    @functools.wraps(run)
    def run_in_step(args: argparse.Namespace) -> Any:
        if args.hosts is None:
            if args.processes is not None or args.process is not None:
                raise ValueError(
                    "--processes and --process go with --hosts")
            return run(args)
        join_from(args)
        try:
            result = run(args)
            sys.stdout.flush()
        except BaseException as error:
            abort(error, args.process)
        return result

    return run_in_step


# %% book/chapters/12_hosts.md, cell 49
def host_and_port(address: str) -> tuple[str, int]:
    """Of "host:port", or "[::1]:port"; ValueError for anything else."""
    place = re.fullmatch(r"\[?([^\[\]]+)\]?:(\d+)", address)
    if not place or not 0 < int(place[2]) < 65536:
        raise ValueError(
            f"{address!r} is no host:port where processes could meet; "
            "give that of process 0, for example 10.0.0.1:9700"
        )
    return place[1], int(place[2])


# %% book/chapters/12_hosts.md, cell 50
def check_join(
    address: str, processes: int, process: int, heartbeat_timeout: int
) -> None:
    """ValueError unless `join` can be tried with these."""
    host_and_port(address)
    if processes < 1 or not 0 <= process < processes:
        raise ValueError(
            f"process {process} of {processes}: of N processes, each "
            "is one of 0 to N - 1"
        )
    if heartbeat_timeout < 1:
        raise ValueError(
            "heartbeat_timeout is 1 second or more: "
            f"{heartbeat_timeout}"
        )


# %% book/chapters/12_hosts.md, cell 51
def listen(address: str) -> socket.socket:
    """Process 0's socket; OSError if nobody could reach it there."""
    _, port = host_and_port(address)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(
            ("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "is taken by another program" if taken else error.strerror
        raise OSError(
            f"port {port}, on which process 0 should listen, {why}; "
            "give every process an address with another port"
        ) from None


# %% book/chapters/12_hosts.md, cell 52
def connect(address: str, patience: int, hint: str) -> socket.socket:
    """A call to `address`, tried for `patience` seconds, or OSError."""
    where, start = host_and_port(address), time.monotonic()
    while True:
        try:
            return socket.create_connection(where, timeout=5)
        except socket.gaierror as error:
            raise OSError(
                f"the host name {where[0]!r} is unknown "
                f"({error.strerror}); --hosts and `join` need the "
                "address of process 0's machine"
            ) from None
        except OSError as error:
            if time.monotonic() - start > patience:
                why = error.strerror or "no answer"
                raise ConnectionError(
                    f"{address}: {why.lower()}; {hint}") from None
        time.sleep(0.1)


# %% book/chapters/12_hosts.md, cell 53
def answer_roll(
    address: str, mine: dict[str, Any], timeout: int
) -> None:
    """Tell process 0 who calls; OSError or ValueError as it replies."""
    hint = "is process 0 running, and is this its machine's address?"
    with connect(address, timeout, hint) as call:
        call.sendall(json.dumps(mine).encode() + b"\n")
        reply = read_line(call, timeout + 5)
    if not isinstance(reply, str):
        raise ConnectionError(
            f"{address}: what answers is no process 0 that waits for "
            "others; has it ended, or has its run begun?"
        )
    if reply:
        raise ValueError(reply)


# %% book/chapters/12_hosts.md, cell 54
def read_line(call: socket.socket, timeout: int) -> Any:
    """One line of JSON from the other side, or None."""
    call.settimeout(timeout)
    try:
        with call.makefile("rb") as lines:
            return json.loads(lines.readline(4096))
    except (OSError, ValueError):
        return None


# %% book/chapters/12_hosts.md, cell 55
def objection(
    said: dict[str, Any], mine: dict[str, Any], present: set[int]
) -> str:
    """What is wrong with a caller, or nothing."""
    i = said["process"]
    for name in ("processes", "jax"):
        if said[name] != mine[name]:
            return (
                f"{name} is {mine[name]} in process 0 and {said[name]} "
                f"in process {i}; it must be the same in all"
            )
    if i in present:
        return f"two processes say that they are process {i}"
    return ""


# %% book/chapters/12_hosts.md, cell 56
def hear_roll(
    server: socket.socket, mine: dict[str, Any], timeout: int
) -> str:
    """What keeps the processes from meeting, or nothing."""
    everyone, start = set(range(mine["processes"])), time.monotonic()
    present, calls, wrong = {0}, [], ""
    while present < everyone and not wrong:
        left = start + timeout - time.monotonic()
        server.settimeout(max(left, 0.01))
        try:
            call, _ = server.accept()
        except TimeoutError:
            absent = ", ".join(map(str, sorted(everyone - present)))
            wrong = (f"of {len(everyone)} processes, {absent} did not "
                     f"call process 0 within {timeout} s")
            break
        said = read_line(call, 2)
        if isinstance(said, dict) and said.keys() == mine.keys():
            calls.append(call)              # others are none of us
            wrong = objection(said, mine, present)
            present.add(said["process"])
    for call in calls:
        with call:
            call.sendall(json.dumps(wrong).encode() + b"\n")
    return wrong


# %% book/chapters/12_hosts.md, cell 57
def call_roll(
    address: str, processes: int, process: int, timeout: int
) -> None:
    """Return when all `processes` have met; raise what is wrong."""
    mine = {"process": process, "processes": processes,
            "jax": jax.__version__}
    if process:
        return answer_roll(address, mine, timeout)
    with listen(address) as server:
        hint = ("process 0 cannot reach itself there; is this the "
                "address of another machine?")
        connect(address, 0, hint).close()
        wrong = hear_roll(server, mine, timeout)
    if wrong:
        raise ValueError(wrong)
    return None


# %% book/chapters/12_hosts.md, cell 61
def reserve_stdout(process: int) -> None:
    """Only what process 0 prints from Python reaches stdout."""
    sys.stdout.flush()
    text = os.dup(1)
    if process > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), text)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(text, "w", encoding="utf-8")


# %% book/chapters/12_hosts.md, cell 62
GUARD = """
import sys
done = lost = False
for line in sys.stdin:
    if line == "said\\n":
        sys.exit()
    if line == "done\\n":
        done = True
    else:
        words = line.replace("_", " ")
        lost = lost or "coordination service" in words
        lost = lost or "JAX distributed service" in words
        if not lost:
            print(line, end="", file=sys.stderr, flush=True)
if lost or not done:
    sys.exit(sys.argv[1 if lost else 2])
"""


# %% book/chapters/12_hosts.md, cell 63
def last_words(process: int) -> tuple[str, str]:
    """Of a process that lost another, and of one that is killed."""
    name = f"annotated-moe: process {process}: ended, "
    lost = ("because another process never came, is gone or was silent"
            f" for {HEARTBEAT_TIMEOUT} s; see what each one said")
    killed = "and not by itself; was it killed, or out of memory?"
    return name + lost, name + killed


# %% book/chapters/12_hosts.md, cell 64
def start_guard(process: int) -> None:
    """Have it said in a line if this process is ended; see `GUARD`."""
    mine = os.dup(2)
    guard = subprocess.Popen(
        [sys.executable, "-c", GUARD, *last_words(process)],
        stdin=subprocess.PIPE, start_new_session=True,
    )
    assert guard.stdin is not None
    os.dup2(guard.stdin.fileno(), 2)
    guard.stdin.close()
    sys.stderr = os.fdopen(mine, "w", 1, errors="backslashreplace")
    atexit.register(os.write, 2, b"done\n")


# %% book/chapters/12_hosts.md, cell 65
def abort(error: BaseException, process: int) -> NoReturn:
    """Say in a line why, and end this process without waiting."""
    # A collective that fails is a ValueError, too: "UNKNOWN: Gloo ...".
    broken = re.match(r"[A-Z_]+: ", str(error))
    bad_input = isinstance(error, (ValueError, OSError)) and not broken
    line = (str(error).splitlines() or [type(error).__name__])[0]
    if not bad_input:
        line += "; has another process ended? See what each one said"
    text = f"annotated-moe: process {process}: {line}"
    print(text, file=sys.stderr, flush=True)
    if sys.stderr.fileno() != 2:            # which is the guard's
        os.write(2, b"said\n")
    os._exit(2 if bad_input else 3)
