# Generated from book/chapters/98_server_details.md by `make sync`; edit the chapter.
"""`annotated-moe serve`: needs the extra `serve` when it runs.
"""

import argparse
import contextlib
import importlib
import math
import os
import signal
import socket
import sys
from typing import Any

import jax

from annotated_moe.chat import named_templates
from annotated_moe.checkpoints import load
from annotated_moe.config import DTYPES
from annotated_moe.generate import Model
from annotated_moe.parallel import make_mesh
from annotated_moe.plan import parse_mesh
from annotated_moe.serving.engine import Engine
from annotated_moe.serving.requests import Request
from annotated_moe.tokenizer import needed

# %% book/chapters/98_server_details.md, cell 22
KEY = "ANNOTATED_MOE_API_KEY"
LOCAL = "127.0.0.1", "localhost", "[::1]", "::1"
ABOUT = {
    "slots": (int, 8, "requests that run together"),
    "context": (int, None, "tokens a request may hold [the model's]"),
    "max_waiting": (int, 64, "requests that may wait; others get 429"),
    "max_tokens": (int, None, "new tokens a request may ask for [all "
                   "that it may hold]"),
    "timeout": (float, 600.0, "seconds a request may take"),
    "max_body": (int, 2**20, "bytes of a request"),
}


def add_serve(commands: Any) -> None:
    text = "answer OpenAI's protocol over HTTP, and show a page to talk"
    sub = commands.add_parser("serve", help=text, description=text)
    sub.set_defaults(run=run_serve)
    add = sub.add_argument
    add("--model",
        help="checkpoint folder, any layout [the small model]")
    add("--name", default="annotated-moe",
        help="what clients call it [annotated-moe]")
    add("--host", default="127.0.0.1",
        help="address to listen at; 0.0.0.0 is all [127.0.0.1]")
    add("--port", type=int, default=8000, help="0: any free one [8000]")
    for name, (kind, default, about) in ABOUT.items():
        shown = "" if default is None else f" [{default}]"
        add(f"--{name.replace('_', '-')}", type=kind, default=default,
            help=about + shown)
    add("--dtype", choices=list(DTYPES),
        help="what to compute in [what is fast here]")
    add("--kv-cache", choices=["float", "int8"], default="float",
        help="how keys and values are kept [float]")
    add("--devices", type=int, default=1, help="shard over so many [1]")
    add("--mesh", help="instead: DATAxEXPERTxMODEL, such as 1x8x1")
    sub.epilog = f"{KEY} in the environment: a key that clients need."


# %% book/chapters/98_server_details.md, cell 23
def take_address(host: str, port: int) -> socket.socket:
    """A socket at this address; OSError says why not."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be from 0 to 65535, not {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise OSError(
            f"cannot listen at {host}:{port}: "
            f"{(error.strerror or str(error)).lower()}; "
            "try another --port or --host") from None
    return taken


# %% book/chapters/98_server_details.md, cell 24
def model_of(args: argparse.Namespace) -> Model:
    """The model that the options name, on the mesh that they name."""
    if args.mesh is not None and args.devices != 1:
        raise ValueError("--mesh and --devices say the same: give one")
    sizes = {"model": args.devices}
    if args.mesh is not None:
        sizes = parse_mesh(args.mesh)
    devices = math.prod(sizes.values())
    if not 1 <= devices <= 512:
        what = f"--mesh {args.mesh}" if args.mesh else "--devices"
        raise ValueError(
            f"{what} must be 1 to 512 devices, not {devices}")
    if devices == 1:
        return load(
            args.model, dtype=args.dtype, kv_cache=args.kv_cache)
    with contextlib.suppress(RuntimeError):
        # Only CPUs heed this, and only before a device is first used.
        jax.config.update("jax_num_cpu_devices", devices)
    mesh = make_mesh(**sizes)
    return load(
        args.model, mesh, args.dtype, kv_cache=args.kv_cache)


def warm_up(engine: Engine) -> None:
    """Compile what requests and the page need, before there is one."""
    for heat, experts in ((0.0, False), (1.0, False), (1.0, True)):
        with contextlib.suppress(ValueError):   # it may have none
            engine.submit(Request(
                [1], 3, temperature=heat, experts=experts,
                stop_ids=()))
        while engine.busy:
            engine.step()


# %% book/chapters/98_server_details.md, cell 25
def run_serve(args: argparse.Namespace) -> None:
    for library in ("starlette", "uvicorn"):
        needed(library, "annotated-moe serve", "serve")
    guard = importlib.import_module("annotated_moe.serving.guard")
    uvicorn = importlib.import_module("uvicorn")
    for name, (_, _, about) in ABOUT.items():
        value = getattr(args, name)
        if value is not None and not value > 0:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} ({about}) must be above 0")
    key = os.environ.get(KEY, "")
    at = take_address(args.host, args.port)
    with at:
        engine = Engine(model_of(args), args.slots, args.context,
                        max_waiting=args.max_waiting)
        tokenizer = engine.model.require_tokenizer()
        tell("Compiling, which takes some seconds ...")
        warm_up(engine)
        service = guard.Service(
            engine, args.name, args.timeout, args.max_tokens,
            args.max_body)
        app = guard.guarded_app(
            service, key, LOCAL if args.host in LOCAL else ())
        server = uvicorn.Server(uvicorn.Config(
            app, log_level="warning", access_log=False, ws="none",
            server_header=False, timeout_keep_alive=30,
            timeout_graceful_shutdown=int(args.timeout) + 1,
            limit_concurrency=4 * (args.slots + args.max_waiting) + 256,
        ))
        at.listen(1024)                     # who calls now will wait
        greet(args.host, at.getsockname()[1], key)
        if "default" not in named_templates(tokenizer.companions):
            tell("The model has no chat template: it can complete a "
                 "text, not chat.")
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, lambda *_: None)
        server.run(sockets=[at])
    tell("Finished what ran; goodbye.")


# %% book/chapters/98_server_details.md, cell 26
def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def greet(host: str, port: int, key: str) -> None:
    """Where it is, and who can come."""
    name = f"[{host}]" if ":" in host else host
    at = f"http://{name}:{port}"
    tell(f"Listening. A page to talk to the model: {at}\n"
         f"For OpenAI's clients: base_url {at}/v1, api_key "
         f"{f'as in {KEY}' if key else 'anything'}\n"
         "Ctrl-C finishes what runs and ends.")
    if host not in LOCAL and not key:
        tell(f"Anyone who reaches this address may use it: set {KEY}, "
             "or leave out --host.")
