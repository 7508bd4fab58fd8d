"""Images: the encoder, its places in a prompt, pictures as tiles.

`fixtures/llama4_vision.npz` is a small random
Llama4ForConditionalGeneration with what transformers 5.23.0 computed
from it; `fixtures/image_tiles.npz` what its image processor made of
three pictures at a tile size of 16.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import annotated_moe as am
from annotated_moe import cli, convert, parallel
from annotated_moe.families import images, vision
from annotated_moe.families.vision import SeeingModel, VisionSpec
from annotated_moe.formats.hub import TRANSFORMS, hub_config
from annotated_moe.generate import Model
from annotated_moe.model import init_params, param_specs
from annotated_moe.specs import from_json, to_json

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = VisionSpec(
    image_size=16, patch_size=4, width=16, layers=2, heads=2, d_ff=64,
    adapter_width=24, d_model=32, image_id=60, start_id=61, end_id=62,
)
TILES = images.ImageSettings(image_size=16)
FEATURES = 1e-5         # most that a feature may differ from the recorded


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """Programs that run once are not worth optimizing."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


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
    tiles = vision.check_images(tokens, [None, two], SMALL)
    np.testing.assert_array_equal(tiles, two)
    index = vision.embedding_index(tokens, 60)
    assert (index[0] == -1).all() and list(index[1, 5:9]) == [0, 1, 2, 3]
    y = np.asarray(model.logits(tokens, images=[None, two]))
    np.testing.assert_allclose(y[1], gold["logits"][1], atol=1e-4)
    tokens = ids.copy()
    tokens[0, 9:] = 0
    y = np.asarray(model.logits(tokens, [9, 14], images=[one, two]))
    np.testing.assert_allclose(y[0, :9], gold["logits"][0, :9], atol=1e-4)
    np.testing.assert_allclose(y[1], gold["logits"][1], atol=1e-4)
    mask = np.ones((2, 14), bool)
    mask[0, :3] = False                         # padding on the left
    rows = np.stack([np.roll(ids[0], 3), ids[1]])
    y = model.logits(rows, mask=mask, images=[one, two])
    np.testing.assert_allclose(y[0, 3:], gold["logits"][0, :11], atol=1e-4)


def test_on_a_mesh(gold, folder):
    mesh = am.make_mesh(data=2, expert=2, model=2)
    sharded = am.load(folder, mesh, "float32")
    y = sharded.logits(gold["input_ids"], images=pictures(gold))
    np.testing.assert_allclose(y, gold["logits"], atol=1e-4)
    w = sharded.params["vision/layer/query"]["w"]
    assert w.sharding.is_fully_replicated


@pytest.mark.full
def test_streamed(gold, folder, model, monkeypatch):
    """Also when the prompt is read in parts that cut an image."""
    monkeypatch.setattr("annotated_moe.streaming.MOST_TOKENS", 10)
    streamed = am.load(folder, dtype="float32", stream=True)
    eyes = ("vision/layer/query", "w")
    ids, shown = gold["input_ids"], pictures(gold)
    assert isinstance(streamed, SeeingModel)
    y = streamed.logits(np.where(ids == 60, 3, ids))
    np.testing.assert_allclose(y, model.logits(np.where(ids == 60, 3, ids)), atol=1e-4)
    assert not streamed.store.counts.weights[eyes]      # nothing was shown
    y = streamed.logits(ids, images=shown)
    np.testing.assert_allclose(y, gold["logits"], atol=1e-4)
    greedy = streamed.generate_ids(ids.tolist(), 2, images=shown)
    assert greedy == gold["greedy"][:, :2].tolist()
    assert streamed.store.counts.weights[eyes] == 1     # read once, and kept


def test_there_and_back(gold, folder, tmp_path):
    """Ours, and Hugging Face's again: every name and every bit."""
    convert.convert(folder, tmp_path / "ours", "native")
    again = am.load(tmp_path / "ours", dtype="float32")
    assert isinstance(again, SeeingModel)
    y = again.logits(gold["input_ids"], images=pictures(gold))
    np.testing.assert_allclose(y, gold["logits"], atol=1e-4)
    convert.convert(tmp_path / "ours", tmp_path / "theirs", "hf")
    back = load_file(tmp_path / "theirs" / "model.safetensors")
    assert set(back) == {k[2:] for k in gold if k[:2] == "w:"}
    for key, w in back.items():
        assert w.tobytes() == gold[f"w:{key}"].tobytes(), key
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    name = "Llama4ForConditionalGeneration"
    assert raw["architectures"] == [name] and raw["model_type"] == "llama4"
    assert hub_config(tmp_path / "theirs") == hub_config(folder)


def test_ours_and_back(gold, model, tmp_path):
    raw = json.loads(json.dumps(to_json(model.config)))
    assert from_json(raw) == model.config
    am.save(model, tmp_path / "ours")
    again = am.load(tmp_path / "ours", dtype="float32")
    assert isinstance(again, SeeingModel)
    y = again.logits(gold["input_ids"], images=pictures(gold))
    np.testing.assert_allclose(y, gold["logits"], atol=1e-4)


def test_sixteen_bits(gold, model):
    eyes = {k: w for k, w in model.params.items() if k[:6] == "vision"}
    exact = vision.image_embeddings(eyes, gold["pixel_values"], SMALL)
    np.testing.assert_allclose(
        exact, gold["projected"], rtol=0, atol=FEATURES)
    coarse, exact = np.asarray(vision.image_embeddings(
        eyes, gold["pixel_values"], SMALL, "bfloat16")), np.asarray(exact)
    assert 0 < np.std(coarse - exact) < 0.02 * np.std(exact)


def test_each_part_is_needed(gold, model, monkeypatch):
    """Without it they are wrong by 40 times what is let pass."""
    eyes = {k: w for k, w in model.params.items() if k[:6] == "vision"}
    tiles = jnp.asarray(gold["pixel_values"])
    run = vision.image_embeddings.__wrapped__
    parts = {
        "angles_2d": lambda spec: jnp.zeros((17, 4)),
        "gelu": lambda x: jax.nn.gelu(x, approximate=True),
        "pixel_shuffle": lambda x, side: x.reshape(len(x), 4, -1),
    }
    for name, other in parts.items():
        with monkeypatch.context() as m:
            m.setattr(vision, name, other)
            y = jax.jit(lambda eyes, tiles: run(eyes, tiles, SMALL))(
                eyes, tiles)
        wrong = np.abs(np.asarray(y) - gold["projected"]).max()
        assert wrong > 40 * FEATURES, (name, wrong)


@pytest.mark.parametrize("shown, said", [
    (None, "prompt 0 holds the image token 60 4 times"),
    ([None], "1 images for 2 prompts"),
    (["one", None], "prompt 1 holds"),
    (["both", "two"], "its 2 tiles make 8 embeddings"),
    (["whole", "two"], "the image of prompt 0 is int64"),
    (["one", "cut"], "the image of prompt 1 is float32 of shape"),
    (["nan", "two"], "not all finite"),
])
def test_images_that_do_not_fit(gold, shown, said):
    px = gold["pixel_values"]
    known = {
        "one": px[:1], "two": px[1:], "both": px, "nan": px[:1] * np.nan,
        "whole": px[:1].astype(int), "cut": px[1:, :, :8],
    }
    shown = shown and [i and known[i] for i in shown]
    with pytest.raises(ValueError, match=said):
        vision.check_images(gold["input_ids"], shown, SMALL)


def test_a_model_that_reads_only_text(words):
    small = am.load(dtype="float32")
    with pytest.raises(ValueError, match="leave out images"):
        small.logits([[5]], images=[np.zeros((1, 3, 16, 16), np.float32)])
    with pytest.raises(ValueError, match="leave out images"):
        small.generate(["a"], images=[picture(4, 4)])


@pytest.mark.parametrize("change, said", [
    ({"patch_size": 5}, "patch_size = 5 must divide image_size = 16"),
    ({"shuffle": 3}, "shuffle = 3 must divide"),
    ({"heads": 3}, "must divide width"),
    ({"layers": 0}, "layers must be an int of 1 or more"),
    ({"rope_base": float("nan")}, "rope_base must be a number above 0"),
])
def test_sizes_of_no_encoder(change, said):
    with pytest.raises(ValueError, match=said):
        replace(SMALL, **change)


@pytest.mark.parametrize("field, value, said", [
    ("hidden_act", "relu", "hidden_act is 'relu'"),
    ("projector_output_dim", 25, "projector_output_dim is 25; only 24"),
    ("intermediate_size", 60, "intermediate_size is 60; only 64"),
    ("pixel_shuffle_ratio", 0.3, "pixel_shuffle_ratio must be 1/n"),
    ("attention_sinks", 1, "'attention_sinks' is not supported"),
    ("hidden_size", None, "lacks the field 'hidden_size'"),
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
     "vision/norm_before/offset has shape"),
])
def test_weights_that_are_missing_or_too_many(tmp_path, gold, damage, said):
    bad = write_folder(tmp_path, gold, lambda raw, w: damage(w))
    with pytest.raises(am.CheckpointError, match=said):
        am.load(bad)


def vision_specs(model):
    return {f"{module}/{name}": spec
            for module, leaves in param_specs(model.config).items()
            for name, spec in leaves.items() if module[:7] == "vision/"}


def test_metas_names_are_the_same_parameters(model):
    paths = sorted(vision_specs(model))
    for table in (vision.VISION_HF, vision.VISION_META):
        assert sorted(row[1] for row in table) == paths
        assert len({row[0] for row in table}) == len(table)
    assert all(row[2] in TRANSFORMS for row in vision.VISION_META)


def test_every_device_keeps_the_encoder(model):
    """And none of it in eight bits, or on disk."""
    for path, spec in vision_specs(model).items():
        assert not any(parallel.partition_spec(spec.axes)), path
        assert not spec.matrix


def test_tiles_are_those_of_the_reference():
    """Each bit of them."""
    recorded = np.load(FIXTURES / "image_tiles.npz")
    grids = [(2, 3), (1, 1), (4, 3)]
    for i, (h, w) in enumerate([(20, 39), (9, 11), (50, 33)]):
        y, x = np.mgrid[0:h, 0:w]
        channels = (7 * x + 3 * y) % 256, x * y % 256, 255 - 5 * y + x
        pixels = np.stack(channels, -1).astype(np.uint8)
        tiles = images.image_tiles(pixels, TILES)
        wanted = recorded[f"tiles{i}"].astype(np.float32)
        assert images.best_grid(h, w, 16) == grids[i]
        assert tiles.shape == wanted.shape
        np.testing.assert_array_equal(tiles, wanted)
        marks = images.image_marks(grids[i], SMALL.embeddings)
        assert marks.count("<|patch|>") == len(tiles) * SMALL.embeddings


def test_a_picture_that_is_none():
    for bad in (np.zeros((4, 4)), np.zeros((4, 4, 3)),
                np.zeros((4, 4, 4), np.uint8),
                np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="an image"):
            images.image_tiles(bad, TILES)


def test_init_params_has_the_encoder(model):
    init = jax.jit(init_params, static_argnames="config")
    params = init(jax.random.key(0), model.config)
    for path, spec in vision_specs(model).items():
        module, name = path.rsplit("/", 1)
        assert params[module][name].shape == spec.shape
    w = np.asarray(params["vision/layer/down"]["w"])        # [L, F, W]
    np.testing.assert_allclose((w**2).sum(1), 1, atol=0.6)
    assert isinstance(model, SeeingModel)


@pytest.mark.parametrize("change, said", [
    ({"d_model": 36}, "vision.d_model=36, but d_model=32"),
    ({"image_id": 64}, "vision.image_id=64 is beyond vocab_size=64"),
])
def test_an_encoder_of_another_model(model, change, said):
    with pytest.raises(ValueError, match=said):
        replace(model.config, vision=replace(SMALL, **change))


# Words and pictures


IDS = {"<|image_start|>": 61, "<|image|>": 59, "<|image_end|>": 62,
       "<|patch|>": 60, "<|tile_x_separator|>": 58, "<|tile_y_separator|>": 63}
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{% if part.type == 'image' %}"
    "<|image|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}"
)


def tokenizer_json(specials=IDS):
    """One token a letter, and the marks: 64 in all."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ|<>_. "[:58]
    vocab = {"Ġ" if x == " " else x: i for i, x in enumerate(letters)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": mark, "special": True, **flags}
             for mark, i in sorted(specials.items(), key=lambda pair: pair[1])]
    level = {"type": "ByteLevel", "add_prefix_space": False,
             "trim_offsets": True, "use_regex": True}
    return json.dumps({
        "version": "1.0", "added_tokens": added, "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer, and beside it how images are prepared."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("words")
    settings = vision.preprocessor_config(SMALL)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "preprocessor_config.json").write_bytes(settings)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return am.Tokenizer(folder / "tokenizer.json")


def picture(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([7 * x + y, 9 * y, x * y], -1).astype(np.uint8)


ONE = [61, 59, *[60] * 4, 62]                   # a picture of one tile


@pytest.fixture(scope="module")
def talker(model, words):
    return replace(model, tokenizer=words)


def test_a_prompt_in_words_with_a_picture(talker):
    """The same as ids and tiles that were made by hand."""
    small, wide = picture(16, 16), picture(9, 12)
    prompts = ["abcdef<|image|>g", "<|image|>"]
    new = talker.generate(prompts, images=[small, [wide]], max_new_tokens=5)
    rows = [[*range(6), *ONE, 6], ONE]
    tiles = [images.image_tiles(p, TILES) for p in (small, wide)]
    ids = talker.generate_ids(rows, 5, images=tiles, stop_ids=(2,))
    assert new == [talker.tokenizer.decode(row) for row in ids]
    swapped = talker.generate_ids(rows, 5, images=tiles[::-1], stop_ids=(2,))
    assert new != [talker.tokenizer.decode(row) for row in swapped]


def test_several_tiles_and_several_pictures(words, talker):
    wide, tall = picture(16, 32), picture(30, 7)
    ids, tiles = talker.read_prompt("<|image|>a<|image|>", [wide, tall])
    tile = [60] * 4
    assert ids == [61, *tile, 58, *tile, 63, 59, *tile, 62, 0,
                   61, *tile, 63, *tile, 63, 59, *tile, 62]
    want = [images.image_tiles(p, TILES) for p in (wide, tall)]
    np.testing.assert_array_equal(tiles, np.concatenate(want))
    # The first two tiles are halves of the picture, the third all of it.
    levels = tiles[:2] * 0.5 + 0.5
    halves = np.stack([wide[:, :16], wide[:, 16:]]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(levels, halves / 255, atol=2**-8)
    tiles = vision.check_images([ids], [tiles], SMALL)
    assert len(tiles) == 6


def test_a_stream_has_its_picture(talker, monkeypatch):
    def stream_ids(model, prompt, max_new_tokens, images, **options):
        assert prompt == [0, *ONE] and max_new_tokens == 3
        assert images.shape == (1, 3, 16, 16)
        return iter([1, 2])

    monkeypatch.setattr(Model, "stream_ids", stream_ids)
    text = talker.stream("a<|image|>", 3, images=picture(4, 4))
    assert "".join(text) == "bc"


def test_words_without_a_picture(talker):
    assert talker.read_prompt("<|patch|>") == (
        talker.tokenizer.encode("<|patch|>"), None)
    assert talker.read_prompt([5, 6], images=[]) == ([5, 6], None)
    assert 60 not in talker.tokenizer.encode("<|patch|>")


def test_a_prompt_begins_as_the_tokenizer_says(talker, monkeypatch):
    """Also one that begins with a picture."""
    monkeypatch.setattr(talker.tokenizer.backend, "prompt", ([5], []))
    for text, ids in (("a<|image|>", [5, 0, *ONE]), ("<|image|>", [5, *ONE])):
        assert talker.read_prompt(text, picture(4, 4))[0] == ids
    assert talker.read_prompt([59, 1], picture(4, 4))[0] == [*ONE, 1]


@pytest.mark.parametrize("prompts, shown, said", [
    (["a<|image|>"], None, "prompt 0: 1 times <.image.> in the prompt, for 0 images"),
    (["a"], [picture(4, 4)], "0 times <.image.> in the prompt, for 1 images"),
    (["<|image|>"], [[picture(4, 4)] * 2], "1 times .* for 2 images"),
    (["a", "<|image|>"], [None] * 2, "prompt 1: 1 times"),
    (["<|image|>"], [None, None], "2 images for 1 prompts"),
    ([b"<|image|>"], None, "a prompt is a str or ids"),
    (["<|image|>"], picture(4, 4), "images must be a list"),
    (["<|image|>"], [picture(4, 4) / 255], "not float64 of shape"),
    (["<|image|>"], [picture(4, 4)[..., 0]], r"not uint8 of shape \(4, 4\)"),
    (["<|image|>"], [picture(4, 4)[..., :1]], "has not 3 channels"),
])
def test_pictures_that_do_not_fit(talker, prompts, shown, said):
    with pytest.raises((ValueError, TypeError), match=said):
        talker.generate(prompts, images=shown)


def beside(change, name="preprocessor_config.json"):
    raw = json.loads(vision.preprocessor_config(SMALL)) | change
    raw = {k: v for k, v in raw.items() if v != "gone"}
    return {name: json.dumps(raw).encode()}


def test_settings_are_read():
    read = vision.image_settings
    assert read(beside({}), SMALL) == TILES
    other = {"max_patches": 4, "image_mean": [0.4, 0.5, 0.6], "device": None,
             "image_processor_type": "Llama4ImageProcessorFast"}
    how = read(beside(other), SMALL)
    assert (how.max_tiles, how.mean) == (4, (0.4, 0.5, 0.6))
    older = json.loads(vision.preprocessor_config(SMALL))
    newer = {"image_processor": older | other}
    files = {"processor_config.json": json.dumps(newer).encode()}
    assert read(files, SMALL) == how
    photo = picture(48, 48)
    assert len(images.image_tiles(photo, how)) == 5
    shift = images.image_tiles(photo, TILES) - images.image_tiles(
        photo, replace(how, max_tiles=16))
    np.testing.assert_allclose(
        shift.mean((0, 2, 3)), [-0.2, 0, 0.2], atol=0.01)


@pytest.mark.parametrize("files, said", [
    ({}, "no preprocessor_config.json beside the tokenizer"),
    (beside({"size": {"height": 336, "width": 336}}), "size is .* only"),
    (beside({"resize_to_max_canvas": True}), "only False is supported"),
    (beside({"resample": 3}), "resample is 3; only 2"),
    (beside({"max_patches": "gone"}), "lacks the field 'max_patches'"),
    (beside({"max_patches": 0}), "max_patches must be an int >= 1"),
    (beside({"image_std": [0.5, 0, 0.5]}), "image_std must be 3 positive"),
    (beside({"rescale_range": 2}), "'rescale_range' is not supported"),
    (beside({"image_processor_type": "CLIP"}), "image_processor_type is 'CLIP'"),
    (beside({"patch_token": "<p>"}, "processor_config.json"), "patch_token is '<p>'"),
    (beside({"patch_size": 14}, "processor_config.json"), "patch_size is 14; only 4"),
    ({"preprocessor_config.json": b"[]"},
     "'preprocessor_config.json' must hold one JSON object"),
])
def test_settings_that_are_refused(files, said):
    with pytest.raises(ValueError, match=said):
        vision.image_settings(files, SMALL)


def test_marks_that_are_not_the_models(words):
    with pytest.raises(ValueError, match="has no '<.image_start.>'"):
        images.mark_ids({}, {})
    with pytest.raises(ValueError, match="61 in the tokenizer, but 57 in"):
        images.mark_ids(IDS, {"<|image_start|>": 57})


def test_a_picture_from_a_file(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    pixels = picture(5, 7)
    turned = image.fromarray(pixels)
    turned.getexif()[0x0112] = 6                # a camera held upright
    turned.save(tmp_path / "a.png", exif=turned.getexif())
    read = images.read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(read, np.rot90(pixels, -1))
    clear = np.dstack([pixels, np.full((5, 7), 0, np.uint8)])
    image.fromarray(clear).save(tmp_path / "b.png")
    assert (images.read_image(tmp_path / "b.png") == 255).all()
    (tmp_path / "c.png").write_bytes(b"no picture")
    for name in ("c.png", "d.png"):
        with pytest.raises(ValueError, match=name):
            images.read_image(tmp_path / name)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ValueError, match=r"annotated-moe\[images\]"):
        images.read_image(tmp_path / "a.png")


def test_the_command_line(talker, tmp_path, monkeypatch):
    """A file becomes the tiles of its picture, in a chat too."""
    image = pytest.importorskip("PIL.Image")
    pixels = picture(16, 16)
    path = str(tmp_path / "a.png")
    image.fromarray(pixels).save(path)
    asked = []

    def stream_ids(model, prompt, **options):
        asked.append((prompt, options["images"]))
        return iter([0])

    monkeypatch.setattr(cli, "load_model", lambda *_: (talker, ""))
    monkeypatch.setattr(Model, "stream_ids", stream_ids)
    for prompt, ids in (("ab", [*ONE, 0, 1]), ("a<|image|>b", [0, *ONE, 1])):
        for chat in ([], ["--chat"]):
            line = ["generate", "--prompt", prompt, "--image", path, *chat]
            assert cli.main(line) == 0
            got, tiles = asked.pop()
            assert got == ids
            np.testing.assert_array_equal(tiles, images.image_tiles(pixels, TILES))
    assert cli.main(["generate", "--prompt", "ab"]) == 0
    assert asked.pop() == ([0, 1], None)
