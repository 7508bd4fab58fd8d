"""Tests of chapter 17 that wait for chapters 11 and 91.

For tests/test_vision.py, whose fixtures they use. Old names in them:
`with_images` is `read_prompt` now, `vision.image_tiles(pixels, SMALL)`
is `images.image_tiles(pixels, TILES)`, `find_tokenizer(...).beside` is
`.companions`, `convert.unsaid` will be one of `convert.FILE_MAKERS`
that gives `vision.preprocessor_config(spec)`, and `stream_ids` takes
`images`.
"""


def test_streamed(gold, folder, monkeypatch):
    """Also when the prompt is read in parts that cut an image."""
    monkeypatch.setattr("annotated_moe.streaming.MOST_TOKENS", 10)
    streamed = am.load(folder, dtype="float32", stream=True)
    ids = gold["input_ids"].tolist()
    greedy = streamed.generate_ids(ids, 1, images=pictures(gold))
    assert greedy == gold["greedy"][:, :1].tolist()


def test_the_command_line(talker, tmp_path, monkeypatch):
    """A file becomes the tiles of its picture, in a chat too."""
    image = pytest.importorskip("PIL.Image")
    pixels = picture(16, 16)
    path = str(tmp_path / "a.png")
    image.fromarray(pixels).save(path)
    asked = []

    def stream_ids(model, prompt, **options):
        asked.append((prompt, options["image"]))
        return iter([0])

    monkeypatch.setattr(cli, "open_model", lambda *_: (talker, ""))
    monkeypatch.setattr(Model, "stream_ids", stream_ids)
    for prompt, ids in (("ab", [*ONE, 0, 1]), ("a<|image|>b", [0, *ONE, 1])):
        for chat in ([], ["--chat"]):
            line = ["generate", "--prompt", prompt, "--image", path, *chat]
            assert cli.main(line) == 0
            got, tiles = asked.pop()
            assert got == ids
            np.testing.assert_array_equal(
                tiles, vision.image_tiles(pixels, SMALL))
    assert cli.main(["generate", "--prompt", "ab"]) == 0
    assert asked.pop() == ([0, 1], None)
