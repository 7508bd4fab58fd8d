"""Images: the encoder, its places in a prompt, pictures as tiles.

`fixtures/llama4_vision.npz` is a small random
Llama4ForConditionalGeneration with what transformers 5.23.0 computed
from it; `fixtures/image_tiles.npz` what its image processor made of
three pictures at a tile size of 16.
"""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import annotated_moe as am
from annotated_moe import checkpoints as ck
from annotated_moe import convert, sharding, vision, vocabularies
from annotated_moe.model import Model
from annotated_moe.vision import VisionConfig

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = VisionConfig(
    image_size=16, patch_size=4, width=16, layers=2, heads=2, d_ff=64,
    features=24, d_model=32, image_id=60,
)
FEATURES = 1e-5         # most that a feature may differ from the recorded


@pytest.fixture(scope="module")
def gold():
    return dict(np.load(FIXTURES / "llama4_vision.npz"))


def write_folder(folder, gold, change=lambda raw, w: None):
    raw = json.loads(str(gold["config"]))
    weights = {k[2:]: v for k, v in gold.items() if k[:2] == "w:"}
    change(raw, weights)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(gold, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("llama4"), gold)


@pytest.fixture(scope="module")
def model(folder):
    return am.load(folder, dtype="float32")


def pictures(gold):
    return [gold["pixel_values"][:1], gold["pixel_values"][1:]]


def test_the_model_reads_its_images(gold, model):
    assert model.config.vision == SMALL
    ids = gold["input_ids"]
    y = model.logits(ids, images=pictures(gold))
    np.testing.assert_allclose(y, gold["logits"], atol=1e-4)
    greedy = model.generate_ids(ids.tolist(), 5, images=pictures(gold))
    assert greedy == gold["greedy"].tolist()


def test_a_picture_belongs_to_its_row(gold, model):
    """Rows with and without an image, and rows of unequal length."""
    ids, (one, two) = gold["input_ids"], pictures(gold)
    tokens = np.stack([np.where(ids[0] == 60, 3, ids[0]), ids[1]])
    tokens[0, 9:] = 0
    y = model.logits(tokens, [9, 14], images=[None, two])
    np.testing.assert_allclose(y[1], gold["logits"][1], atol=1e-4)
    mask = np.ones((2, 14), bool)
    mask[0, :3] = False                         # padding on the left
    rows = np.stack([np.roll(ids[0], 3), ids[1]])
    y = model.logits(rows, mask=mask, images=[one, two])
    np.testing.assert_allclose(y[0, 3:], gold["logits"][0, :11], atol=1e-4)


def test_on_a_mesh(gold, folder):
    mesh = am.make_mesh(2, 2)
    sharded = am.load(folder, mesh, "float32")
    y = sharded.logits(gold["input_ids"], images=pictures(gold))
    np.testing.assert_allclose(y, gold["logits"], atol=1e-4)
    w = sharded.params["vision/layer/query"]["w"]
    assert w.sharding.is_fully_replicated


def test_streamed(gold, folder, monkeypatch):
    """Also when the prompt is read in parts that cut an image."""
    monkeypatch.setattr("annotated_moe.streaming.MOST_TOKENS", 10)
    streamed = am.load(folder, dtype="float32", stream=True)
    ids = gold["input_ids"].tolist()
    greedy = streamed.generate_ids(ids, 1, images=pictures(gold))
    assert greedy == gold["greedy"][:, :1].tolist()


def test_there_and_back(gold, folder, model):
    """Ours, and Hugging Face's again: every name and every bit."""
    c = model.config
    tensors = ck.read_hf(folder, c)
    name = "Llama4ForConditionalGeneration"
    assert convert.architecture(c) == name
    back = dict(convert.their_tensors(ck.FAMILIES[name], tensors, c))
    assert set(back) == {k[2:] for k in gold if k[:2] == "w:"}
    for key, w in back.items():
        assert np.asarray(w[:]).tobytes() == gold[f"w:{key}"].tobytes(), key
    assert ck.make_config(folder, json.loads(json.dumps(asdict(c)))) == c


def test_sixteen_bits(gold, model):
    eyes = {k: w for k, w in model.params.items() if k[:6] == "vision"}
    exact = vision.image_features(eyes, gold["pixel_values"], SMALL)
    np.testing.assert_allclose(
        exact, gold["projected"], rtol=0, atol=FEATURES)
    coarse = vision.image_features(
        eyes, gold["pixel_values"], SMALL, "bfloat16")
    assert 0 < np.std(coarse - exact) < 0.02 * np.std(exact)


def test_each_part_is_needed(gold, model, monkeypatch):
    """Without it they are wrong by 40 times what is let pass."""
    eyes = {k: w for k, w in model.params.items() if k[:6] == "vision"}
    tiles = jnp.asarray(gold["pixel_values"])
    run = vision.image_features.__wrapped__
    parts = {
        "angles_2d": lambda c: jnp.zeros((17, 4)),
        "gelu": lambda x: jax.nn.gelu(x, approximate=True),
        "pixel_shuffle": lambda x, side: x.reshape(len(x), 4, -1),
    }
    for name, other in parts.items():
        with monkeypatch.context() as m:
            m.setattr(vision, name, other)
            y = jax.jit(partial(run, c=SMALL))(eyes, tiles)
        wrong = abs(y - gold["projected"]).max()
        assert wrong > 40 * FEATURES, (name, wrong)


def test_a_prompt_in_words_with_a_picture(gold, model):
    """What `image_text` writes is ids if special strings are taken."""
    marks = ("<|image_start|>", "<|image|>", "<|image_end|>", "<|patch|>")
    specials = {mark: 57 + i for i, mark in enumerate(marks)}
    pieces = [bytes([97 + i]) for i in range(57)] + [m.encode() for m in marks]

    def plain(text):
        return [ord(letter) - 97 for letter in text]

    table = vocabularies.ByteTable(pieces, specials, {}, plain)
    text = vision.image_text(1, 1, SMALL) + "abcdefg"
    ids = vocabularies.encode_special(table, text)
    assert ids == [57, 58, 60, 60, 60, 60, 59, *range(7)]
    new = model.generate_ids([ids, ids], 5, images=pictures(gold))
    assert [len(row) for row in new] == [5, 5] and new[0] != new[1]
    with pytest.raises(ValueError, match="image token 60 4 times"):
        model.generate_ids([ids], 1)


@pytest.mark.parametrize("images, said", [
    (None, "prompt 0 holds the image token 60 4 times"),
    ([None], "1 images for 2 prompts"),
    (["one", None], "prompt 1 holds"),
    (["both", "two"], "its 2 tiles make 8 rows"),
    (["whole", "two"], "the image of prompt 0 is int64"),
    (["one", "cut"], "the image of prompt 1 is float32 of shape"),
    (["nan", "two"], "not all finite"),
])
def test_images_that_do_not_fit(gold, images, said):
    px = gold["pixel_values"]
    known = {
        "one": px[:1], "two": px[1:], "both": px, "nan": px[:1] * np.nan,
        "whole": px[:1].astype(int), "cut": px[1:, :, :8],
    }
    images = images and [i and known[i] for i in images]
    with pytest.raises(ValueError, match=said):
        vision.check_images(gold["input_ids"], images, SMALL)


def test_a_model_without_eyes():
    with pytest.raises(ValueError, match="is blind"):
        am.load(dtype="float32").logits([[5]], images=[None])


@pytest.mark.parametrize("change, said", [
    ({"patch_size": 5}, "patch_size = 5 must divide image_size = 16"),
    ({"shuffle": 3}, "shuffle = 3 must divide"),
    ({"heads": 3}, "must divide width"),
    ({"layers": 0}, "layers must be a positive int"),
    ({"rope_base": float("nan")}, "rope_base must be a positive number"),
])
def test_sizes_of_no_encoder(change, said):
    with pytest.raises(ValueError, match=said):
        replace(SMALL, **change)


@pytest.mark.parametrize("field, value, said", [
    ("hidden_act", "relu", "hidden_act is 'relu'"),
    ("projector_output_dim", 25, "projector_output_dim must be 24"),
    ("intermediate_size", 60, "intermediate_size must be 64"),
    ("pixel_shuffle_ratio", 0.3, "pixel_shuffle_ratio must be 1/n"),
    ("new_field", 1, "'new_field', unknown"),
    ("width", None, "'width', unknown"),
])
def test_a_configuration_that_is_refused(tmp_path, gold, field, value, said):
    def change(raw, w):
        raw["vision_config"][field] = value

    with pytest.raises(am.CheckpointError, match=said):
        am.load(write_folder(tmp_path, gold, change))


@pytest.mark.parametrize("damage, said", [
    (lambda w: w.pop("vision_model.class_embedding"),
     "lacks vision_model.class_embedding"),
    (lambda w: w.update({"vision_model.more": np.zeros(1, np.float32)}),
     "holds 'vision_model.more'"),
    (lambda w: w.update({"vision_model.layernorm_pre.bias":
                         np.zeros(3, np.float32)}),
     "layernorm_pre.bias as vision/norm_before/offset has shape"),
])
def test_weights_that_are_missing_or_too_many(tmp_path, gold, damage, said):
    bad = write_folder(tmp_path, gold, lambda raw, w: damage(w))
    with pytest.raises(am.CheckpointError, match=said):
        am.load(bad)


def test_metas_names_are_the_same_parameters():
    paths = sorted(vision.vision_shapes(SMALL))
    for table in (vision.VISION_HF, vision.VISION_META):
        assert sorted(row[1] for row in table) == paths
        assert len({row[0] for row in table}) == len(table)
    assert all(row[2] in ck.CHANGES for row in vision.VISION_META)


def test_every_parameter_has_a_rule():
    for path in vision.vision_shapes(SMALL):
        assert sharding.spec_for(path) == sharding.P()
        assert not ck.may_be_quantized(path)


def test_tiles_are_those_of_the_reference():
    """Up to a level of 255 in resizing, and bfloat16 in scaling."""
    recorded = np.load(FIXTURES / "image_tiles.npz")
    c = replace(SMALL, image_size=16)
    grids = [(2, 3), (1, 1), (4, 3)]
    for i, (h, w) in enumerate([(20, 39), (9, 11), (50, 33)]):
        y, x = np.mgrid[0:h, 0:w]
        channels = (7 * x + 3 * y) % 256, x * y % 256, 255 - 5 * y + x
        pixels = np.stack(channels, -1).astype(np.uint8)
        tiles = vision.image_tiles(pixels, c)
        wanted = recorded[f"tiles{i}"].astype(np.float32)
        assert vision.canvas(h, w, c) == grids[i]
        assert tiles.shape == wanted.shape
        np.testing.assert_allclose(tiles, wanted, atol=2 / 255 + 2**-8)
        text = vision.image_text(*grids[i], c)
        assert text.count("<|patch|>") == len(tiles) * c.rows


def test_a_picture_that_is_none():
    for bad in (np.zeros((4, 4)), np.zeros((4, 4, 3)),
                np.zeros((4, 4, 4), np.uint8),
                np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="an image"):
            vision.image_tiles(bad, SMALL)


def test_init_params_has_the_encoder(model):
    mine = {p for p in ck.expected(model.config) if p[:6] == "vision"}
    assert mine == set(vision.vision_shapes(SMALL))
    assert isinstance(model, Model)
