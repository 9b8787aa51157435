"""Pictures that go out complete: what their files say, and that each is drawn again alone."""

from __future__ import annotations

import hashlib
import html
import io
import json
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from plans import RENOISE, TRAILING_TAIL, Update, compiled, patient
from test_png import TEXT, chunk

import headstart as hs
from headstart.engine.parameters import parameters
from headstart.engine.picture import picture_record, picture_texts
from headstart.engine.record import Recorded, describe, parse
from headstart.engine.rerun import open_source
from headstart.pictures.png import encode_png
from headstart.plan.plan import Leg

DIGESTS = ["0a" * 32, "1b" * 32, "2c" * 32]
RUN = Recorded(
    prompts=("a fox", "a fox", "an owl"),
    seeds=(3, 4, 3),
    negative=("blur", "blur", None),
    size=(64, 96),
    chunk=2,
    table=compiled(Leg(model="base", timesteps=(999,), guidance=7.5), TRAILING_TAIL),
    weights={
        "base": {"file": "/home/ann/models/sd, 1: x.safetensors", "sha256": "ab" * 32},
        "distilled": {"file": "C:\\Users\\ann\\lcm.safetensors", "sha256": "cd" * 32},
    },
    machine={"headstart": "0.1.0"},
    results={"latents": DIGESTS, "rgb": DIGESTS},
)
P = ["a red fox", "an owl", "a cat in the snow, with a hat"]


@pytest.fixture(scope="module")
def engine() -> hs.Engine:
    return hs.Engine.demo()


@pytest.fixture(scope="module")
def run(engine: hs.Engine) -> hs.Trajectory:
    """Three prompts of two lengths, two seeds, in calls of four and two."""
    return engine.sample([p for p in P for _ in "01"], seeds=[5, 6] * 3, batch=4)


def read_parameters(text: str) -> dict[str, Any]:
    """As what reads such pictures does: the last line is pairs, what is before it the prompts."""
    *lines, last = text.split("\n")
    fields_read: dict[str, Any] = {}
    while last:
        name, _, last = last.partition(": ")
        if last.startswith('"'):
            fields_read[name], end = json.JSONDecoder().raw_decode(last)
            last = last[end:].removeprefix(", ")
        else:
            fields_read[name], _, last = last.partition(", ")
    before = "\n".join(["", *lines])
    prompt, _, fields_read["negative"] = before.partition("\nNegative prompt: ")
    fields_read["prompt"] = prompt.removeprefix("\n")
    return fields_read


def test_parameters_name_what_others_call_so() -> None:
    fields = read_parameters(parameters(picture_record(RUN, 1)))
    assert fields == {
        **{"prompt": "a fox", "negative": "blur", "Steps": "4", "Sampler": "Euler"},
        **{"CFG scale": "7.5", "Seed": "4", "Size": "96x64", "Model hash": "ababababab"},
        **{"Model": "sd, 1: x", "Refiner": "lcm [cdcdcdcdcd]", "Refiner switch at": "0.25"},
        **{"Plan": RUN.table.name, "Version": "headstart 0.1.0"},
    }
    assert "Negative" not in parameters(picture_record(RUN, 2))
    methods = replace(RUN, diversify=("cads:0.1", "pink:1"))
    assert read_parameters(parameters(methods))["Diversify"] == "cads:0.1, pink:1"


def test_adapters_stand_in_the_prompt_as_others_write_them() -> None:
    """Those that it names itself, or that do nothing, do not; the record is as it was."""
    strengths: dict[str, dict[str, Any]] = {
        "ink": {"value": 0.8},
        "two.parts": {"value": 1.5, "text": 0.5, "models": ["base"]},
        "off": {"value": 0.0},
        "each": {"value": [0.25, -2.0, 0.0]},
        "rows": {"value": [[0.0, 1.0, 0.0], [0.0, -3.0, 0.0]]},
        "distilled-lora": {"value": 1.0, "models": ["distilled"]},
    }
    adapters = {name: {"to": ["base"], "allow": [], "strength": s} for name, s in strengths.items()}
    run = replace(RUN, adapters=adapters, prompts=("a fox", "a <lora:ink:0.3> fox", "an owl"))
    prompts = [read_parameters(parameters(picture_record(run, n)))["prompt"] for n in range(3)]
    assert prompts == [
        "a fox <lora:ink:0.8> <lora:two.parts:0.5:1.5> <lora:each:0.25>",
        "a <lora:ink:0.3> fox <lora:two.parts:0.5:1.5> <lora:each:-2> <lora:rows:-3>",
        "an owl <lora:ink:0.8> <lora:two.parts:0.5:1.5>",
    ]
    assert picture_record(run, 0).prompts == ("a fox",)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"update": Update.EULER}, "Euler"),
        ({"update": Update.ANCESTRAL}, "Euler a"),
        ({"update": Update.DPMPP_2M}, "DPM++ 2M"),
        ({"update": Update.DPMPP_2M_SDE}, "DPM++ 2M SDE"),
        ({"update": Update.DDIM, "eta": 0.5}, "DDIM"),
        (RENOISE, "LCM"),
    ],
)
def test_a_sampler_is_named_by_what_its_rows_do(options: dict[str, Any], name: str) -> None:
    table = compiled(Leg(model="base", timesteps=(999, 749, 499, 249), **options))
    assert read_parameters(parameters(replace(RUN, table=table)))["Sampler"] == name


@patient
@given(
    prompt=TEXT.filter(lambda text: "Negative prompt: " not in text),
    negative=TEXT,
    file=st.text(string.printable + "雪", min_size=1).filter(lambda t: t.strip("/\\")),
)
def test_any_text_comes_back_from_both_texts_of_a_picture(
    prompt: str, negative: str, file: str
) -> None:
    run = replace(
        RUN,
        prompts=(prompt,),
        seeds=(2**64 - 1,),
        negative=negative,
        weights={"base": {"file": "/home/ann/" + file, "sha256": "ab" * 32}},
    )
    texts = picture_texts(run, 0)
    assert "ann" not in json.dumps(texts)
    record = parse(json.loads(texts["headstart"]))
    assert (record.prompts, record.negative, record.seeds) == ((prompt,), negative, (2**64 - 1,))
    fields = read_parameters(texts["parameters"])
    assert (fields["prompt"], fields["negative"]) == (prompt, negative)
    assert fields["Seed"] == str(2**64 - 1)


def test_a_picture_holds_nothing_of_the_others_in_its_run() -> None:
    text = picture_texts(RUN, 2, 77)["headstart"]
    record = json.loads(text)
    assert "fox" not in text and "ann" not in text and "blur" not in text
    assert (record["prompts"], record["seeds"], record["negative"]) == (["an owl"], [3], None)
    assert record["results"] == {"latents": DIGESTS[2:], "rgb": DIGESTS[2:]}
    assert record["position"] == {"image": 2, "images": 3, "text": 1, "texts": 2, "tokens": 77}


def test_a_picture_holds_what_its_method_acts_across() -> None:
    record = picture_record(replace(RUN, diversify=("particles:10",)), 1)
    assert (record.prompts, record.seeds, record.results["rgb"]) == (
        ("a fox",) * 2,
        (3, 4),
        [DIGESTS[1]],
    )
    assert record.position is not None and record.position[:2] == (1, 2)


def test_strengths_are_those_of_the_picture() -> None:
    strength = {"value": [[1.0, 2.0, 3.0]] * 4, "text": [0.5, 0.6, 0.7], "rows": [1.0] * 4}
    adapters = {"a": {"to": ["base"], "allow": [], "strength": strength}}
    own = picture_record(replace(RUN, adapters=adapters), 1).adapters["a"]["strength"]
    assert own == {"value": ((2.0,),) * 4, "text": (0.6,), "rows": [1.0] * 4}


@pytest.mark.parametrize(
    "position",
    [
        {"image": 3}, {"images": 2**60, "image": 2**59}, {"image": -1}, {"texts": 9}, {"text": 2},
        {"tokens": -1},
    ],
)  # fmt: skip
def test_a_position_that_no_picture_has_is_refused(position: dict[str, int]) -> None:
    record = json.loads(json.dumps(describe(picture_record(RUN, 2, 77))))
    with pytest.raises(hs.InputError, match="no picture is at position"):
        parse({**record, "position": {**record["position"], **position}})


@pytest.mark.parametrize("image", [0, 3, 5])
def test_a_picture_is_drawn_again_to_the_bit_without_the_others(
    image: int, run: hs.Trajectory, engine: hs.Engine, tmp_path: Path
) -> None:
    """Also where it shared its calls with other prompts, one of them longer."""
    path = run.save(tmp_path / "run")[image]
    again = hs.replay(path, engine)
    assert torch.equal(again.rgb[0], run.rgb[image])
    assert torch.equal(again.latents[0], run.latents[image])
    assert (again.prompts, again.seeds) == ((run.prompts[image],), (run.seeds[image],))
    (copy,) = again.save(tmp_path / "again.png")
    assert copy.read_bytes() == path.read_bytes()


def test_a_guided_picture_is_drawn_again_to_the_bit(engine: hs.Engine, tmp_path: Path) -> None:
    options: dict[str, Any] = {"base_guidance": 3.0, "negative": "blue", "batch": 2}
    run = engine.sample(P[:2] * 2, seeds=[1, 1, 2, 2], **options)
    again = hs.replay(run.save(tmp_path)[2], engine)
    assert torch.equal(again.latents[0], run.latents[2])


def test_a_picture_of_other_pixels_says_so(
    run: hs.Trajectory, engine: hs.Engine, tmp_path: Path
) -> None:
    path = run.save(tmp_path)[0]
    with Image.open(path) as image:
        info = PngImagePlugin.PngInfo()
        info.add_text("headstart", image.info["headstart"])
        same, edited, cut = image.copy(), image.copy(), image.crop((0, 0, 32, 32))
    edited.putpixel((3, 3), (0, 0, 0))
    for name, changed in (("edited", edited), ("cut", cut)):
        changed.save(tmp_path / f"{name}.png", pnginfo=info)
        with pytest.raises(hs.InputError, match="was edited"):
            hs.replay(tmp_path / f"{name}.png", engine)
    same.convert("RGBA").save(tmp_path / "same.png", pnginfo=info, optimize=True)
    hs.replay(tmp_path / "same.png", engine)


def test_a_forged_picture_is_not_equal_and_says_how_far(
    run: hs.Trajectory, engine: hs.Engine, tmp_path: Path
) -> None:
    rgb = run.rgb[0].numpy().copy()
    rgb[0, 0, 0] ^= 1
    record = picture_record(run.recorded(), 0, run.tokens)
    results = {**record.results, "rgb": [hashlib.sha256(rgb.tobytes()).hexdigest()]}
    text = json.dumps(describe(replace(record, results=results)))
    (tmp_path / "a.png").write_bytes(encode_png(rgb, {"headstart": text}))
    with pytest.raises(hs.InputError, match=r"1 of 4096 pixels differ, by 1 of 255 at most"):
        hs.replay(tmp_path / "a.png", engine)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "no record of headstart in it: it was written with --no-metadata"),
        ({"parameters": "a fox\nSteps: 20, Sampler: Euler, Seed: 1"}, "AUTOMATIC1111"),
        ({"prompt": "{}", "workflow": "{}"}, "ComfyUI"),
        ({"headstart": "{"}, "is damaged"),
        ({"headstart": "[" * 10**6}, "is damaged: nested"),
        ({"headstart": '{"a":' * 100 + "1" + "}" * 100}, "is damaged: nested"),
        ({"headstart": "[]"}, "must be an object"),
        ({"headstart": "{}"}, "has no 'format'"),
        ({"headstart": json.dumps(describe(RUN))}, "not of one picture"),
    ],
)
def test_a_picture_without_a_record_is_one_error(
    texts: dict[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((8, 8, 3), np.uint8), texts))
    with pytest.raises(hs.InputError, match=message) as caught:
        open_source(tmp_path / "a.png")
    assert "a.png" in str(caught.value) and len(str(caught.value)) < 400


def test_what_only_looks_like_a_picture_is_one_error(tmp_path: Path) -> None:
    for name, data in (("a.png", b'{"format": 1}'), ("b", b"\x89PNG\r\n\x1a\n" + chunk(b"a", b""))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(hs.InputError, match=r"no PNG file|is damaged"):
            open_source(tmp_path / name)


def test_a_run_is_saved_whole_and_never_over_another(run: hs.Trajectory, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    paths = run.save(folder, grid=True)
    assert [path.name for path in paths] == [f"{n:06d}.png" for n in range(6)]
    assert sorted(p.name for p in folder.iterdir())[6:] == ["grid.png", "record.json"]
    with pytest.raises(hs.InputError, match="holds a run already"):
        run.save(folder)
    with pytest.raises(hs.InputError, match="one file, and this is 6 images"):
        run.save(tmp_path / "a.png")
    for path, image in zip(paths, run.images, strict=True):
        with Image.open(path) as read:
            assert read.tobytes() == image.tobytes()


def test_one_image_is_one_file(engine: hs.Engine, tmp_path: Path) -> None:
    run = engine.sample("a fox", plan="distilled")
    path = tmp_path / "new" / "fox.png"
    assert run.save(path) == [path] and [*path.parent.iterdir()] == [path]
    with pytest.raises(hs.InputError, match="overwrite=True"):
        run.save(path)
    run.save(path, overwrite=True, metadata=False)
    with Image.open(path) as image:
        assert not image.info
    with pytest.raises(hs.InputError, match="its grid"):
        run.save(tmp_path / "b.png", grid=True)


def test_what_is_left_of_a_longer_run_goes(engine: hs.Engine, tmp_path: Path) -> None:
    engine.sample("a fox", plan="distilled", seeds=[1, 2]).save(tmp_path, grid=True)
    engine.sample("a fox", plan="distilled").save(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "record.json"]


def test_a_notebook_shows_the_sheet_and_escapes_prompts(engine: hs.Engine) -> None:
    run = engine.sample("<b>a fox</b> & 'co'", plan="distilled", seeds=[1, 2])
    shown = run._repr_html_()
    assert "<b>" not in shown and html.escape("<b>a fox</b> & ") in shown
    assert "demo-distilled" in shown and 'src="data:image/' in shown
    with Image.open(io.BytesIO(run._repr_png_())) as sheet:
        assert sheet.width > 2 * 64


def test_a_sheet_has_a_row_for_each_prompt_also_where_seeds_differ(
    engine: hs.Engine, run: hs.Trajectory
) -> None:
    pairs = replace(run, seeds=(1, 2, 3, 4, 5, 6))
    one_short = replace(
        run, rgb=run.rgb[:5], latents=run.latents[:5], seeds=run.seeds[:5], prompts=run.prompts[:5]
    )
    sizes = {
        Image.open(io.BytesIO(picture._repr_png_())).size for picture in (run, pairs, one_short)
    }
    assert len(sizes) == 1


def test_calls_that_are_not_meant_say_what_is(
    run: hs.Trajectory, engine: hs.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(hs.InputError, match=r'path is empty: give a folder or NAME.png; "." is'):
        run.save("")
    with pytest.raises(hs.InputError, match=r"replay\(record, engine\): .* got Engine"):
        hs.replay(engine, "x.png")  # type: ignore[arg-type]
    assert not [*tmp_path.iterdir()]
    assert repr(run).startswith("Trajectory(6 images ")
    assert repr(replace(run, seeds=(5,))).startswith("Trajectory(1 image ")
