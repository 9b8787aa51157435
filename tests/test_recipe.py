"""The recipe's parts on synthetic sprites: no network, no renderer, no training worth the name."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from headstart.errors import InputError
from headstart_weights.recipe import artwork, dataset, tokenizer
from headstart_weights.recipe.__main__ import build_parser
from headstart_weights.recipe.artwork import IconFile, SpriteLabel, Sprites
from headstart_weights.recipe.augment import MILD, NONE, STRONG, draw, sprite_tensor
from headstart_weights.recipe.concepts import CONCEPTS, PAIR_CONCEPTS
from headstart_weights.recipe.dataset import PALETTE, STYLES, Dataset, Item
from headstart_weights.recipe.readme import STAGES as README_STAGES
from headstart_weights.recipe.stages import STAGES

RECIPE = Path(artwork.__file__).parent
VENDORS = tuple(STYLES)


def disc(colour: tuple[int, int, int], size: int = artwork.SPRITE_SIZE) -> NDArray[np.uint8]:
    """An opaque disc on transparent black, brighter on its left so that a mirror image shows."""
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    inside = np.hypot(rows, columns) < size / 2 - 1
    sprite = np.zeros((size, size, 4), np.uint8)
    sprite[inside] = (*colour, 255)
    sprite[inside & (columns < 0), 1] = 200
    return sprite


@pytest.fixture
def sprites() -> Sprites:
    labels = [SpriteLabel(c, v) for c in PAIR_CONCEPTS[:3] for v in VENDORS[:2]]
    images = [disc((40 * i, 0, 255 - 40 * i)) for i in range(len(labels))]
    return Sprites(np.stack(images), tuple(labels))


# ------------------------------------------------------------------ artwork


def test_a_sprite_is_cropped_to_what_is_visible_and_centred() -> None:
    drawing = np.zeros((192, 192, 4), np.uint8)
    drawing[10:30, 100:180] = (255, 0, 0, 255)  # 20 high, 80 wide
    sprite = artwork.crop_sprite(drawing)
    rows, columns = np.nonzero(sprite[..., 3] > 127)
    assert sprite.shape == (96, 96, 4)
    assert (columns.min(), columns.max()) == (0, 95)
    assert (rows.min(), rows.max()) == (36, 59)  # 20/80 of 96 = 24 rows, centred


def test_resizing_does_not_mix_transparent_black_into_the_edge() -> None:
    drawing = np.zeros((192, 192, 4), np.uint8)
    drawing[20:150, 20:150] = disc((255, 0, 0), 130)
    drawing[..., 1] = 0
    sprite = artwork.crop_sprite(drawing)
    edge = (sprite[..., 3] > 20) & (sprite[..., 3] < 235)
    assert edge.any()
    assert sprite[edge][:, 0].min() >= 250  # red stays red; premultiplying twice would darken it


def test_an_empty_drawing_is_an_input_error() -> None:
    with pytest.raises(InputError, match="shows nothing"):
        artwork.crop_sprite(np.zeros((8, 8, 4), np.uint8))


def test_icons_are_found_by_plain_name_and_by_alias() -> None:
    icons = IconFile(
        {
            "icons": {"red-apple": {"body": "<g/>", "width": 20, "left": 3}},
            "aliases": {
                "apple": {"parent": "red-apple"},
                "turned": {"parent": "red-apple", "rotate": 1},
            },
            "height": 24,
        }
    )
    svg = icons.svg("redapple")
    assert svg is not None and 'viewBox="3 0 20 24"' in svg and "<g/>" in svg
    assert icons.svg("apple") == svg
    assert icons.svg("turned") is None  # a transformed alias is another picture
    assert icons.svg("pear") is None


def _tarball(folder: Path, licence: str) -> artwork.IconSet:
    members = {
        "package/info.json": {"license": {"spdx": licence}},
        "package/icons.json": {"icons": {"fox": {"body": "<g/>"}}},
    }
    icon_set = artwork.ICON_SETS[0]._replace(licence="MIT")
    with tarfile.open(folder / icon_set.tarball, "w:gz") as archive:
        for name, content in members.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    digest = hashlib.sha256((folder / icon_set.tarball).read_bytes()).hexdigest()
    return icon_set._replace(sha256=digest)


def test_a_package_that_is_there_is_read_without_the_network(tmp_path: Path) -> None:
    icon_set = _tarball(tmp_path, "MIT")
    assert artwork.fetch_icon_set(icon_set, tmp_path).svg("fox") is not None


def test_a_package_of_another_hash_is_refused(tmp_path: Path) -> None:
    icon_set = _tarball(tmp_path, "MIT")._replace(sha256="0" * 64)
    with pytest.raises(InputError, match="sha256"):
        artwork.fetch_icon_set(icon_set, tmp_path)


def test_a_package_of_another_licence_is_refused(tmp_path: Path) -> None:
    icon_set = _tarball(tmp_path, "CC-BY-SA-4.0")
    with pytest.raises(InputError, match=r"licence CC-BY-SA-4\.0, expected MIT"):
        artwork.fetch_icon_set(icon_set, tmp_path)


def test_only_permissive_artwork_is_trained_on() -> None:
    assert {entry.licence for entry in artwork.ICON_SETS} == {"MIT", "Apache-2.0"}
    assert artwork.HELD_OUT_SET not in artwork.ICON_SETS
    assert artwork.HELD_OUT_SET.vendor not in STYLES


def test_sprites_survive_the_disk(sprites: Sprites, tmp_path: Path) -> None:
    artwork.save_sprites(sprites, tmp_path, "sprites", artwork.ICON_SETS)
    loaded = artwork.load_sprites(tmp_path)
    assert loaded.labels == sprites.labels
    assert np.array_equal(loaded.images, sprites.images)
    assert not list(tmp_path.glob("*.partial"))


def test_absent_sprites_name_the_stage_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the `data` stage first"):
        artwork.load_sprites(tmp_path)
    with pytest.raises(InputError, match="run the `data` stage first"):
        dataset.load_dataset(tmp_path)


# ------------------------------------------------------------------ dataset


def test_the_pair_knows_distinct_concepts_of_the_table() -> None:
    names = [concept.name for concept in CONCEPTS]
    assert len(set(names)) == len(names)
    assert set(PAIR_CONCEPTS) <= set(names)
    assert 24 <= len(set(PAIR_CONCEPTS)) == len(PAIR_CONCEPTS) <= 32


def test_a_picture_is_the_subject_over_its_background() -> None:
    sprite = np.zeros((96, 96, 4), np.uint8)
    picture = dataset.render_image(sprite, "blue", False, np.random.default_rng(0))
    sprite[:] = (10, 20, 30, 255)
    covered = dataset.render_image(sprite, "blue", False, np.random.default_rng(0))
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert np.abs(picture.mean((0, 1)) - PALETTE["blue"]).max() < 4 * dataset.COLOUR_JITTER_SD
    assert picture[0].mean() - picture[-1].mean() == pytest.approx(2 * dataset.GRADIENT, abs=1)
    assert (covered[4:60, 4:60] == (10, 20, 30)).all()  # 56 px, centred
    assert np.array_equal(covered[:4], picture[:4])


def test_mirroring_turns_the_subject_and_not_the_background() -> None:
    plain, mirrored = (
        dataset.render_image(disc((0, 0, 255)), "pink", flip, np.random.default_rng(3))
        for flip in (False, True)
    )
    assert not np.array_equal(plain, mirrored)
    assert np.array_equal(plain[:, ::-1], mirrored)


def test_every_sprite_is_on_every_background_both_ways(sprites: Sprites) -> None:
    data = Dataset.build(sprites, seed=1)
    assert len(data) == len(sprites) * len(PALETTE) * 2 == len(set(data.items))
    assert {item.colour for item in data.items} == set(PALETTE)


def test_a_dataset_depends_on_its_seed_alone(sprites: Sprites) -> None:
    first, again, other = (Dataset.build(sprites, seed=seed) for seed in (1, 1, 2))
    assert first.items == again.items and np.array_equal(first.images, again.images)
    assert first.items != other.items


def test_items_describe_their_pictures(sprites: Sprites) -> None:
    data = Dataset.build(sprites)
    for image, item in zip(data.images, data.items, strict=True):
        assert np.abs(image[32, 1] - np.array(PALETTE[item.colour], float)).max() < 24


def test_only_the_wanted_concepts_are_drawn(sprites: Sprites) -> None:
    data = Dataset.build(sprites, concepts=PAIR_CONCEPTS[:1])
    assert {item.concept for item in data.items} == {PAIR_CONCEPTS[0]}


def test_a_dataset_survives_the_disk(sprites: Sprites, tmp_path: Path) -> None:
    data = Dataset.build(sprites)
    data.save(tmp_path)
    loaded = dataset.load_dataset(tmp_path)
    assert loaded.items == data.items and np.array_equal(loaded.images, data.images)


def test_captions_follow_the_grammar_and_the_stated_frequencies() -> None:
    item = Item("owl", "noto", "blue", False)
    data = Dataset(np.zeros((1, 64, 64, 3), np.uint8), (item,))
    rng = np.random.default_rng(0)
    captions = [data.caption(0, rng) for _ in range(4000)]
    grammar = re.compile(r"an owl(, cartoon style)?(, blue background)?|")
    assert all(grammar.fullmatch(caption) for caption in captions)
    counts = Counter(
        word for caption in captions for word in re.findall(r"style|background", caption)
    )
    # four standard deviations of a binomial share of 4000 are at most 0.032
    assert captions.count("") / 4000 == pytest.approx(0.1, abs=0.032)
    assert counts["style"] / 4000 == pytest.approx(0.9 * 0.35, abs=0.032)
    assert counts["background"] / 4000 == pytest.approx(0.9 * 0.5, abs=0.032)


# ------------------------------------------------------------------ tokenizer


@pytest.fixture(scope="module")
def fitted() -> tokenizer.Tokenizer:
    return tokenizer.fit_tokenizer(tokenizer.caption_corpus())


def test_every_caption_word_is_one_token_and_captions_fit_16_positions(
    fitted: tokenizer.Tokenizer,
) -> None:
    for caption in tokenizer.caption_corpus():
        words = re.findall(r"\w+|,", caption)
        assert len(fitted.encode(caption).ids) == 2 + len(words) <= 16


def test_any_text_tokenises_between_start_and_end(fitted: tokenizer.Tokenizer) -> None:
    start, end = (fitted.token_to_id(t) for t in (tokenizer.START, tokenizer.END))
    for text in ("", "A GLOSSY Fox", "Zürich 北京 🦊\n\tdon't", "\x00\u200d"):
        ids = fitted.encode(text).ids
        assert (ids[0], ids[-1]) == (start, end)
        assert end not in ids[:-1]  # the end token also stands for unknown: nothing is unknown
    assert end == fitted.get_vocab_size() - 1


def test_the_same_corpus_gives_the_same_bytes() -> None:
    texts = list(tokenizer.caption_corpus())[:500]
    forward, backward = (tokenizer.fit_tokenizer(t).to_str() for t in (texts, texts[::-1]))
    assert forward == backward


def test_it_agrees_with_transformers_clip_tokenizer(fitted: tokenizer.Tokenizer) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    model = json.loads(fitted.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    peer = transformers.CLIPTokenizer(vocab=model["vocab"], merges=merges)
    for text in ("a fox, glossy style", "Two  dogs' 3rd unicorn!?", "Ünïcode 🦊 owl"):
        assert peer(text)["input_ids"] == fitted.encode(text).ids


# ------------------------------------------------------------------ augmentation


def test_unaugmented_drawing_matches_the_dataset(sprites: Sprites) -> None:
    torch.manual_seed(0)
    tensor = sprite_tensor(sprites.images)
    colours = torch.tensor([PALETTE["green"]]).expand(len(sprites), 3) / 255
    pixels = draw(tensor, colours, NONE)
    for picture, sprite in zip(pixels, sprites.images, strict=True):
        rgb = ((picture + 1) * 127.5).permute(1, 2, 0).numpy()
        expected = [
            dataset.render_image(sprite, "green", flip, np.random.default_rng(0)).astype(float)
            for flip in (False, True)
        ]
        subject = np.s_[24:40, 10:54]  # inside the disc, where the background does not show
        assert min(np.abs(rgb - w)[subject].max() for w in expected) < 1.5  # rounding to bytes


@pytest.mark.parametrize("strength", [NONE, MILD, STRONG], ids=["none", "mild", "strong"])
def test_augmented_pictures_stay_pixels(sprites: Sprites, strength: object) -> None:
    torch.manual_seed(0)
    pixels = draw(sprite_tensor(sprites.images), torch.rand(len(sprites), 3), strength)  # pyright: ignore[reportArgumentType]
    assert pixels.shape == (len(sprites), 3, 64, 64)
    assert torch.isfinite(pixels).all()
    assert pixels.min() >= -1 and pixels.max() <= 1


# ------------------------------------------------------------------ stages


def test_every_stage_names_a_function_that_exists() -> None:
    for stage in STAGES.values():
        module, function = stage.target.split(":")
        names: set[str] = set()
        for node in ast.parse((RECIPE / f"{module}.py").read_text()).body:
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign):  # a partial
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        assert function in names, stage.target


def test_the_readme_lists_stages_that_exist_in_order() -> None:
    assert [name for name in STAGES if name in README_STAGES] == list(README_STAGES)


def test_the_parser_knows_every_stage() -> None:
    options = build_parser().parse_args(["scorer", "--minutes", "0.5", "--work", "x"])
    assert (options.stage, options.minutes, options.work) == ("scorer", 0.5, Path("x"))
    with pytest.raises(SystemExit):
        build_parser().parse_args(["bake"])
