"""The recipe from nothing to weights that sample: every stage in the README's order, two steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import headstart as hs
import headstart_weights
from headstart.errors import InputError
from headstart_weights.recipe import (
    StageOptions,
    artwork,
    diffusion,
    distill,
    export,
    restore,
    variety,
)
from headstart_weights.recipe.__main__ import main
from headstart_weights.recipe.artwork import SpriteLabel, Sprites
from headstart_weights.recipe.concepts import CONCEPTS, PAIR_CONCEPTS
from headstart_weights.recipe.dataset import STYLES, Dataset
from headstart_weights.recipe.diffusion import GRID, predict_x0
from headstart_weights.recipe.readme import STAGES
from headstart_weights.recipe.training import SEED_STRIDE, Average, Run

PICTURES = 64  # every stage encodes all of them


def pictures(work: Path) -> None:
    """What the `data` stage writes, of discs instead of artwork that npm would have to fetch."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:96, :96] - 47.5
    disc = np.hypot(rows, columns) < 46
    others = [c.name for c in CONCEPTS if c.name not in PAIR_CONCEPTS][:2]
    labels = [SpriteLabel(name, next(iter(STYLES))) for name in (*PAIR_CONCEPTS, *others)]
    images = np.zeros((len(labels), 96, 96, 4), np.uint8)
    images[:, disc] = 255
    images[..., :3] = rng.integers(0, 256, (len(labels), 1, 1, 3))
    sprites = Sprites(images, tuple(labels))
    for name in ("sprites", "held_out"):
        artwork.save_sprites(sprites, work, name, artwork.ICON_SETS)
    for name, concepts in (("dataset", PAIR_CONCEPTS), ("wide", None)):
        whole = Dataset.build(sprites, concepts=concepts)
        Dataset(whole.images[:PICTURES], whole.items[:PICTURES]).save(work, name)


def stage(name: str, work: Path, steps: int, *more: str) -> None:
    main([name, "--work", str(work), "--steps", str(steps), *more])


@pytest.fixture(scope="module", autouse=True)
def small_sheets() -> Iterator[None]:
    """A stage draws samples of six prompts after each save: one is enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "SHEET_PROMPTS", ("a fox",))
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage between `data` and `export`, two steps each."""
    folder = tmp_path_factory.mktemp("recipe")
    pictures(folder)
    for name in STAGES:
        if name not in ("data", "export"):
            stage(name, folder, 2)
    return folder


def test_the_stages_of_the_readme_lead_from_pictures_to_weights(work: Path, tmp_path: Path) -> None:
    export.export(work, tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_text())
    assert [file["role"] for file in record["files"]] == [
        file.role for file in headstart_weights.manifest().files
    ]
    base, distilled = (tmp_path / f"{name}.safetensors" for name in ("base", "distilled"))
    engine = hs.Engine.load(base, distilled, preset="demo")
    assert engine.sample("a fox", seeds=[0]).rgb.shape == (1, 64, 64, 3)


def test_a_stage_goes_on_where_it_was_ended(work: Path) -> None:
    """Run again it does nothing; with more steps it adds to those it has."""
    before = load_file(work / "student.safetensors")
    stage("distill", work, 2)
    again = load_file(work / "student.safetensors")
    assert all(torch.equal(again[name], before[name]) for name in before)
    stage("distill", work, 3, "--keep", "3")
    with safe_open(work / "student.safetensors", "pt") as file:
        assert file.metadata()["steps"] == "3"
    assert (work / "student@3.safetensors").is_file()


def test_an_unbroken_run_and_a_resumed_one_give_the_same_weights(tmp_path: Path) -> None:
    def train(folder: Path, *steps: int) -> torch.Tensor:
        """The loss pulls toward fresh noise, so a run that repeats or skips a draw shows."""
        folder.mkdir()
        for count in steps:
            layer = torch.nn.Linear(2, 2, bias=False)
            torch.nn.init.zeros_(layer.weight)
            optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
            average = Average(layer, 0.9)
            run = Run(
                "toy",
                StageOptions(work=folder, steps=count, seed=3),
                {"layer": layer},
                [optimiser],
                average,
            )

            def step(index: int, fraction: float, layer=layer, optimiser=optimiser):
                optimiser.zero_grad()
                (layer.weight - torch.randn(2, 2)).square().sum().backward()
                optimiser.step()
                return {"loss": 0.0}

            run.loop(step)
        return average.values["weight"]

    assert torch.equal(train(tmp_path / "one", 8), train(tmp_path / "two", 3, 8))


def test_two_training_seeds_share_no_step() -> None:
    """Step i of seed s draws from SEED_STRIDE*s + i: no run is long enough to meet the next."""
    longest = 100_000
    first = {SEED_STRIDE * 1 + step for step in range(longest)}
    assert not first & {SEED_STRIDE * 2 + step for step in range(longest)}
    assert SEED_STRIDE * 4000 < 2**32  # what torch's CPU generator keeps of a seed


def test_students_of_a_seed_have_a_file_of_their_own() -> None:
    names = {
        distill.student_name(variant, seed)
        for variant in (distill.STUDENT, distill.DP, distill.RENOISE)
        for seed in (0, 1, 2)
    }
    assert len(names) == 9 and "student" in names and "renoise-2" in names


def test_a_student_that_re_noises_starts_its_later_steps_from_new_noise(work: Path) -> None:
    """From the same start, a deterministic step repeats itself and a re-noised one does not."""
    options = StageOptions(work=work)
    for variant, varies in ((distill.UNNOISED, False), (distill.RENOISE_UNNOISED, True)):
        distiller = distill.Distiller(options, variant)
        context = distiller.text(["a fox"] * 16)
        noise = torch.randn(16, 4, 16, 16)
        with torch.no_grad():
            followed = [_seeded(seed, distiller, noise, context) for seed in (1, 2)]
        assert torch.equal(*followed) is not varies


@pytest.fixture(scope="module")
def landing(work: Path) -> distill.Distiller:
    return distill.Distiller(StageOptions(work=work), distill.DP)


def test_the_first_step_alone_is_taught_to_land(
    landing: distill.Distiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And `fake` learns what is matched alone: in a step that lands it stays as it is."""
    numbers: list[int] = []
    start = landing.start

    def noted(number: int, *args: torch.Tensor) -> torch.Tensor:
        numbers.append(number)
        return start(number, *args)

    monkeypatch.setattr(landing, "start", noted)
    seeds: dict[bool, int] = {}
    for seed in range(20):
        torch.manual_seed(seed)
        fake, student = (_values(n) for n in (landing.fake, landing.student))
        losses = landing.step(100, 0.0)
        first = numbers[-1] == 0
        assert ("landing" in losses, "matching" in losses) == (first, not first)
        assert _equal(fake, landing.fake) is first and not _equal(student, landing.student)
        seeds.setdefault(first, seed)
        if len(seeds) == 2:
            break
    monkeypatch.setattr(landing, "variant", distill.STUDENT)  # which is matched there too
    torch.manual_seed(seeds[True])
    assert "matching" in landing.step(0, 0.0) and numbers[-1] == 0
    assert distill.RENOISE_DP.landing and not distill.RENOISE.landing


def test_later_steps_begin_where_no_gradient_leads_back(landing: distill.Distiller) -> None:
    """The student's weights want a gradient and its first step is followed: the state has none."""
    context = landing.text(["a fox"] * 16)
    x = torch.empty(0)
    for number in range(len(GRID)):
        x = landing.start(number, torch.arange(16), context)
        assert torch.is_grad_enabled() and not x.requires_grad
    x0 = predict_x0(landing.student, x, torch.full((16,), GRID[-1]), context)
    assert x0.requires_grad


@pytest.fixture(scope="module")
def varied(work: Path) -> Path:
    """A folder with the adapters of seed 0, and the re-noise student that one is trained on."""
    stage("renoise", work, 1)
    stage("variety", work, 2)
    return work


def test_an_adapter_for_variety_acts_on_the_first_row_alone(varied: Path) -> None:
    engine = hs.Engine.demo()
    first = hs.Strength(rows=(1.0, 0.0, 0.0, 0.0))
    table, cond = engine.compile("distilled"), engine.text.encode(["a fox"])
    for name in variety.STUDENTS:
        report = engine.attach(varied / f"{name}.safetensors", first, to=("distilled",))
        assert report.live
        plain, states = (
            list(engine.iterate("a fox", seeds=[3], plan="distilled", adapters=adapters))
            for adapters in ([], None)
        )
        assert not torch.equal(states[0].x0, plain[0].x0)
        engine.detach(name)
        rest = list(hs.sample(table, engine.denoisers, cond, hs.Philox([3]), resume=states[0]))
        assert len(rest) == 3
        for state, again in zip(states[1:], rest, strict=True):
            assert torch.equal(state.x0, again.x0)


def test_the_variety_stage_goes_on_where_it_was_ended(varied: Path) -> None:
    """It says which student it is of, and its students are as they were."""
    files = ("variety", "renoise-variety", "student", "renoise")
    before = {name: load_file(varied / f"{name}.safetensors") for name in files}
    stage("variety", varied, 2)
    for name in files:
        again = load_file(varied / f"{name}.safetensors")
        assert all(torch.equal(again[key], value) for key, value in before[name].items())
    stage("variety", varied, 3)
    for name, student in variety.STUDENTS.items():
        with safe_open(varied / f"{name}.safetensors", "pt") as file:
            losses = file.metadata()
        assert losses == {"steps": "3", "headstart.trained_on": student.name}


def test_variety_without_its_students_names_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no student-4\.safetensors .*`distill`.*--seed 4"):
        stage("variety", tmp_path, 1, "--seed", "4")
    assert not list(tmp_path.iterdir())


def _values(network: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def _equal(before: list[torch.Tensor], network: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def _seeded(
    seed: int, distiller: distill.Distiller, noise: torch.Tensor, context: torch.Tensor
) -> torch.Tensor:
    torch.manual_seed(seed)
    return distiller.follow(noise, context, 1)


def test_restore_brings_all_that_training_goes_on_from(tmp_path: Path) -> None:
    """The tokenizer is in the base: after `data` and `restore` nothing else is missing."""
    restore.restore(tmp_path)
    pictures(tmp_path)
    stage("distill", tmp_path, 1, "--seed", "1")
    assert (tmp_path / "student-1.safetensors").is_file()
