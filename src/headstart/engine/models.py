"""The files of a pair before they are loaded: what each is, and whether they belong together.

role -> Model (path, family, guess) -> Headers, with which plans compile before weights are read
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from headstart.checkpoint.checkpoint import unet_family
from headstart.checkpoint.distillation import Guess, guess
from headstart.checkpoint.ema import Main, averages_note
from headstart.checkpoint.families import Family, latent_space
from headstart.checkpoint.lineage import family_of
from headstart.checkpoint.network_info import Overrides
from headstart.checkpoint.tensors import Checkpoint, PartName
from headstart.errors import CheckpointError, InputError
from headstart.plan.pairs import DEMO_RATIO
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.spacing import Process

FilePath = str | Path
Predictions = str | Prediction | Mapping[str, str | Prediction]


@dataclass(frozen=True, slots=True)
class Model:
    """One of the two models: its file, its family as the file declares it, what its name adds."""

    path: FilePath
    family: Family
    guess: Guess
    trained: str | None = None
    """Timesteps that it was distilled at, as the metadata of a bundled file states them."""

    @classmethod
    def of(cls, path: FilePath, allow: Collection[str] = ()) -> Model:
        """From headers alone. Raises CheckpointError for a file without a UNet we know.

        `allow`: tensors that may be left aside.
        """
        checkpoint = Checkpoint.open(path, "unet")
        family = unet_family(Path(path), checkpoint, Overrides(allow=allow))
        trained = checkpoint.metadata.get("headstart.timesteps")
        return cls(path, family, guess(path, checkpoint, family.lineage), trained)

    @property
    def student(self) -> str | None:
        """What it is, where its file says that it is distilled."""
        if (row := self.guess.distillation) is not None:
            return f"{row.name}, a distilled model"
        return self.trained and f"a model distilled at timesteps {self.trained:.60}"

    def states(self, field: str) -> bool:
        """Whether the file itself says so, and neither its name nor its family."""
        return field in self.family.declared

    @property
    def prediction(self) -> Prediction:
        """The first of: stated in the file, guessed from its name, the family's."""
        guessed = None if self.states("prediction") else self.guess.prediction
        return self.family.prediction if guessed is None else guessed

    @property
    def image_size(self) -> int:
        """In pixels; a name tells it for full-size models only."""
        stated = self.states("image_size") or not self.family.exact
        return (None if stated else self.guess.image_size) or self.family.image_size

    @property
    def ratio(self) -> float | None:
        """Its levels that look alike are this times SDXL's: by the side of the latent, in an LDM's
        usual 8 pixels a cell (arXiv:2301.11093, section 2); the bundled pair was matched by more.
        """
        if self.family.lineage == "demo":
            return DEMO_RATIO
        return self.image_size / (8 * 128) if self.family.exact else None

    def note(self, role: str, prediction_given: bool) -> str | None:
        """What was guessed and how to set it by hand, or None where nothing was."""
        settled = prediction_given or self.states("prediction")
        note = self.guess.note(without_prediction=settled)
        if note is None and self.family.lineage == "sd21" and not settled:
            note = (
                "nothing says whether it predicts eps or v, taken for the 768 px model that "
                "predicts v (set with --prediction or prediction=)"
            )
        return note and f"{role}: {note}"


def predictions(option: Predictions | None, models: Mapping[str, Model]) -> dict[str, Prediction]:
    """Role -> what its network predicts; the option, for both or by role, wins.

    Raises InputError for a role that the pair does not have.
    """
    by_role = option if isinstance(option, Mapping) else dict.fromkeys(models, option)
    if strange := set(by_role) - set(models):
        raise InputError(
            f"prediction for {', '.join(map(repr, sorted(strange)))}: this pair has "
            f"{', '.join(map(repr, models))}"
        )
    return {
        role: model.prediction if (value := by_role.get(role)) is None else Prediction(value)
        for role, model in models.items()
    }


def schedules(models: Mapping[str, Model], kinds: Mapping[str, Prediction]) -> dict[str, Process]:
    """Role -> the noise schedule that it was trained on; `kinds`: what each network predicts.

    A distilled file that states none has its base's where it may have been made from this base: it
    predicts the same, and is no published student. These were all trained on the family's.
    """
    processes: dict[str, Process] = {role: model.family.schedule for role, model in models.items()}
    if len(models) == 2 and not models["distilled"].states("schedule"):
        distilled, prediction = models["distilled"], kinds["distilled"]
        published = distilled.guess.preset is not None and prediction is distilled.prediction
        if kinds["base"] is prediction and not published:
            processes["distilled"] = processes["base"]
    for role, prediction in kinds.items():  # from the option, or from the file's name
        if not models[role].states("schedule"):
            processes[role] = _USUAL.get(prediction, processes[role])
    return processes


_USUAL: Mapping[Prediction, Process] = {
    Prediction.FLOW: NoiseSchedule.flow(),
    Prediction.EDM: NoiseSchedule.edm(),
    Prediction.EDM_V: NoiseSchedule.edm(sigma_max=120.0, sigma_data=1.0),
}
"""Of files that state no schedule and predict what no table has: an unshifted flow, Karras et al.'s
numbers, CosXL's (its config in Stability's generative-models)."""


def two_schedules(processes: Mapping[str, Process]) -> str | None:
    """A line for a person where the models have different noise schedules."""
    if len({process.fingerprint() for process in processes.values()}) < 2:
        return None
    ranges = [f"the {role}'s up to sigma {p.highest[1]:.4g}" for role, p in processes.items()]
    return f"two noise schedules, {' and '.join(ranges)}: each model is called at its own levels"


def preset_of(models: Mapping[str, Model]) -> str | None:
    """The pair's name in `headstart.preset`, or None where neither file nor name tells."""
    if next(iter(models.values())).family.lineage == "demo":
        return "demo"
    return models["distilled"].guess.preset if "distilled" in models else None


def distilled_by(lora: FilePath, models: Mapping[str, Model]) -> Guess:
    """What a LoRA that makes the distilled model of the base probably is, from its header.

    Raises InputError where there is no base alone, CheckpointError for a file that is no LoRA.
    """
    if list(models) != ["base"]:
        raise InputError(
            "a distilled LoRA needs the base it was made for, and takes the place of the distilled "
            "model: give base=, and distilled_lora= instead of distilled="
        )
    checkpoint = Checkpoint.open(lora)
    if "adapter" not in checkpoint.split():
        raise CheckpointError(
            f"{lora}: expected the LoRA of a distilled model, and this file is none; a whole UNet "
            "goes in distilled= (--distilled)"
        )
    return guess(lora, checkpoint, models["base"].family.lineage)


def swap_note(models: Mapping[str, Model], lora: Guess | None) -> str | None:
    """A line for a person where the files say that each is in the other's option."""
    base, distilled = models.get("base"), models.get("distilled")
    if base is None or base.student is None or (lora is None and distilled is None):
        return None
    if (distilled.student if distilled is not None else lora and lora.distillation) is None:
        return (
            f"the base is taken for {base.student}, and nothing says so of the distilled one: are "
            "the two files swapped? A hybrid of swapped models is a distilled start and a blurred "
            "end"
        )
    if distilled is None or one_file(base.path, distilled.path) is not None:
        return None
    return (
        f"the base is taken for {base.student} too: the variety of a hybrid comes from a base that "
        "is not distilled, so give that with --base"
    )


def one_file(base: FilePath | None, distilled: FilePath | None) -> str | None:
    """A line for a person where both models are the same file."""
    if base is None or distilled is None or Path(base).resolve() != Path(distilled).resolve():
        return None
    return (
        f"the base and the distilled model are one file, {base}: all plans run that one model; "
        "give --distilled a distilled model"
    )


def check_belong(models: Mapping[str, Model]) -> None:
    """Raise CheckpointError unless one model's latent can go on in the other.

    That takes one lineage. Noise schedules may differ: every model is called at its own levels.
    """
    if len(models) < 2:
        return
    base, distilled = models["base"], models["distilled"]
    if base.family.lineage != distilled.family.lineage:
        raise CheckpointError(
            f"the base ({base.path}) is {base.family.name} and the distilled model "
            f"({distilled.path}) {distilled.family.name}: expected two models of one family, "
            "because the latent passes from one to the other"
        )


def check_vae(path: FilePath, model: Model) -> None:
    """Raise CheckpointError for a VAE in a file of another family than the model's.

    A file with neither UNet nor text encoders does not declare a family, and is not checked.
    """
    other = family_of(Path(path), Checkpoint.open(path, "vae"))
    if other is None or latent_space(other.lineage) == latent_space(model.family.lineage):
        return
    raise CheckpointError(
        f"{path}: its VAE is for the latents of {other.lineage}, and {model.path} is "
        f"{model.family.name}: give a VAE of that family"
    )


class Averages(NamedTuple):
    """Role -> the argument `ema` of `load_unet`, and lines for a person."""

    of: Mapping[str, bool | None]
    notes: tuple[str, ...] = ()


def choose_averages(models: Mapping[str, Model], ema: bool | None) -> Averages:
    """Averaged weights or trained ones, for the models that have both.

    Raises CheckpointError for True where no model has averages.
    """
    if ema is False:
        return Averages(dict.fromkeys(models, False))
    mains: dict[str, Main | None] = {
        role: Checkpoint.open(model.path).main_of(model.path) for role, model in models.items()
    }
    if ema is None:
        lines = {role: averages_note(main) for role, main in mains.items()}
        notes = tuple(f"{role}: {note}" for role, note in lines.items() if note)
        return Averages(dict.fromkeys(models), notes)
    if not any(mains.values()):
        files = " nor ".join(str(model.path) for model in models.values())
        raise CheckpointError(
            f"ema=True (--ema), and {files} has no averaged weights beside its own: expected "
            "`model_ema.*` in a file, or a folder unet_ema/; leave it out"
        )
    return Averages({role: main is not None or None for role, main in mains.items()})


def holder(part: PartName, models: Mapping[str, Model]) -> FilePath:
    """The first of the models' files that has the part; the first of all where none has."""
    for model in models.values():
        with suppress(CheckpointError):  # a folder without that component
            if part in Checkpoint.open(model.path, part).parts():
                return model.path
    return next(iter(models.values())).path


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """What files say, and what their names suggest.

    models       role -> its file
    denoisers    "base" and/or "distilled" -> the file that it is made of; with a distilled LoRA
                 both are the base's
    schedules, predictions, guesses, preset    as `engine.pair.Pair` has them
    notes        lines for a person; swap: the one that says that they may be swapped, or None
    """

    models: Mapping[str, Model]
    denoisers: Mapping[str, Model]
    schedules: Mapping[str, Process]
    predictions: Mapping[str, Prediction]
    guesses: Mapping[str, Guess]
    preset: str | None
    notes: tuple[str, ...]
    swap: str | None = None


def read_headers(
    base: FilePath | None,
    distilled: FilePath | None,
    distilled_lora: FilePath | None = None,
    *,
    prediction: Predictions | None = None,
    preset: str | None = None,
    allow: Collection[str] = (),
) -> Headers:
    """Read headers alone. Raises CheckpointError for files that are absent, damaged or do not
    belong together, and InputError where none is given."""
    paths = {role: p for role, p in (("base", base), ("distilled", distilled)) if p is not None}
    if not paths:
        raise InputError("no weights: give base=, distilled= or both, or use Engine.demo()")
    models = {role: Model.of(path, allow) for role, path in paths.items()}
    check_belong(models)
    lora = None if distilled_lora is None else distilled_by(distilled_lora, models)
    kinds = predictions(prediction, models)
    processes = schedules(models, kinds)
    by_role = prediction if isinstance(prediction, Mapping) else dict.fromkeys(models, prediction)
    guessed = (model.note(role, by_role.get(role) is not None) for role, model in models.items())
    swap = swap_note(models, lora)
    lines = (*guessed, swap, two_schedules(processes))
    headers = Headers(
        models=models,
        denoisers=models,
        schedules=processes,
        predictions=kinds,
        guesses={role: model.guess for role, model in models.items()},
        preset=preset or preset_of(models),
        notes=tuple(line for line in lines if line),
        swap=swap,
    )
    return headers if lora is None else _one_network(headers, lora)


def _one_network(headers: Headers, lora: Guess) -> Headers:
    """A pair of one network: its two models differ in the strength of a LoRA."""
    roles, note = ("base", "distilled"), lora.note()
    return replace(
        headers,
        denoisers=dict.fromkeys(roles, headers.models["base"]),
        schedules=dict.fromkeys(roles, headers.schedules["base"]),
        predictions=dict.fromkeys(roles, headers.predictions["base"]),
        guesses={**headers.guesses, "distilled": lora},
        preset=headers.preset or lora.preset,
        notes=(*headers.notes, *([] if note is None else [f"distilled: {note}"])),
    )
