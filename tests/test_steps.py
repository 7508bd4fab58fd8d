"""The loop that wastes nothing: the plain loop's tokens, in few programs."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import steps
from annotated_moe.families.grok import grok_config
from annotated_moe.families.mixtral import mixtral_config
from annotated_moe.generate import Model, Session, collect, pad_rows, token_steps
from annotated_moe.model import init_cache, init_params, prefill
from annotated_moe.sampling import settings_per_row

CONFIG = grok_config(
    vocab_size=32, context=512, d_model=32, d_ff=48, num_layers=2, q_heads=4,
    kv_heads=2, head_size=8, num_experts=4, embedding_multiplier=5.7,
    attn_multiplier=0.35, dtype="float32",
)  # fmt: skip
DENSE = grok_config(
    vocab_size=32, context=8192, d_model=32, d_ff=48, num_layers=4, q_heads=4,
    kv_heads=2, head_size=8, num_experts=1, embedding_multiplier=5.7,
    attn_multiplier=0.35, dtype="float32",
)  # fmt: skip
RING = replace(
    mixtral_config(2, 4, 2, 48, 8, d_model=32, vocab_size=32, context=512,
                   num_experts=1, window=8),
    dtype="float32",
)  # fmt: skip
# Longer than the ring, shorter, and one that repeats itself.
ROWS = [[*range(1, 20)], [5, 6, 7], [8, 9] * 3]
MIXED = settings_per_row(3, [0.0, 0.9, 0.9], 0.95, None, 3)


@cache
def model(config=CONFIG):
    return Model(config, init_params(jax.random.key(1), config))


@cache
def plain(config=CONFIG, new=30):
    return collect(token_steps(model(config), ROWS, MIXED, new), 3, ())


def loop(net, rows=ROWS, settings=MIXED, new=30, **how):
    return steps.fused_steps(net, rows, settings, new, **how)


@pytest.mark.parametrize("config", [CONFIG, RING], ids=["full", "ring"])
@pytest.mark.parametrize("speculate", [0, 3])
def test_the_tokens_are_those_of_the_plain_loop(config, speculate):
    """With rows that stop at different steps, one in the middle of a start."""
    want = plain(config)
    for streams in (True, False):
        how = {"streams": streams, "speculate": speculate}
        assert collect(loop(model(config), **how), 3, ()) == want
        stop = {max(want[1][:11], key=want[1].index), -1, 10**12}
        ended = collect(token_steps(model(config), ROWS, MIXED, 30), 3, stop)
        assert min(map(len, ended)) < len(ended[0])
        assert collect(loop(model(config), stop=stop, **how), 3, stop) == ended


def right_guesses(texts, text, length, count):
    at = length[:, None] + jnp.arange(count)
    return jnp.take_along_axis(texts, at, axis=1), length > 0


def wrong_guesses(texts, text, length, count):
    guess, found = right_guesses(texts, text, length, count)
    return (guess + 1) % 32, found


def half_right(texts, text, length, count):
    """The first two, of rows at an even position."""
    guess, found = right_guesses(texts, text, length, count)
    return guess.at[:, 2:].set(0), found & (length % 2 == 0)


@pytest.mark.parametrize(
    "guess, config",
    [(right_guesses, CONFIG), (wrong_guesses, RING), (half_right, RING),
     *(pytest.param(*pair, marks=pytest.mark.full) for pair in [
         (right_guesses, RING), (wrong_guesses, CONFIG), (half_right, CONFIG)])],
)  # fmt: skip
def test_any_guess_leaves_the_same_text(guess, config):
    """And right ones save steps: 29 tokens are 8 steps of 1 + 3 guesses."""
    net, want = model(config), plain(config)
    lengths = np.array([*map(len, ROWS)], np.int32)
    texts = pad_rows([row + new for row, new in zip(ROWS, want)], 60)
    stop = steps.stop_array((), 32)
    state = steps.begin(net, ROWS, MIXED, 30, None, stop)
    state = steps.begin_guessing(state, pad_rows(ROWS, 257), lengths)
    state, (text, made, going) = steps.run_guesses(
        net.params, state, MIXED, stop, np.int32(30), np.int32(99), config, True,
        3, partial(guess, texts),
    )  # fmt: skip
    found = [row[n : n + 30] for row, n in zip(text.tolist(), lengths)]
    assert found == want and made.tolist() == [30] * 3 and not going.any()
    assert state.cache.length.tolist() == (lengths + 29).tolist()
    if guess is right_guesses:
        assert state.steps.tolist() == [8] * 3 and (state.right == 21).all()
    if guess is wrong_guesses:
        assert state.steps.tolist() == [29] * 3 and not state.right.any()
    if guess is half_right:
        assert 8 < state.steps.max() < 29 and (state.right < state.guessed).all()


def test_few_programs():
    """Of prompts of 1 to 40 tokens and answers of 1 to 400."""
    net = model(replace(DENSE, context=512))
    programs = [prefill, steps.run_steps, steps.with_slots, steps.first_tokens]
    for program in programs:
        program.clear_cache()
    one = settings_per_row(1, 0.0, 1.0, None, 0)
    for n in (1, 7, 16, 17, 30, 40):
        for new in (1, 2, 100, 200, 300, 400):
            for _ in zip(range(2), loop(net, [[3] * n], one, new)):
                pass
    found = [program._cache_size() for program in programs]
    assert found == [3, 2, 6, 1]    # widths 16, 32, 64; slots 256, 512


def test_a_start_ahead_takes_no_step_once_all_have_stopped():
    """What is read is a stop id; the start that was ahead did nothing."""
    net, own = model(), settings_per_row(1, 0.9, 0.95, None, 4)
    row = plain()[1][:8]
    last = max(row, key=row.index)
    taken = row.index(last)
    assert 0 < taken < 7
    stop = steps.stop_array({last}, 32)
    state = steps.begin(net, ROWS[1:2], own, 30, None, stop)
    run = partial(steps.run_steps, net.params, settings=own, stop=stop,
                  config=net.config, sampled=True)
    state, made = run(state=state, until=np.int32(9))
    rest = [steps.NOT_MADE] * (8 - taken)
    assert made[:, 0].tolist() == row[1 : taken + 1] + rest
    state, made = run(state=state, until=np.int32(17))
    assert (made == steps.NOT_MADE).all() and int(state.step) == taken + 1
    assert state.cache.length.tolist() == [len(ROWS[1]) + taken]


@pytest.mark.parametrize("speculate", [0, 3])
def test_logits_that_break_later_are_an_error_at_their_step(speculate):
    """A token whose embedding is NaN, met in the middle of a start."""
    row = plain()[1]
    bad = max(row[:13], key=row.index)
    step = row.index(bad) + 1
    assert step % steps.RUN > 1 and bad not in ROWS[1]
    table = model().params["in_out_embed"]["embeddings"]
    params = {**model().params, "lm_head": {"embeddings": table},
              "in_out_embed": {"embeddings": table.at[bad].set(jnp.nan)}}
    broken = Model(replace(CONFIG, tied=False), params)
    own = settings_per_row(1, 0.9, 0.95, None, 4)
    tokens = loop(broken, ROWS[1:2], own, speculate=speculate, streams=False)
    assert [next(tokens) for _ in range(step)] == [[t] for t in row[:step]]
    with pytest.raises(ValueError, match=f"prompt 0: .* at new token {step}"):
        next(tokens)


def test_on_a_mesh_one_program_and_the_same_tokens():
    """Two rows a device: more than one program would show in the layouts."""
    mesh = am.make_mesh(data=2, model=2)
    rows, settings = [*ROWS, [3]], settings_per_row(4, 0.9, 0.95, None, 3)
    wide = Model(CONFIG, model().params, mesh=mesh)
    want = collect(token_steps(model(), rows, settings, 20), 4, ())
    for speculate, program in (0, steps.run_steps), (3, steps.run_guesses):
        program.clear_cache()
        found = loop(wide, rows, settings, 20, speculate=speculate)
        assert collect(found, 4, ()) == want
        assert program._cache_size() == 1


def test_the_cache_is_never_copied():
    """Scores aside, a step with guesses needs less memory than its cache."""
    config, params = DENSE, model(DENSE).params
    one, z = settings_per_row(1, 0.0, 1.0, None, 0), jnp.zeros(1, jnp.int32)
    cache = jax.eval_shape(lambda: init_cache(config, 1, 8192))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    text = jax.ShapeDtypeStruct((1, 8193), jnp.int32)
    guessing = steps.Guessing(cache, text, z == 0, z, z, z, z)
    writing = steps.Writing(cache, z, z == 0, z[0])
    common, most = (one, steps.stop_array((), 32), np.int32(9)), np.int32(9)
    for job in (
        steps.run_steps.lower(params, writing, *common, config, False),
        steps.run_guesses.lower(
            params, guessing, *common, most, config, False, 4),
    ):  # fmt: skip
        memory = job.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= size > memory.temp_size_in_bytes


def test_who_keeps_the_plain_loop_and_who_is_refused():
    class Counting(Model):
        def decode_step(self, tokens, cache, active=None):
            counted.append(1)
            return super().decode_step(tokens, cache, active)

    counted = []
    own = Counting(CONFIG, model().params)
    assert own.generate_ids(ROWS[:1], 5) == [plain()[0][:5]] and len(counted) == 4
    with pytest.raises(ValueError, match="leave out speculate"):
        own.generate_ids(ROWS[:1], 5, speculate=2)
    with pytest.raises(ValueError, match="speculate is 8, and a layer keeps 8 tokens"):
        model(RING).generate_ids(ROWS, 5, speculate=8)
    assert model().generate_ids([[1], [2]], 0, speculate=3) == [[], []]
    assert len(model().generate_ids([[1]], 1, speculate=3)[0]) == 1


@pytest.mark.parametrize("kv_cache", ["int8", "paged"])
def test_a_cache_of_another_kind_is_the_one_that_is_used(kv_cache, monkeypatch):
    """Steps of the host: it counts pages before each."""
    net, kinds = replace(model(), kv_cache=kv_cache), set()
    step = Session.step

    def listen(session, tokens, active=None):
        kinds.add(jax.tree.structure(session.cache))
        return step(session, tokens, active)

    monkeypatch.setattr(Session, "step", listen)
    plainly, made = model().generate_ids(ROWS, 8), net.generate_ids(ROWS, 8)
    of_kind = jax.tree.structure(Session(net, len(ROWS), 32).cache)
    assert kinds == {of_kind} != {jax.tree.structure(Session(model(), 3, 32).cache)}
    if kv_cache == "paged":
        assert made == plainly
    with pytest.raises(ValueError, match="leave out speculate"):
        net.generate_ids(ROWS, 8, speculate=2)


def test_the_copy_into_more_slots_keeps_what_steps_see():
    net = model()
    session = Session(net, 3, 32)
    session.prefill(ROWS)
    wide = steps.with_slots(session.cache, CONFIG, 256)
    assert wide.length.tolist() == [19, 3, 6]
    for old, new in zip(session.cache.places, wide.places):
        assert new.slots == 256
        np.testing.assert_array_equal(new.k[:, :, :32], old.k)
        np.testing.assert_array_equal(new.v[:, :, :32], old.v)
