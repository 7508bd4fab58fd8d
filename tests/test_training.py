"""Training: what is packed, one step in all its forms, runs that are killed."""

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import annotated_moe as am
from annotated_moe import cli
from annotated_moe.attention import Window
from annotated_moe.config import Segment
from annotated_moe.data import Packed, batch_at, held_back, pack, split_texts
from annotated_moe.families.grok import grok_config
from annotated_moe.model import all_logits, flat_specs
from annotated_moe.moe import FeedForwardSpec
from annotated_moe.parallel import make_mesh
from annotated_moe.training import (
    LossSpec,
    MeshTrainer,
    OptimizerSpec,
    ScheduleSpec,
    Trainer,
    TrainSpec,
    TrainState,
    bits_per_byte,
    forward_documents,
    gradient,
    make_optimizer,
    make_schedule,
    within_documents,
)

runs = pytest.importorskip("annotated_moe.runs", reason="needs the extra `train`")
recipes = pytest.importorskip("annotated_moe.recipes")

TOKENIZER = am.load(dtype="float32").tokenizer
TEXTS = [
    "The LORD is my shepherd; I shall not want.",
    "import os\n\n\ndef main():\n    return os.getcwd()\n",
    "And it came to pass, that the waters were dried up.",
    "for i in range(10):\n    print(i * i)\n",
    "He maketh me to lie down in green pastures.",
]
ROOMY = grok_config(
    vocab_size=2048,
    context=64,
    d_model=32,
    d_ff=16,
    num_layers=2,
    q_heads=4,
    kv_heads=2,
    head_size=8,
    num_experts=2,  # each has a seat for every token: nothing is dropped
    embedding_multiplier=5.0,
    attn_multiplier=0.35,
    dtype="float32",
)
PLAIN = LossSpec(balance=0.0, router_z=0.0)
SPEC = TrainSpec(steps=10, batch=8, length=32, schedule=ScheduleSpec(2, 2))


@pytest.fixture(scope="module")
def rows():
    return pack(TEXTS * 7, TOKENIZER, 32)


@pytest.fixture(scope="module")
def state():
    return Trainer(ROOMY, SPEC).begin()


def close(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), a, b)


@pytest.mark.parametrize("window", [None, 5])
def test_no_document_sees_another(state, window):
    """Each document's logits in a packed row equal it alone."""
    config = ROOMY
    if window:
        layer = config.layer(0)
        seen = replace(layer.attention, mask=Window(window))
        layer = replace(layer, attention=seen)
        config = replace(config, layers=(Segment((layer,), 2),))
    documents = [np.arange(5, 5 + n) * 7 % 2048 for n in (9, 1, 14)]
    numbers = np.repeat([4, 5, 9, -1], [9, 1, 14, 3])[None]
    row = np.concatenate([*documents, [0, 0, 0]])[None]
    packed, _ = jax.jit(forward_documents, static_argnums=3)(
        state.params, row, numbers, config
    )
    start = 0
    for document in documents:
        alone = all_logits(state.params, document[None], config)
        got = packed[:, start : start + len(document)]
        np.testing.assert_allclose(got, alone, atol=1e-5)
        start += len(document)
    # A change in the first document reaches no other.
    row[0, 3] = 99
    after, _ = jax.jit(forward_documents, static_argnums=3)(
        state.params, row, numbers, config
    )
    assert (after[:, 9:24] == packed[:, 9:24]).all()
    assert (after[:, 3:9] != packed[:, 3:9]).any()


def test_rows_hold_every_token_once(rows):
    ids = [i for text in TEXTS * 7 for i in TOKENIZER.encode(text, add_eos=True)]
    real = rows.documents >= 0
    kept = [*rows.tokens[:, :-1][real[:, :-1]], rows.tokens[-1, -1]]
    assert kept[: len(ids)] == ids or kept[:-1] == ids
    assert (rows.tokens[1:, 0] == rows.tokens[:-1, -1]).all()
    with pytest.raises(ValueError, match="no text"):
        pack([""], TOKENIZER, 8)


def test_a_split_that_no_text_crosses():
    texts = [f"text {i % 150}" for i in range(400)]
    learn, aside = split_texts(texts, 0.2)
    assert len(learn) + len(aside) == 400 and not set(learn) & set(aside)
    assert 40 < len(aside) < 130
    assert all(held_back(text, 0.3) for text in aside)  # a larger share holds it too


def test_the_order_is_a_function_of_seed_and_step(rows):
    count = len(rows.tokens)
    order = [batch_at(rows, step, 3, 7).tokens for step in range(count)]
    once = np.concatenate(order)[: count * 3].reshape(3, count, -1)
    for epoch in once:  # each pass holds each row once
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, rows.tokens))
    assert (once[0] != once[1]).any()
    code = (
        "import numpy as np; from annotated_moe.data import Packed, batch_at; "
        f"a = np.arange({count})[:, None]; "
        "print(batch_at(Packed(a, a), 5, 3, 7).tokens.ravel().tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    at = np.arange(count)[:, None]
    assert done.stdout.strip() == str(
        batch_at(Packed(at, at), 5, 3, 7).tokens.ravel().tolist()
    )


def test_parts_of_a_batch_sum_to_its_gradient(rows, state):
    batch = jax.tree.map(jnp.asarray, batch_at(rows, 0, 8, 0))
    whole, parts = (
        jax.jit(gradient, static_argnums=(2, 3))(
            state.params, batch, ROOMY, replace(SPEC, loss=PLAIN, accumulate=k)
        )
        for k in (1, 4)
    )
    close(whole[0], parts[0], 1e-5)
    assert abs(whole[1]["nll"] - parts[1]["nll"]) < 1e-5
    assert abs(whole[1]["z"] - parts[1]["z"]) < 1e-3


def test_a_gradient_without_kept_layers_is_the_same(rows, state):
    batch = jax.tree.map(jnp.asarray, batch_at(rows, 0, 8, 0))
    kept, again = (
        jax.jit(gradient, static_argnums=(2, 3))(
            state.params, batch, ROOMY, replace(SPEC, remat=remat)
        )
        for remat in (False, True)
    )
    close(kept[0], again[0], 1e-6)
    program = jax.make_jaxpr(gradient, static_argnums=(2, 3))
    text = str(program(state.params, batch, ROOMY, replace(SPEC, remat=True)))
    assert "remat" in text or "checkpoint" in text


def routed(name):
    """ROOMY with another router, and with experts enough to choose from."""
    layer = ROOMY.layer(0)
    experts = replace(layer.feed_forward, router=name, num_experts=4, top_k=1)
    layer = replace(layer, feed_forward=experts)
    return replace(ROOMY, layers=(Segment((layer,), 2),))


@pytest.mark.parametrize(
    "accumulate", [pytest.param(1, marks=pytest.mark.full), 4]
)
def test_a_bias_is_moved_by_its_rule_and_by_no_optimizer(rows, accumulate):
    config = routed("selection_bias")
    rate = replace(SPEC.optimizer, router_rate=0.25)
    spec = replace(SPEC, optimizer=rate, accumulate=accumulate)
    trainer = Trainer(config, spec)
    state = trainer.begin()
    batch = jax.tree.map(jnp.asarray, batch_at(rows, 0, 8, 0))
    grads, _ = jax.jit(gradient, static_argnums=(2, 3))(
        state.params, batch, config, spec)
    loads = np.asarray(grads["decoder_layer/router"]["bias"])      # [L, E]
    want = 0.25 * np.sign(loads.mean(axis=1, keepdims=True) - loads)
    state, _ = trainer.step(state, batch_at(rows, 0, 8, 0))
    got = state.params["decoder_layer/router"]["bias"]
    np.testing.assert_array_equal(got, want)
    for step in (1, 2):
        state, report = trainer.step(state, batch_at(rows, step, 8, 0))
        assert report["finite"]
    bias = np.asarray(state.params["decoder_layer/router"]["bias"])
    steps = bias / 0.25                 # whole steps up, down or none
    np.testing.assert_array_equal(steps, steps.round())
    assert 0 < np.abs(steps).max() <= 3


def test_quantiles_of_a_batch_in_parts_are_their_mean(rows):
    config = routed("quantile")
    spec = replace(SPEC, accumulate=4)
    trainer = Trainer(config, spec)
    state = trainer.begin()
    batch = jax.tree.map(jnp.asarray, batch_at(rows, 0, 8, 0))
    grads, _ = jax.jit(gradient, static_argnums=(2, 3))(
        state.params, batch, config, spec)
    want = np.asarray(grads["decoder_layer/router"]["bias"]) / 4
    state, _ = trainer.step(state, batch_at(rows, 0, 8, 0))
    got = np.asarray(state.params["decoder_layer/router"]["bias"])
    np.testing.assert_allclose(got - got[:, :1], want - want[:, :1], atol=1e-6)
    assert np.abs(got - got[:, :1]).max() > 1e-3


def test_a_router_s_noise_is_of_the_seed_and_the_step(rows):
    config = routed("noisy_top_k")
    curves = []
    for seed in (0, 0, 1):
        trainer = Trainer(config, replace(SPEC, seed=seed))
        state = Trainer(config, SPEC).begin()
        _, report = trainer.step(state, batch_at(rows, 0, 8, 0))
        curves.append(float(report["nll"]))
    assert curves[0] == curves[1] != curves[2]


def test_a_router_that_looks_ahead_is_not_trained_here():
    with pytest.raises(ValueError, match="'expert_choice' sends a token by tokens"):
        Trainer(routed("expert_choice"), SPEC)


def test_long_rows_of_documents_go_by_tiles(state):
    """Rows long enough for flash attention: every document equals itself alone."""
    config = replace(ROOMY, context=512)
    documents = [np.arange(n) * 11 % 2048 for n in (130, 200, 60)]
    numbers = np.repeat([0, 1, 2], [130, 200, 60])[None]
    row = np.concatenate(documents)[None]

    def loss(params, row, numbers):
        logits, _ = forward_documents(params, row, numbers, config)
        return jnp.sin(logits).sum()

    slope = jax.jit(jax.grad(loss))
    whole = slope(state.params, row, numbers)
    alone = [slope(state.params, d[None], np.zeros((1, len(d)), int))
             for d in documents]  # fmt: skip
    total = jax.tree.map(lambda *parts: sum(parts), *alone)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(total)):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(abs(b).max()))


def curve(config, spec, rows, mesh=None):
    trainer = MeshTrainer(config, spec, mesh) if mesh else Trainer(config, spec)
    state, found = trainer.begin(), []
    for step in range(spec.steps):
        state, report = trainer.step(state, batch_at(rows, step, spec.batch, 0))
        found.append(float(report["nll"]))
    return np.array(found), state


@pytest.mark.parametrize(
    "name", ["adamw", pytest.param("muon", marks=pytest.mark.full)]
)
def test_a_mesh_trains_as_one_device(rows, name):
    """On 8 devices, 2 along each axis. AdamW stands for Muon, which compiles longer."""
    config = ROOMY
    spec = replace(SPEC, optimizer=OptimizerSpec(name=name))
    one, _ = curve(config, spec, rows)
    mesh = make_mesh(data=2, expert=2, model=2)
    eight, state = curve(config, spec, rows, mesh)
    np.testing.assert_allclose(eight, one, rtol=1e-4)
    assert one[-1] < one[0] - 0.2
    held = {
        tuple(a.sharding.spec)
        for a in jax.tree.leaves(state)
        if a.shape == (2, 2, 32, 16)
    }
    # Weights and the optimizer's memory of them are cut three ways.
    assert held == {(None, "expert", "data", "model")}


def test_muon_straightens_each_matrix_by_itself(state):
    """One expert's update does not know the other experts' gradients."""
    spec = replace(SPEC, optimizer=OptimizerSpec(clip=None, weight_decay=0.0), steps=10)
    optimizer = make_optimizer(ROOMY, spec)
    noise = jax.random.normal(jax.random.key(0), (2, 2, 32, 16))
    zeros = jax.tree.map(jnp.zeros_like, state.params)

    def update(g):
        grads = {m: dict(leaves) for m, leaves in zeros.items()}
        grads["decoder_layer/moe/linear"]["w"] = g
        memory = optimizer.init(state.params)
        updates, _ = optimizer.update(grads, memory, state.params)
        return updates["decoder_layer/moe/linear"]["w"]

    both = update(noise)
    other = update(noise.at[1, 1].multiply(100.0))
    np.testing.assert_allclose(both[:, 0], other[:, 0], atol=1e-7)
    stretch = np.linalg.svd(both[0, 0] / jnp.linalg.norm(both[0, 0]))[1]
    assert stretch.max() / stretch.min() < 2.5
    memory = optimizer.init(state.params)
    muon = memory.inner_states["muon"].inner_state[0].mu
    by_muon = {
        (module, name)
        for module, leaves in muon.items()
        for name, w in leaves.items()
        if isinstance(w, jax.Array)
    }
    assert by_muon == {key for key, s in flat_specs(ROOMY).items() if s.matrix}


def test_warm_up_stable_decay():
    plan = make_schedule(ScheduleSpec(4, 5, 0.1), 2.0, 20)
    rates = [float(plan(step)) for step in range(21)]
    assert rates[0] == 0.5 and rates[4:16] == [2.0] * 12
    assert all(a > b for a, b in zip(rates[15:20], rates[16:21]))
    assert rates[20] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="more than all 8 steps"):
        TrainSpec(steps=8, batch=1, length=8, schedule=ScheduleSpec(4, 5))


def test_bits_per_byte_counts_every_byte(state):
    """By hand, a document at a time."""
    texts = TEXTS[:3]
    nats = 0.0
    for text in texts:
        ids = np.array(TOKENIZER.encode(text, add_eos=True))
        logits = all_logits(state.params, ids[None, :-1], ROOMY)[0]
        nats += float(
            optax.softmax_cross_entropy_with_integer_labels(logits, ids[1:]).sum()
        )
    bits = nats / np.log(2) + 3 * 11  # log2 of 2,048 for each first token
    want = bits / sum(len(text.encode()) for text in texts)
    trainer = Trainer(ROOMY, replace(SPEC, batch=2))
    got = bits_per_byte(trainer, state.params, pack(texts, TOKENIZER, 64), texts)
    # Rows are cut at 32 or 64 tokens, so nothing is lost at a cut only here.
    assert got == pytest.approx(want, rel=1e-4)


def poisoned(state, module, name, index, value):
    params = {m: dict(leaves) for m, leaves in state.params.items()}
    params[module][name] = params[module][name].at[index].set(value)
    return replace(state, params=params)


def test_what_is_not_finite_is_named(rows, state, tmp_path):
    batch = batch_at(rows, 0, 8, 0)
    weight = "decoder_layer/moe/linear_v"
    bad = poisoned(state, weight, "w", (1, 0, 3, 4), np.nan)
    assert runs.find_fault(bad, batch, ROOMY, SPEC) == (
        f"a weight: layer 1, {weight}/w"
    )
    huge = poisoned(state, "decoder_layer/rms_norm_1", "scale", 1, 3e38)
    huge = poisoned(huge, "decoder_layer/rms_norm_3", "scale", 1, 3e38)
    said = runs.find_fault(huge, batch, ROOMY, SPEC)
    assert said == "what is computed: layer 1, its output"
    # The last of a step's parts compiles sooner without experts.
    hot = replace(SPEC, optimizer=OptimizerSpec(name="adamw", rate=3e37, clip=None))
    layer = replace(ROOMY.layer(0), feed_forward=FeedForwardSpec(16))
    dense = replace(ROOMY, layers=(Segment((layer,), 2),))
    with pytest.raises(runs.NotFinite, match="step 0 is.* in_out_embed/") as caught:
        run = runs.RunSpec("x", save_every=1)
        runs.train(Trainer(dense, hot), rows, run, tmp_path, {})
    step = int(str(caught.value).split()[1])
    saved = runs.Checkpoints(tmp_path / "checkpoints", 3)
    assert (saved.latest or 0) <= step


def test_a_full_disk_leaves_the_last_checkpoint(state, tmp_path):
    kept = runs.Checkpoints(tmp_path, 1)
    kept.save(state, {"run": 1})
    later = TrainState(state.params, state.memory, state.step + 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(OSError, match="the one of step 0 is whole") as caught:
            kept.save(later, {"run": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "File too large" in str(caught.value)
    again = runs.Checkpoints(tmp_path, 1)
    assert again.latest == 0 and os.listdir(tmp_path) == ["0"]
    close(again.restore(Trainer(ROOMY, SPEC).like), state, 0)
    again.save(later, {"run": 1})
    assert again.latest == 5 and os.listdir(tmp_path) == ["5"]


def test_a_disk_without_room_is_seen_before_a_byte_is_written(
    state, tmp_path, monkeypatch
):
    kept = runs.Checkpoints(tmp_path, 1)
    kept.save(state, {"run": 1})
    left = SimpleNamespace(free=10_000)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda folder: left)
    with pytest.raises(OSError, match="0.0 MB are free.; the one of step 0 is whole"):
        kept.save(replace_step(state, 5), {"run": 1})
    assert os.listdir(tmp_path) == ["0"]


def test_a_damaged_checkpoint_says_what_to_do(state, tmp_path):
    for step in (0, 3):
        runs.Checkpoints(tmp_path, 2).save(replace_step(state, step), {"run": 1})
    like = Trainer(ROOMY, SPEC).like
    flipped = 0
    for file in tmp_path.glob("3/state/ocdbt.process_0/d/*"):
        whole = file.read_bytes()
        if len(whole) < 50_000:
            continue
        for at in range(len(whole) // 7, len(whole), len(whole) // 7):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1:])
            try:
                close(runs.Checkpoints(tmp_path, 2).restore(like),
                      replace_step(state, 3), 0)
            except ValueError as error:
                assert "3 is damaged" in str(error) and "from step 0" in str(error)
                flipped += 1
        file.write_bytes(whole)
    assert flipped >= 3
    assert int(runs.Checkpoints(tmp_path, 2).restore(like).step) == 3
    (tmp_path / "99").mkdir()
    with pytest.raises(ValueError, match="99 is damaged .* from step 3"):
        runs.Checkpoints(tmp_path, 3).about()


def replace_step(state, step):
    return TrainState(state.params, state.memory, jnp.asarray(step, jnp.int32))


RECIPE = """\
[model]
context = 32
d_model = 8
d_ff = 8
num_layers = 1
q_heads = 2
kv_heads = 1
head_size = 8
num_experts = 2
dtype = "float32"
[data]
files = ["texts"]
validation = 0.2
[train]
steps = 400
batch = 2
length = 32
[schedule]
warmup = 3
[optimizer]
name = "adamw"
[run]
folder = "out"
save_every = 10
log_every = 1
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS * 4):
        (tmp_path / f"texts/{i}.txt").write_text(f"{text}\n{i}\n")
    file = tmp_path / "run.toml"
    file.write_text(RECIPE)
    return file


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.full)])
def test_killed_the_weights_are_the_same_bits(recipe, tmp_path, kills):
    """kill -9 while it steps and saves; one more run ends as if never stopped."""
    steps = 60 + 30 * kills
    text = RECIPE.replace("steps = 400", f"steps = {steps}")
    recipe.write_text(text)
    log = tmp_path / "out/log.jsonl"
    rng = np.random.default_rng()
    reached = []
    for _ in range(kills):
        start = reached[-1] if reached else 0
        child = child_of(recipe)
        end = time.monotonic() + 60
        while time.monotonic() < end and child.poll() is None:
            lines = runs.read_log(log)
            if lines and lines[-1]["step"] > start + 15:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        child.kill()
        child.communicate()
        assert child.wait() == -signal.SIGKILL, "it ended before it was killed"
        reached.append(runs.read_log(log)[-1]["step"])
    assert cli.main(["train", str(recipe)]) == 0
    lines = [line["step"] for line in runs.read_log(log) if "nll" in line]
    assert lines == list(range(1, steps + 1))
    whole = tmp_path / "whole.toml"
    whole.write_text(text.replace('"out"', '"whole"'))
    assert cli.main(["train", str(whole)]) == 0
    a, b = (am.load(tmp_path / name / "model").params for name in ("out", "whole"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    model = am.load(tmp_path / "out/model", dtype="float32")
    assert isinstance(model.generate("The LORD", max_new_tokens=3), str)


@pytest.mark.parametrize(
    "moment", ["in a step", pytest.param("before", marks=pytest.mark.full),
               pytest.param("while it saves", marks=pytest.mark.full)]
)
def test_interrupted_a_whole_state_remains(recipe, tmp_path, moment):
    """Ctrl-C: one line, 130, and the same command goes on."""
    if moment == "while it saves":
        recipe.write_text(RECIPE.replace("save_every = 10", "save_every = 1"))
    log = tmp_path / "out/log.jsonl"
    wait_for = tmp_path / "out/lock" if moment == "before" else log
    with child_of(recipe) as child:
        while child.poll() is None and not (
            wait_for.exists() and (moment == "before" or runs.read_log(log))
        ):
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    said = [line for line in err.replace("\r", "\n").split("\n")
            if line and "tokens" not in line]
    assert len(said) == 1 and said[0].startswith("annotated-moe: stopped"), err
    saved = runs.Checkpoints(tmp_path / "out/checkpoints", 3).latest
    if moment == "before":
        assert saved is None
    else:
        assert f"stopped after step {saved}, which is saved" in said[0]
        assert runs.read_log(log)[-1]["step"] == saved


def child_of(recipe):
    """`annotated-moe train`, in a process of its own."""
    script = (
        "import sys, jax; jax.config.update('jax_num_cpu_devices', 8); "
        "from annotated_moe.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", script, "train", str(recipe)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_one_run_a_folder_and_none_backwards(recipe, tmp_path, capsys):
    recipe.write_text(RECIPE.replace("steps = 400", "steps = 20"))
    (tmp_path / "out").mkdir()
    with recipes.alone_in(tmp_path / "out"):
        assert cli.main(["train", str(recipe)]) != 0
    assert "another run is at work in" in capsys.readouterr().err
    assert not (tmp_path / "out/checkpoints").exists()
    assert cli.main(["train", str(recipe)]) == 0
    recipe.write_text(RECIPE.replace("steps = 400", "steps = 10"))
    assert cli.main(["train", str(recipe)]) != 0
    assert "is at step 20 already: ask for more" in capsys.readouterr().err


def test_texts_are_read_once_and_not_the_run_s_own(recipe, tmp_path):
    odd = tmp_path / "run[1]"
    odd.mkdir()
    for name in ("a[1].txt", "b.txt", "out/c.txt"):
        (odd / name).parent.mkdir(exist_ok=True)
        (odd / name).write_text(name)
    (odd / "loop").symlink_to(odd)

    def texts(*files):
        spec = recipes.DataSpec(files=files, validation=0.1)
        return recipes.read_texts(odd, spec, odd / "out")

    assert texts(".") == texts("*.txt", "loop/b.txt", ".") == ["a[1].txt", "b.txt"]
    assert texts("a[1].txt") == ["a[1].txt"] and texts("[b].txt") == ["b.txt"]


def test_an_evaluation_needs_texts_that_are_held_back(recipe, capsys):
    text = RECIPE.replace("validation = 0.2", "validation = 0.0")
    recipe.write_text(text + "evaluate_every = 5\n")
    assert cli.main(["train", str(recipe)]) != 0
    said = capsys.readouterr().err
    assert "evaluate_every has nothing to measure" in said and "none of 20" in said


WRONG = {
    "sizes": ("d_model = 8\n", "", "[model] needs a preset, or sizes"),
    "seats": ("d_ff", "capacity_factor = 2.0\nd_ff", "has no key 'capacity_factor'"),
    "section": ("[data]", "[date]\n[data]", "no section 'date'; did you mean 'data'?"),
    "key": ("batch", "bach", "[train] has no key 'bach'; did you mean 'batch'?"),
    "type": ("batch = 2", "batch = '2'", "[train] batch must be an int of 1 or more"),
    "value": ("steps = 400", "steps = 0", "[train] steps must be an int of 1 or more"),
    "missing": ("length = 32", "", "[train] needs the key 'length', an int"),
    "model": ("d_ff", "dff", "[model] has no key 'dff'; did you mean 'd_ff'?"),
    "size": ("d_ff = 8", "d_ff = 1.5", "[model] d_ff must be an int of 1 or more"),
    "heads": ("kv_heads = 1", "kv_heads = 3", "[model] 2 query heads cannot share 3"),
    "preset": ("[model]", "[model]\npreset = 'grok-2'", "did you mean 'grok-1'?"),
    "optimizer": ('"adamw"', '"adam"', "adamw, muon"),
    "decay": ("warmup = 3", "decay = 400", "[train] warmup 100 and decay 400 are more"),
    "files": ('["texts"]', '["nothing"]', "[data] files: nothing in"),
    "context": ("context = 32", "context = 16", "rows of 32 tokens do not fit"),
    "mesh": ("[train]", "[mesh]\ndata = 4\n[train]", "[mesh] data = 4 cannot cut 2"),
    "no exchange": ("[train]", "[mesh]\nexchange = 'post'\n[train]", "exchange must"),
    "exchange": (
        "[train]", "[mesh]\ndata = 2\nexchange = 'ring'\n[train]", "would do nothing"
    ),
    "growing": (
        "[model]", "[model]\npreset = 'llama-4-scout'", "'llama-4-scout' cannot be tr"
    ),
    "TOML": ("[train]", "[train", "is no TOML"),
    "tokens": ("d_ff = 8", "d_ff = 8\nvocab_size = 9", "vocab_size"),
}


@pytest.mark.parametrize("old, new, said", WRONG.values(), ids=WRONG)
def test_a_wrong_recipe_is_one_sentence(recipe, capsys, old, new, said):
    recipe.write_text(RECIPE.replace(old, new, 1))
    assert cli.main(["train", str(recipe)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err, err
    assert str(recipe) in err


def test_another_run_is_not_gone_on_from(recipe, capsys):
    short = RECIPE.replace("steps = 400", "steps = 4")
    recipe.write_text(short)
    assert cli.main(["train", str(recipe)]) == 0
    recipe.write_text(short.replace('"adamw"', '"adamw"\nrate = 0.5'))
    capsys.readouterr()
    assert cli.main(["train", str(recipe)]) == 2
    assert "train.optimizer.rate = 0.003" in capsys.readouterr().err
    recipe.write_text(RECIPE.replace("steps = 400", "steps = 6"))  # longer: goes on
    assert cli.main(["train", str(recipe)]) == 0
    assert runs.read_log(recipe.parent / "out/log.jsonl")[-1]["step"] == 6


def test_within_documents_refuses_queries_that_grow():
    found = [
        c
        for c in am.PRESETS.values()
        if any(getattr(c.layer(i).attention, "floor", None) for i in range(4))
    ]
    for config in found:
        with pytest.raises(ValueError, match="grow with their position"):
            within_documents(config)
    assert found
