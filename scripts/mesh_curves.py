"""Do 100 steps on each mesh go as on one device? Prints the largest difference.

    python scripts/mesh_curves.py [STEPS]

Losses of AdamW in float32 on 8 simulated devices: cut by data, expert and model,
by all three with each exchange of tokens, and by two processes of 4 devices.
Relative to one device; fails beyond 1e-4.
"""

import json
import socket
import subprocess
import sys
import time

import jax
import numpy as np

import annotated_moe as am
from annotated_moe import hosts
from annotated_moe.data import batch_at, pack
from annotated_moe.families.grok import grok_config
from annotated_moe.training import (
    MeshTrainer,
    OptimizerSpec,
    ScheduleSpec,
    Trainer,
    TrainSpec,
)

CONFIG = grok_config(
    vocab_size=2048, context=32, d_model=32, d_ff=32, num_layers=2, q_heads=8,
    kv_heads=8, head_size=8, num_experts=8, embedding_multiplier=5.0,
    attn_multiplier=0.35, dtype="float32",
)  # fmt: skip
MESHES = [
    ("data 8", (8, 1, 1), "sum"), ("expert 8", (1, 8, 1), "sum"),
    ("model 8", (1, 1, 8), "sum"), ("2 x 2 x 2", (2, 2, 2), "sum"),
    ("2 x 2 x 2", (2, 2, 2), "all_to_all"), ("2 x 2 x 2", (2, 2, 2), "ring"),
]  # fmt: skip


def rows_to_learn():
    """Sentences that repeat, so that there is something to learn."""
    words = [
        "the",
        "waters",
        "of",
        "heaven",
        "and",
        "earth",
        "were",
        "dried",
        "up",
        "before",
        "the",
        "ark",
    ]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.permuted(words)[:7]) + "." for _ in range(400)]
    return pack(texts, am.load(dtype="float32").tokenizer, 32)


def losses(steps, sizes=None, exchange="sum"):
    spec = TrainSpec(
        steps=steps, batch=8, length=32, schedule=ScheduleSpec(5, 5),
        optimizer=OptimizerSpec(name="adamw"),
    )  # fmt: skip
    if sizes is None:
        trainer = Trainer(CONFIG, spec)
    else:
        mesh = am.make_mesh(data=sizes[0], expert=sizes[1], model=sizes[2])
        trainer = MeshTrainer(CONFIG, spec, mesh, exchange)
    state, rows, found = trainer.begin(), rows_to_learn(), []
    for step in range(steps):
        state, report = trainer.step(state, batch_at(rows, step, 8, 0))
        found.append(float(report["nll"]))
    return np.array(found)


def two_processes(steps):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    jobs = [
        subprocess.Popen(
            [sys.executable, __file__, str(steps), address, str(i)],
            stdout=subprocess.PIPE,
        )
        for i in range(2)
    ]
    first, second = (json.loads(job.communicate()[0].splitlines()[-1]) for job in jobs)
    assert first == second
    return np.array(first)


def main(steps=100, address=None, process=None):
    steps = int(steps)
    jax.config.update("jax_platforms", "cpu")
    if address is not None:
        hosts.join(address, 2, int(process), devices=4, heartbeat_timeout=100)
        print(json.dumps(losses(steps, (2, 2, 2), "all_to_all").tolist()), flush=True)
        return
    jax.config.update("jax_num_cpu_devices", 8)
    one, worst = losses(steps), 0.0
    print(f"one device: {one[0]:.4f} nats a token, after {steps} steps {one[-1]:.4f}")

    def compare(name, curve, begun):
        nonlocal worst
        off = np.abs(curve / one - 1).max()
        worst = max(worst, off)
        print(f"{name:28}{off:.1e}  ({time.time() - begun:.0f} s)", flush=True)

    for name, sizes, exchange in MESHES:
        begun = time.time()
        compare(f"{name}, {exchange}", losses(steps, sizes, exchange), begun)
    begun = time.time()
    compare("two processes, all_to_all", two_processes(steps), begun)
    if worst > 1e-4:
        sys.exit(f"differs by {worst:.1e} from one device")


main(*sys.argv[1:])
