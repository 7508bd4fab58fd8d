"""The engine: each request as if it were alone, whoever else is there."""

import argparse
import threading
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import model as model_module
from annotated_moe.attention import Window
from annotated_moe.families.grok import grok_config
from annotated_moe.lens import tap
from annotated_moe.model import init_params
from annotated_moe.sampling import keep, least_of_nucleus, least_of_top_k
from annotated_moe.serve_command import add_serve, model_of
from annotated_moe.serving import Engine, QueueFull, Request
from annotated_moe.serving import engine as engine_module
from annotated_moe.serving import rows as rows_module
from annotated_moe.serving.requests import RowText

TINY = grok_config(
    vocab_size=64, context=64, d_model=32, d_ff=48, num_layers=2, q_heads=4,
    kv_heads=2, head_size=8, num_experts=4, embedding_multiplier=8.0, dtype="float32",
)  # fmt: skip


def with_layers(config, **changes):
    """The configuration with other attention in each layer."""
    (segment,) = config.layers
    (layer,) = segment.pattern
    layer = replace(layer, attention=replace(layer.attention, **changes))
    return replace(config, layers=(replace(segment, pattern=(layer,)),))


def make(config=TINY, mesh=None):
    params = jax.jit(lambda key: init_params(key, config))(jax.random.key(3))
    return am.Model(config, params, mesh=mesh)


@pytest.fixture(scope="module")
def tiny():
    return make()


def some_requests(count, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        prompt = rng.integers(3, 64, rng.integers(1, longest)).tolist()
        warm = rng.random() < 0.6
        found.append(Request(
            prompt, int(rng.integers(1, 34)), 0.9 if warm else 0.0,
            float(rng.choice([1.0, 0.8])), [None, 5][rng.integers(2)],
            int(rng.integers(2**32)), [[], [7, 9]][rng.integers(2)],
            experts=bool(rng.random() < 0.1), logprobs=[None, 3][rng.random() < 0.1],
        ))  # fmt: skip
    return found


def alone(model, request):
    """What `generate_ids` makes of the prompt, in a batch of its own."""
    (new,) = model.generate_ids(
        [request.prompt], request.max_new_tokens, request.temperature, request.top_p,
        request.top_k, request.seed, request.stop_ids,
    )  # fmt: skip
    return new


def finish(engine, steps=3000):
    while engine.busy:
        engine.step()
        steps -= 1
        assert steps, "the engine does not come to an end"


def serve(engine, requests):
    handles = [engine.submit(request) for request in requests]
    finish(engine)
    return [handle.result(0.0) for handle in handles]


def programs():
    """How many programs there are, of each kind that an engine runs."""
    m, r = model_module, rows_module
    kinds = m.prefill, m.decode_step, r.choose_rows, r.place_row, r.place_logits
    return np.array([kind._cache_size() for kind in (*kinds, r.copy_row)])


def test_forty_requests_get_what_they_get_alone(tiny):
    requests, before = some_requests(40), programs()
    engine = Engine(tiny, slots=8, prefill_chunk=16, max_waiting=40)
    results = serve(engine, requests)
    made = programs() - before
    for request, result in zip(requests, results):
        assert result.tokens == alone(tiny, request)
        stopped = len(result.tokens) < request.max_new_tokens
        assert result.finish_reason == ("stop" if stopped else "length")
        assert [e.index for e in result.events if e.token is not None] == [
            *range(len(result.tokens))]
    # Widths 16 in short and in long side rows, and with experts; steps with and
    # without; ways to choose; side rows of both lengths.
    assert (made <= [4, 2, 6, 2, 1, 1]).all(), made
    counts = engine.stats
    assert counts.ended["length"] + counts.ended["stop"] == 40
    assert counts.new_tokens == sum(len(r.tokens) for r in results)
    assert counts.row_steps > 0.7 * 8 * counts.steps


def test_a_prompt_begins_where_another_was(tiny):
    rng = np.random.default_rng(1)
    head = rng.integers(3, 64, 20).tolist()
    first = Request(head, 8, stop_ids=())
    engine = Engine(tiny, slots=3)
    (said,) = serve(engine, [first])
    talk = Request([*head, *said.tokens, 5, 6], 9, 1.0, seed=4)
    other, short = Request([*head, 9], 6), Request(head[:12], 6)
    for request, reused in ((talk, 27), (other, 20), (short, 0), (talk, 29)):
        before = engine.stats.prefix_tokens
        (result,) = serve(engine, [request])
        assert result.tokens == alone(tiny, request)
        assert engine.stats.prefix_tokens - before == reused
    # One that still writes is a beginning, too.
    engine.submit(Request(head, 30, stop_ids=()))
    engine.step()
    (result,) = serve(engine, [other])
    assert result.tokens == alone(tiny, other)
    assert engine.stats.prefix_hits == 5


def test_rings_are_read_whole():
    model = make(with_layers(TINY, mask=Window(16)))
    engine = Engine(model, slots=2, prefill_chunk=16)
    requests = some_requests(6, seed=2)
    for result, request in zip(serve(engine, requests * 2), requests * 2):
        assert result.tokens == alone(model, request)
    assert engine.stats.prefix_hits == 0


@pytest.mark.parametrize("window", [None, 24])
def test_eight_bit_caches_are_served_as_they_are_alone(window, monkeypatch):
    """Grown, shrunk, copied and read together: the numbers and their scales."""
    monkeypatch.setattr(engine_module, "slots_for", engine_module.bucket)
    monkeypatch.setattr(engine_module, "PATIENCE", 4)
    config = with_layers(TINY, mask=Window(window)) if window else TINY
    model = replace(make(config), kv_cache="int8")
    engine = Engine(model, slots=3, prefill_chunk=32)
    requests = [replace(r, temperature=1.0) for r in some_requests(12, seed=12)]
    talk = Request([5, 9] * 12, 9, stop_ids=())
    for some in (requests, [talk], [replace(talk, prompt=[*talk.prompt, 7])]):
        for request, result in zip(some, serve(engine, some)):
            assert result.tokens == alone(model, request)
    assert {x.dtype.name for x in jax.tree.leaves(engine.cache)} == {
        "int8", "float32", "int32"}
    assert (engine.stats.prefix_hits > 0) == (window is None)


def test_a_cache_in_pages_is_refused(tiny):
    for kind in ("paged", "paged-int8"):
        wanted = f"kv_cache '{kind}' has in pages: .* 'float' or 'int8'"
        with pytest.raises(ValueError, match=wanted):
            Engine(replace(tiny, kv_cache=kind))


def test_serve_keeps_its_cache_in_eight_bits():
    parser = argparse.ArgumentParser()
    add_serve(parser.add_subparsers())
    for more, kind in (([], "float"), (["--kv-cache", "int8"], "int8")):
        model = model_of(parser.parse_args(["serve", "--dtype", "float32", *more]))
        assert Engine(model, slots=2, context=64).model.kv_cache == kind
    with pytest.raises(SystemExit):
        parser.parse_args(["serve", "--kv-cache", "paged"])


@pytest.mark.parametrize("axes", [(1, 2, 2), (2, 2, 1)], ids=str)
def test_a_mesh_says_what_one_device_says(tiny, axes):
    mesh = am.make_mesh(*axes)
    spread = make(mesh=mesh)
    requests = some_requests(8, seed=3)
    engine = Engine(spread, slots=4, prefill_chunk=32)
    for result, request in zip(serve(engine, requests), requests):
        assert result.tokens == alone(tiny, request)


@pytest.mark.parametrize("options", [["--mesh", "1x2x2"], ["--devices", "2"]], ids=str)
def test_serve_takes_a_mesh(options):
    """The model that ships: its requests on devices of a mesh, and on one."""
    parser = argparse.ArgumentParser()
    add_serve(parser.add_subparsers())
    found = []
    for more in ([], options):
        args = parser.parse_args(["serve", "--dtype", "float32", *more])
        model = model_of(args)
        assert (model.mesh is None) == (not more)
        ids = [model.tokenizer.encode(t) for t in ("In the beginning", "def f(", "2 +")]
        engine = Engine(model, slots=4, context=64)
        found.append([r.tokens for r in serve(engine, [Request(i, 8) for i in ids])])
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="give one"):
        model_of(parser.parse_args(["serve", "--mesh", "1x2x1", "--devices", "2"]))


def test_who_cancels_leaves_within_a_step_and_the_others_stay(tiny):
    rng = np.random.default_rng(5)
    requests = [
        replace(r, max_new_tokens=30, stop_ids=()) for r in some_requests(24, 5)]
    engine = Engine(tiny, slots=4, prefill_chunk=16)
    handles = [engine.submit(request) for request in requests]
    gone = set()
    while engine.busy:
        engine.step()
        if rng.random() < 0.2:
            i = int(rng.integers(len(handles)))
            if not handles[i].done:
                gone.add(i)
                handles[i].cancel()
                engine.step()
                assert handles[i].result(0.0).finish_reason == "cancelled"
    for i, (handle, request) in enumerate(zip(handles, requests)):
        result, wanted = handle.result(0.0), alone(tiny, request)
        assert result.tokens == wanted[: len(result.tokens)]
        assert (len(result.tokens) < 30) == (i in gone)
    assert 3 < len(gone) < 20 and engine.stats.ended["cancelled"] == len(gone)
    assert engine.stats.running == engine.stats.waiting == 0


class Steps:
    """A constraint: ids that grow, up to 60."""

    def __init__(self):
        self.last, self.done = 2, False

    def mask(self):
        return np.arange(64) > self.last

    def accept(self, token):
        assert token > self.last
        self.last, self.done = token, token >= 60


def test_prompts_that_wait_are_read_together(tiny):
    requests = [replace(r, max_new_tokens=12) for r in some_requests(24, 9, 40)]
    asked = Request([5, 9, 33], 5, experts=True, logprobs=2, stop_ids=())
    requests[3], fresh = asked, {"slots": 4, "prefill_chunk": 64, "keep": False}
    (lone,) = serve(Engine(tiny, **fresh), [asked])
    engine = Engine(tiny, **fresh)
    handles = [engine.submit(request) for request in requests]
    while engine.stats.running < 4 or not engine.ready:
        engine.step()
    gone = engine.ready[-1].handle  # read, and without a row
    gone.cancel()
    engine.step()
    assert gone.result(0.0).finish_reason == "cancelled"
    finish(engine)
    for handle, request in zip(handles, requests):
        if handle is not gone:
            assert handle.result(0.0).tokens == alone(tiny, request)
    assert engine.stats.chunks < 20             # for 24 prompts
    for mine, own in zip(handles[3].result(0.0).events, lone.events, strict=True):
        assert (mine.experts == own.experts).all()
        assert mine.logprob == pytest.approx(own.logprob, abs=1e-4)


def test_a_step_is_begun_before_the_last_is_read(tiny):
    """Stops, cancellation and a grammar: what was computed for nobody is not shown."""
    growing = Request([7, 8], 40, 1.0, constraint=Steps(), stop_ids=(), seed=3)
    (wanted,) = serve(Engine(tiny, slots=1), [growing])
    engine = Engine(tiny, slots=3, keep=False)
    requests = [replace(r, stop_ids=range(0, 64, 9)) for r in some_requests(20, 10)]
    handles = [engine.submit(request) for request in requests]
    grammar = engine.submit(replace(growing, constraint=Steps()))
    left = engine.submit(Request([6, 5], 60, stop_ids=()))
    ahead, freed = 0, False
    while engine.busy:
        seen = sum(len(h.events) for h in handles)
        engine.step()
        for job in engine.all_jobs():
            assert job.sent - len(job.tokens) in (0, 1)
            ahead += job.sent > len(job.tokens)
        assert sum(len(h.events) for h in handles) - seen <= 3
        if len(left.events) == 3:
            left.cancel()
            engine.step()
            freed = left.done and all(j.handle is not left for j in engine.all_jobs())
            told = len(left.events)
    assert freed and len(left.events) == told == 4
    for handle, request in zip(handles, requests):
        assert handle.result(0.0).tokens == alone(tiny, request)
    assert grammar.result(0.0).tokens == wanted.tokens
    counts = engine.stats
    stopped = counts.ended["stop"]
    # A stop id, which is no new token, took a step, and one more was in vain.
    assert stopped > 8 and ahead >= counts.new_tokens
    firsts = len(handles) + 2
    assert 0 <= counts.row_steps - (counts.new_tokens - firsts) <= 2 * stopped + 2


@pytest.mark.parametrize("ring", [False, True])
def test_a_cache_grows_and_shrinks_under_its_rows(tiny, monkeypatch, ring):
    monkeypatch.setattr(engine_module, "slots_for", engine_module.bucket)
    monkeypatch.setattr(engine_module, "PATIENCE", 4)
    model = make(with_layers(TINY, mask=Window(24))) if ring else tiny
    engine, sizes = Engine(model, slots=3, prefill_chunk=16), []
    long, some = Request([9] * 50), some_requests(14, 11, 6)
    requests = [*some[:5], long, *some[5:]]
    requests = [replace(r, max_new_tokens=12) for r in requests]
    handles = [engine.submit(request) for request in requests]
    while engine.busy:
        engine.step()
        sizes.append(engine.room)
    for handle, request in zip(handles, requests):
        assert handle.result(0.0).tokens == alone(model, request)
    assert sizes[0] < 64 == max(sizes) and (sizes[-1] < 64) == (not ring)
    # What was cut off a row is no beginning any more.
    engine = Engine(model, slots=2)
    long, short = replace(long, max_new_tokens=8), Request([5], 12, stop_ids=())
    for request in (long, short, replace(long, prompt=[*long.prompt, 7])):
        (result,) = serve(engine, [request])
        assert result.tokens == alone(model, request)
    assert engine.stats.prefix_tokens == (0 if ring else 16)


def test_cuts_are_those_of_sorting():
    rng = np.random.default_rng(4)
    x = jnp.asarray(3 * rng.standard_normal((64, 97)), jnp.float32).at[:, 90:].set(1.5)
    for k, p in ((0, 0.3), (5, 1.0), (12, 0.9), (0, 1.0), (97, 1e-9), (200, 0.99)):
        given = jnp.full(64, k, jnp.int32), jnp.full(64, p, jnp.float32)
        wanted = keep(x, least_of_top_k, given[0])
        wanted = keep(wanted, least_of_nucleus, given[1])
        np.testing.assert_array_equal(rows_module.keep_likely(x, *given), wanted)


def test_a_broken_row_breaks_no_other():
    config = replace(TINY, tied=False)
    whole = make(config)
    params = {name: dict(leaves) for name, leaves in whole.params.items()}
    table = params["in_out_embed"]["embeddings"]
    params["in_out_embed"]["embeddings"] = table.at[63].set(jnp.nan)
    broken = am.Model(config, params)
    never = {"stop_ids": (), "logit_bias": {63: -1e9}}
    good = [replace(r, prompt=[t % 60 for t in r.prompt], **never)
            for r in some_requests(8, seed=6)]
    late = Request([5, 6, 7], 20, logit_bias={63: 1e9}, stop_ids=())
    bad = Request([3] * 18 + [63] * 4, 5)
    engine = Engine(broken, slots=3, max_waiting=40)
    good[4] = replace(good[4], prompt=[3] * 18 + [5, 6])
    results = serve(engine, [*good[:4], bad, late, bad, *good[4:]])
    for i in (4, 6):
        assert results[i].finish_reason == "error" and results[i].tokens == []
        assert "NaN" in results[i].error
    assert results[5].finish_reason == "error" and results[5].tokens == [63]
    others = [*results[:4], *results[7:]]
    fine = Engine(whole, slots=1, max_waiting=40)
    assert [r.tokens for r in others] == [r.tokens for r in serve(fine, good)]


def test_what_a_broken_token_left_reaches_nobody():
    """A stop id that is broken is read by a step that nobody sees."""
    config = replace(TINY, tied=False)
    params = {name: dict(leaves) for name, leaves in make(config).params.items()}
    table = params["in_out_embed"]["embeddings"]
    params["in_out_embed"]["embeddings"] = table.at[63].set(jnp.nan)
    broken = am.Model(config, params)
    prompt = [3 + i % 50 for i in range(40)]
    engine = Engine(broken, slots=1)
    bad = Request(prompt, 9, stop_ids=[63], logit_bias={63: 1e9})
    for good in (Request(prompt[:5], 40, stop_ids=()), Request([*prompt, 7], 9)):
        good = replace(good, logit_bias={63: -1e9})
        first, second = serve(engine, [bad, good])
        assert first.finish_reason == "stop"
        assert second.finish_reason == "length", second.error


def test_every_token_comes_with_its_experts_and_its_logarithms(tiny):
    asked = Request(
        [5, 9, 33, 8], 6, 1.0, seed=1, experts=True, logprobs=4, stop_ids=())
    plain = replace(asked, experts=False, logprobs=None, seed=2, prompt=[4, 4])
    first, second = serve(Engine(tiny, slots=2), [asked, plain])
    row = np.array([[*asked.prompt, *first.tokens]])
    taps = tap(tiny, row)
    logs = np.asarray(jax.nn.log_softmax(tiny.logits(row)[0]))
    for event in first.events:
        at = len(asked.prompt) - 1 + event.index
        assert (event.experts == taps.experts[:, at]).all()
        assert event.logprob == pytest.approx(logs[at, event.token], abs=1e-4)
        ids, values = zip(*event.top_logprobs)
        assert [*ids] == np.argsort(-logs[at])[:4].tolist()
        np.testing.assert_allclose(values, logs[at][[*ids]], atol=1e-4)
    assert all(e.experts is None and e.logprob is None for e in second.events)


def test_bias_and_constraint_shift_their_own_row_alone(tiny):
    plain, forced = Request([5, 6], 9, 1.0, stop_ids=()), {11: 1e6}
    growing = Request([7, 8], 60, 1.0, constraint=Steps(), stop_ids=())
    biased = Request([7, 8], 4, logit_bias=forced)
    empty = Steps()
    empty.last = 64
    nothing = replace(growing, constraint=empty)
    steady = Request([9], 40, logit_bias={12: 1.0}, stop_ids=())
    asked = [plain, growing, biased, steady, nothing, plain, plain, plain]
    results = serve(Engine(tiny, slots=4), asked)
    for i in (0, 5, 6, 7):
        assert results[i].tokens == alone(tiny, plain)
    grown = results[1].tokens
    assert grown == sorted(set(grown)) and grown[-1] >= 60
    assert results[1].finish_reason == "stop"
    assert results[2].tokens == [11] * 4
    assert results[4].finish_reason == "error" and "0 ids allowed" in results[4].error


def test_a_long_prompt_does_not_hold_up_the_others(tiny):
    engine = Engine(tiny, slots=3, prefill_chunk=16)
    writer = engine.submit(Request([5, 6], 40, stop_ids=()))
    engine.step()
    long, short = (engine.submit(Request([9] * n, 4, stop_ids=())) for n in (60, 3))
    written = len(writer.events)
    while not long.events:
        before = engine.stats.chunk_tokens
        engine.step()
        written += 1
        assert len(writer.events) == written and not short.events
        assert engine.stats.chunk_tokens - before <= 16
    finish(engine)
    assert written == 1 + 4 and short.times["first"] > long.times["first"]


class Letters:
    """A tokenizer whose ids are characters."""

    def stream(self):
        self.push, self.flush = chr, str
        return self


def test_text_ends_before_the_first_stop_string(any_types):
    rng = np.random.default_rng(7)
    for _ in range(300):
        text = "".join(rng.choice([*"ab"], 12))
        stops = ["".join(rng.choice([*"ab"], rng.integers(1, 6))) for _ in range(2)]
        row, said = RowText(Letters(), stops), ""
        for c in text:
            said += row.push(ord(c))
            if row.stopped:
                break
        said += row.flush()
        ends = [text.find(s) + len(s) for s in stops if s in text]
        shown = text[: min(ends, default=None)] if ends else text
        assert said == min((shown.split(s)[0] for s in stops), key=len)


def test_threads_submit_read_and_are_turned_away(tiny, monkeypatch):
    engine, stop = Engine(tiny, slots=2, max_waiting=3), threading.Event()
    requests = some_requests(12, seed=8)
    with pytest.raises(QueueFull, match="3 requests wait for 2 rows"):
        for request in requests:
            engine.submit(request)
    assert engine.stats.refused == 1 and engine.stats.waiting == 3
    thread = threading.Thread(target=engine.run, args=(stop,))
    thread.start()
    found = {}

    def client(i):
        while i not in found:
            try:
                found[i] = [e.token for e in engine.submit(requests[i])]
            except QueueFull:
                time.sleep(0.01)

    clients = [threading.Thread(target=client, args=(i,)) for i in range(12)]
    for c in clients:
        c.start()
    for c in clients:
        c.join(120)
    for i, request in enumerate(requests):
        assert [t for t in found[i] if t is not None] == alone(tiny, request)
    real = engine.choose
    monkeypatch.setattr(engine, "choose", lambda jobs: 1 / 0)
    result = engine.submit(requests[0]).result(60.0)
    assert result.finish_reason == "error" and "division by zero" in result.error
    monkeypatch.setattr(engine, "choose", real)
    assert engine.submit(requests[0]).result(60.0).tokens == alone(tiny, requests[0])
    last = engine.submit(Request([5], 60, stop_ids=()))
    stop.set()
    thread.join(60)
    assert last.result(0.0).finish_reason in ("cancelled", "length")
    with pytest.raises(QueueFull, match="has ended"):
        engine.submit(requests[0])


def test_what_does_not_fit_is_refused_or_cut(tiny):
    engine = Engine(tiny, slots=1, context=32)
    with pytest.raises(ValueError, match="need 33 slots, a row has 32"):
        engine.submit(Request([5] * 30, 4))
    prompt = list(range(3, 40))
    (result,) = serve(engine, [Request(prompt, 4, truncate=True)])
    assert result.tokens == alone(tiny, Request(prompt[-29:], 4))
    wrongs = {"context": 65}, {"slots": 0}, {"max_waiting": 0}, {"prefill_chunk": 8}
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Engine(tiny, **wrong)
