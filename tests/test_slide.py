"""Adapters from the command line: a strip that is one batch a plan, and records that replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bundled import needs_pair
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import headstart as hs
import headstart_weights
from headstart.cli import main
from headstart.compare.slide import slide
from headstart.metrics.features import open_features

pytestmark = needs_pair


@pytest.fixture
def lora(engine: hs.Engine, tmp_path: Path) -> Path:
    """A random rank-2 LoRA of the attention."""
    draw = torch.Generator().manual_seed(1)
    network: Any = engine.denoisers["base"]
    tensors: dict[str, Tensor] = {}
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and "attn" in path:
            name = "lora_unet_" + path.replace(".", "_")
            shape = layer.weight.shape
            tensors[f"{name}.lora_down.weight"] = 0.1 * torch.randn(2, shape[1], generator=draw)
            tensors[f"{name}.lora_up.weight"] = 0.1 * torch.randn(shape[0], 2, generator=draw)
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "odd.safetensors")
    return tmp_path / "odd.safetensors"


def test_a_slide_is_the_runs_it_stands_for_in_one_batch(engine: hs.Engine, lora: Path) -> None:
    engine.attach(lora)
    calls: list[int] = []
    network: Any = engine.denoisers["distilled"]
    spy = network.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    table = engine.compile("distilled")
    result = slide(engine, "a fox", "odd", (-1.0, 0.0, 2.0), (4, 5), {"distilled": table})
    spy.remove()
    assert calls == [6] * len(table)
    images = result.plans[0].images
    assert images.shape == (3, 2, 64, 64, 3)
    for at, strength in enumerate((-1.0, 0.0, 2.0)):
        alone = engine.sample("a fox", seeds=(4, 5), plan=table, adapters={"odd": strength})
        apart = abs(images[at].astype(int) - alone.rgb.numpy().astype(int))
        assert apart.max() <= 1  # a batch of another size rounds differently
    engine.detach("odd")


def test_a_prompt_that_says_the_strength_itself_is_refused(engine: hs.Engine) -> None:
    table = {"distilled": engine.compile("distilled")}
    with pytest.raises(hs.InputError, match=r"strength of adapter 'odd' itself.* take the tag out"):
        slide(engine, "a fox -> a <lora:odd:2> below sigma 1", "odd", (0.0,), (4,), table)


def test_a_caption_without_anything_that_scores_is_refused(engine: hs.Engine) -> None:
    table, judge = {"distilled": engine.compile("distilled")}, open_features("colours")
    with pytest.raises(hs.InputError, match="toward= needs a judge that scores images"):
        slide(engine, "a fox", "odd", (0.0,), (4,), table, judge=judge, toward="a blue fox")


def test_slide_writes_a_strip_and_its_json(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "strip.png"
    command = ["--strengths=-1,0,1", "--seeds", "0-1", "--plan", "distilled,hybrid"]
    options = ["--toward", "a fox, blue background", "--out", str(out), "--json"]
    assert main(["slide", "a fox", "--lora", f"{lora}:1@distilled", *command, *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [plan["name"] for plan in facts["plans"]] == ["distilled", "hybrid"]
    assert [plan["images"] for plan in facts["plans"]] == [6, 6]
    assert all(len(plan["scores"]) == 3 for plan in facts["plans"])
    assert (facts["adapter"], facts["strengths"]) == ("odd", [-1, 0, 1])
    with Image.open(out) as picture:
        assert picture.width > 3 * 128


def test_a_run_with_adapters_replays_from_its_record(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["--lora", f"{lora}:-1.5@distilled+800", "--seeds", "1,2", "--out", str(out)]
    assert main(["sample", "a fox", *command]) == 0
    record = json.loads((out / "record.json").read_text())
    assert record["adapters"]["odd"]["strength"] == {
        "value": -1.5,
        "models": ["distilled"],
        "below": 800.0,
    }
    assert main(["replay", str(out / "record.json")]) == 0
    assert "equal" in capsys.readouterr().out
    lora.write_bytes(lora.read_bytes()[:-1] + b"\x01")
    assert main(["replay", str(out / "record.json")]) == 2
    assert "adapter:odd" in capsys.readouterr().err


def test_adapters_are_reported_and_files_of_one_name_are_told_apart(
    engine: hs.Engine, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """diffusers saves every LoRA as `pytorch_lora_weights.safetensors`. Two of them add."""
    other = tmp_path / "other" / lora.name
    other.parent.mkdir()
    other.write_bytes(lora.read_bytes())
    out = tmp_path / "run"
    both = ["--lora", f"{lora}:0.5", "--lora", f"{other}:0.5", "--seeds", "1"]
    assert main(["sample", "a fox", *both, "--out", str(out)]) == 0
    message = capsys.readouterr().err
    assert "note: odd: " in message and "note: odd-2: " in message
    assert message.count("0 of another shape, 0 unmatched") == 4, "two models each"
    record = json.loads((out / "record.json").read_text())
    assert list(record["adapters"]) == ["odd", "odd-2"]
    assert main(["replay", str(out / "record.json")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora", "nowhere.safetensors"], "nowhere.safetensors does not exist: give the path"),
        (
            ["--lora", "yelow:2"],
            "yelow does not exist: give the path of an adapter's file, or the name",
        ),
        (["--lora", "yellow:two"], "'two' is no strength: expected a number, and behind '@' where"),
        (["--lora", "yellow:@base"], "'@base' is no strength"),
        (["--lora", "nowhere:1@"], "behind '@'"),
        (["--lora", "yellow:1@distil"], "to act on 'distil'"),
        (["--lora", "x", "--strengths=1,1"], "given twice"),
        (["--lora", "x", "--plan", "hybird"], "unknown plan"),
        (["--lora", "x", "--out", "strip.jpg"], "png"),
    ],
)
def test_a_slide_that_cannot_be_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["slide", "a fox", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert complaint.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_bundled_slider_is_called_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And does what it is for: yellow at 1, blue at -1, on a model it was not trained on."""
    out = tmp_path / "strip.png"
    for caption, rising in (("a fox, yellow background", True), ("a fox, blue background", False)):
        command = ["--strengths=-1,1", "--seeds", "0-3", "--plan", "distilled", "--out", str(out)]
        command += ["--overwrite"]
        assert main(["slide", "a fox", *command, "--toward", caption, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        low, high = facts["plans"][0]["scores"]
        assert facts["adapter"] == "yellow"
        assert (high > low) is rising
    assert headstart_weights.manifest().controls == ("yellow",)
