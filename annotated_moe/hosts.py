# Generated from book/chapters/12_hosts.md by `make sync`; edit the chapter.
"""Sixteen accelerators rarely sit in one machine. They sit in two or
four, each a *host* with an operating system, a disk and a process of
its own, and if each of four hosts began by reading all of Grok-1, they
would pull 1.27 terabytes through the network to use 318 gigabytes. This
chapter runs one model on several processes at once. By its end they
will load together, each reading only the bytes that its devices keep,
which we count; generate together, token for token what a single process
does; and when one of them is killed, the others will stop with an error
instead of waiting for it for ever.
"""

import argparse
import atexit
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax

# %% book/chapters/12_hosts.md, cell 2
PATIENCE = 20                               # seconds without a sign


# %% book/chapters/12_hosts.md, cell 4
def join(
    address: str,
    processes: int,
    process: int,
    devices: int | None = None,
    patience: int = PATIENCE,
) -> None:
    """Become process `process` of `processes`, which meet at `address`.

    Call it before JAX computes anything. `devices` is how many this
    process simulates, where there are only CPUs. Who is silent for
    `patience` seconds is given up, and with it everyone. ValueError
    for numbers that make no sense.
    """
    check_join(address, processes, process, patience)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    jax.distributed.initialize(
        address, processes, process,
        cluster_detection_method="deactivate",
        initialization_timeout=3 * patience,
        heartbeat_timeout_seconds=patience,
        shutdown_timeout_seconds=patience,
    )
    jax.devices()                           # settles who has how many


# %% book/chapters/12_hosts.md, cell 5
def check_join(
    address: str, processes: int, process: int, patience: int
) -> None:
    """ValueError unless `join` can be tried with these."""
    place = re.fullmatch(r"(.+):(\d+)", address)
    if not place or not 0 < int(place[2]) < 65536:
        raise ValueError(
            f"{address!r} is no host:port where processes could meet; "
            "give that of process 0, for example 10.0.0.1:9700"
        )
    if processes < 1 or not 0 <= process < processes:
        raise ValueError(
            f"process {process} of {processes}: of N processes, each "
            "is one of 0 to N - 1"
        )
    if patience < 1:
        raise ValueError(f"patience is 1 second or more: {patience}")


# %% book/chapters/12_hosts.md, cell 23
def add_options(parser: argparse.ArgumentParser) -> None:
    """What a command needs to know to run on several hosts."""
    add = parser.add_argument
    add("--hosts", metavar="HOST:PORT",
        help="run in several processes, which meet there, at process 0")
    add("--processes", type=int, help="how many, each started with")
    add("--process", type=int, help="its own number, 0 to N - 1")


# %% book/chapters/12_hosts.md, cell 24
def join_from(args: argparse.Namespace) -> None:
    """`join` as the options say; ValueError if they do not fit."""
    n, i = args.processes, args.process
    if n is None or i is None:
        raise ValueError("--hosts needs --processes and --process too")
    args.devices = n if args.devices == 1 else args.devices
    if args.devices % max(n, 1):
        raise ValueError(
            f"--devices {args.devices} must be a multiple of "
            f"--processes {n}: each simulates as many as the others"
        )
    check_join(args.hosts, n, i, PATIENCE)
    print(f"Process {i} of {n}: meeting at {args.hosts}, for at most "
          f"{3 * PATIENCE} s ...", file=sys.stderr, flush=True)
    set_guard(i)
    join(args.hosts, n, i, args.devices // n)


# %% book/chapters/12_hosts.md, cell 25
def reserve_stdout(process: int) -> None:
    """Only what process 0 prints from Python reaches stdout."""
    sys.stdout.flush()
    text = os.dup(1)
    if process > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), text)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(text, "w", encoding="utf-8")


# %% book/chapters/12_hosts.md, cell 26
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


# %% book/chapters/12_hosts.md, cell 27
def last_words(process: int) -> tuple[str, str]:
    """Of a process that lost another, and of one that is killed."""
    name = f"annotated-moe: process {process}: ended, "
    lost = ("because another process never came, is gone or was silent"
            f" for {PATIENCE} s; see what each one said")
    killed = "and not by itself; was it killed, or out of memory?"
    return name + lost, name + killed


# %% book/chapters/12_hosts.md, cell 28
def set_guard(process: int) -> None:
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


# %% book/chapters/12_hosts.md, cell 29
def leave(error: BaseException, process: int) -> NoReturn:
    """Say in a line why, and end this process without waiting."""
    bad_input = isinstance(error, (ValueError, OSError))
    line = (str(error).splitlines() or [type(error).__name__])[0]
    if not bad_input:
        line += "; has another process ended? See what each one said"
    text = f"annotated-moe: process {process}: {line}"
    print(text, file=sys.stderr, flush=True)
    if sys.stderr.fileno() != 2:            # which is the guard's
        os.write(2, b"said\n")
    os._exit(2 if bad_input else 3)


# %% book/chapters/12_hosts.md, cell 30
def check_alone(args: argparse.Namespace) -> None:
    """ValueError for options that mean nothing without --hosts."""
    if args.processes is not None or args.process is not None:
        raise ValueError("--processes and --process go with --hosts")


# %% book/chapters/12_hosts.md, cell 31
Command = Callable[[argparse.Namespace], Any]


def together(run: Command) -> Command:
    """`run`, in step with other processes where --hosts is given."""
    @functools.wraps(run)
    def run_together(args: argparse.Namespace) -> Any:
        if args.hosts is None:
            check_alone(args)
            return run(args)
        join_from(args)
        reserve_stdout(args.process)
        try:
            result = run(args)
            sys.stdout.flush()
        except BaseException as error:
            leave(error, args.process)
        return result

    return run_together
