"""What is decided of a file before anything of it is loaded: by `inspect` and by every loader.

file -> what it is, each network of it judged, and one sentence where it is refused
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from headstart.checkpoint import foreign
from headstart.checkpoint.embeddings import EmbeddingInfo, describe_embedding
from headstart.checkpoint.families import Family
from headstart.checkpoint.fit import some
from headstart.checkpoint.folder import COMPONENTS, root_of
from headstart.checkpoint.keymap import PartName
from headstart.checkpoint.kinds import STEERS, Kind, kind_of, signs
from headstart.checkpoint.leftovers import is_allowed
from headstart.checkpoint.lineage import family_of, vae_family
from headstart.checkpoint.network_info import (
    NetworkInfo,
    Overrides,
    judge_texts,
    judge_tiny,
    judge_unet,
    judge_vae,
)
from headstart.checkpoint.tensors import TITLES, Checkpoint, Part
from headstart.errors import CheckpointError

ADAPTER, EMBEDDING = "an adapter (LoRA), not a network", "a textual inversion, not a network"
FIXES = {
    ADAPTER: (
        "attach it to a model with --lora, or give it as --distilled-lora beside the base it was "
        "distilled from"
    ),
    EMBEDDING: "give it beside a model as --embedding, and prompts may say its token",
}
CLIP_POSITIONS = 77
NO_NETWORK = "no network recognised: give a model's file, or one of its components"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Of a file, or of the component of a folder.

    what      what it is, where it is no model: `ADAPTER`, `EMBEDDING`
    networks  those in it, each judged; embedding: of learned tokens, which they are
    problem   what is wrong with the file as a whole, so that nothing of it loads
    """

    path: Path
    family: Family | None = None
    what: str | None = None
    embedding: EmbeddingInfo | None = None
    networks: Mapping[PartName, NetworkInfo] = field(default_factory=dict[PartName, NetworkInfo])
    problem: str | None = None

    def require(self, name: PartName, *, needs: bool = True) -> NetworkInfo:
        """That network, ready to be loaded. Raises CheckpointError with what is wrong instead.

        `needs`: whether what only the caller can say must have been given.
        """
        if (refusal := self.refusal(name)) is not None:
            error = CheckpointError(f"{self.path}: {refusal}")
            if (refused := self.networks.get(self._named(name))) is not None:
                for every in refused.every:
                    error.add_note(every)
            raise error
        judged = self.networks[self._named(name)]
        if needs and judged.needs:
            raise CheckpointError(f"{self.path}: {judged.needs[0].error}")
        return judged

    def refusal(self, name: PartName) -> str | None:
        """Why that network does not load: the file's reason, that it is not there, its own."""
        if self.problem is not None:
            return self.problem
        judged = self.networks.get(self._named(name))
        if judged is None:
            return f"expected a {TITLES[name]}, found {self._found()}"
        return judged.problem

    def problems(self) -> tuple[str, ...]:
        """Why it is refused: the file's reason, else those of its networks."""
        if self.problem is not None:
            return (self.problem,)
        found = (judged.problem for judged in self.networks.values())
        return tuple(dict.fromkeys(problem for problem in found if problem is not None))

    def _named(self, name: PartName) -> PartName:
        """A text encoder by its prefix may be the second, and nevertheless alone in its file."""
        lone = name == "text" and name not in self.networks and "text_2" in self.networks
        return "text_2" if lone else name

    def _found(self) -> str:
        """What the file holds and where such a file goes, for the end of an error message."""
        if self.what is not None:
            return f"{self.what}: {FIXES[self.what]}"
        where = {"unet": "--base or --distilled", "tiny": "--preview", "text_2": "--text"}
        places = dict.fromkeys(where.get(part, f"--{part}") for part in self.networks)
        held = ", ".join(TITLES[part] for part in self.networks)
        return f"{held}: give such a file as {', '.join(places)}"


def judge(
    path: str | Path,
    checkpoint: Checkpoint,
    given: Overrides | None = None,
    *,
    second: Checkpoint | None = None,
) -> Verdict:
    """The verdict on an open file or component; `second`: its folder's other text encoder.

    From headers alone, but for the few numbers by which a file says what it is. Never raises for
    what the file holds: that is `problem`.
    """
    path, given = Path(path), given or Overrides()
    try:
        verdict = _judge(path, checkpoint, given, second)
    except CheckpointError as error:
        verdict = Verdict(path=path, problem=_bare(error, path, checkpoint))
    if verdict.problem is None:
        return verdict
    return replace(verdict, problem=_component(path, checkpoint) + verdict.problem)


def _component(path: Path, checkpoint: Checkpoint) -> str:
    """`vae: ` where the checkpoint is that component of the folder `path`, for messages."""
    folder = checkpoint.files[0].parent
    inside = folder.parent == path and folder.name in COMPONENTS.values()
    return f"{folder.name}: " if inside else ""


def _judge(
    path: Path, checkpoint: Checkpoint, given: Overrides, second: Checkpoint | None
) -> Verdict:
    if (embedding := describe_embedding(path, checkpoint)) is not None:
        return Verdict(path=path, what=EMBEDDING, embedding=embedding)
    kind = kind_of(checkpoint.names)
    steers = kind is not None and kind.fix == STEERS
    if "adapter" in checkpoint.split() and not steers:  # be it of another kind of network
        return Verdict(path=path, what=ADAPTER)
    parts = checkpoint.parts()
    if kind is not None and not _is_beside(kind, parts):
        return Verdict(path=path, problem=f"{kind.what}: {kind.fix}")
    if all(part.shapes.keys() <= _NO_ENCODER for part in parts.values()):
        return Verdict(path=path, problem=_nothing(checkpoint, parts))
    if (problem := _left(checkpoint, given.allow)) is not None:
        return Verdict(path=path, problem=problem)
    checkpoint.check_numbers()
    if second is not None and "text" in parts:
        second.check_numbers()
        parts["text_2"] = _second(path, second, given)
    family = family_of(path, checkpoint)
    networks: dict[PartName, NetworkInfo] = {}

    def add(name: PartName, judge_part: Callable[[Part], NetworkInfo]) -> None:
        if name in parts:
            try:
                networks[name] = judge_part(parts[name])
            except CheckpointError as error:
                problem = f"the {TITLES[name]}: {_bare(error, path, checkpoint)}"
                networks[name] = NetworkInfo(part=parts[name], problem=problem)

    add("unet", lambda part: judge_unet(part, family, given))
    add("vae", lambda part: judge_vae(part, vae_family(path, part), given))
    words = given.tokenizer or _has_tokenizer(path, checkpoint)
    networks |= judge_texts(parts, family, replace(given, tokenizer=words))
    add("tiny", lambda part: judge_tiny(part, given))
    return Verdict(path=path, family=family, networks=networks)


def _has_tokenizer(path: Path, checkpoint: Checkpoint) -> bool:
    root = root_of(path)
    folders = () if root is None else (root / "tokenizer", root / "tokenizer_2")
    return "headstart.tokenizer" in checkpoint.metadata or any(map(Path.is_dir, folders))


_NO_ENCODER = frozenset({"text_projection.weight"})
"""What key maps and training leave of a text encoder (github.com/ostris/ai-toolkit, keymaps)."""


def _nothing(checkpoint: Checkpoint, parts: Mapping[PartName, Part]) -> str:
    """What a file without a network holds, where its shapes or names tell."""
    if parts:
        return f"{NO_NETWORK}: a text encoder's projection alone is none"
    shapes = [*checkpoint.shapes.values()]
    if shapes and all(len(s) in (2, 3) and s[-2] == CLIP_POSITIONS for s in shapes):
        return (
            f"an encoded prompt {list(shapes[0])}, no network: give such a tensor to "
            "Engine.sample(cond=) in Python"
        )
    return NO_NETWORK


def _bare(error: CheckpointError, path: Path, checkpoint: Checkpoint) -> str:
    """The message without the path that it begins with, which is said anyway."""
    return str(error).removeprefix(f"{path}: ").removeprefix(f"{checkpoint.files[0]}: ")


def _is_beside(kind: Kind, parts: Mapping[PartName, Part]) -> bool:
    """Whether there is a network of ours too: a ControlNet's own tensors are half of a UNet's."""
    unet = parts.get("unet")
    whole = unet is None or any(name.startswith("up_blocks.") for name in unet.shapes)
    return kind.beside and bool(parts) and whole


def _left(checkpoint: Checkpoint, allow: Collection[str]) -> str | None:
    """What lies in the file and belongs to none of its networks, unless it is let be."""
    strays = checkpoint.split().get("", {}).values()
    left = sorted(name for name in strays if not is_allowed(name, allow))
    if not left:
        return None
    kind = kind_of(left)
    if kind is not None and len(signs(kind, left)) == len(left):
        pattern = left[0].partition(".")[0] + ".*"
        return (
            f"{len(left)} tensors of {kind.what} lie beside its networks ({some(left)}): "
            f"{kind.fix}; `--allow '{pattern}'` (allow=) lets them be, and the rest is loaded"
        )
    return (
        f"{len(left)} tensors of the file belong to no network: {some(left)}. `--allow NAME` "
        "(allow=, `*` for any text) lets such tensors be, if they may be missing"
    )


def _second(path: Path, second: Checkpoint, given: Overrides) -> Part:
    """The text encoder in a folder of its own; from inside, both look alike."""
    parts = second.parts()
    if (problem := _left(second, given.allow)) is not None:
        raise CheckpointError(f"text_encoder_2: {problem}")
    if "text" not in parts:
        raise CheckpointError(f"{path}: text_encoder_2: {NO_NETWORK}")
    return replace(parts["text"], name="text_2")


def notes_of(networks: Mapping[PartName, NetworkInfo]) -> Iterator[str]:
    """What to know of networks that load: halves of them, and whose latents they are."""
    networks = {name: judged for name, judged in networks.items() if judged.problem is None}
    if "vae" in networks and (params := networks["vae"].vae) is not None:
        if not params.encodes:
            yield "vae: a decoder alone, which makes pictures and cannot encode them"
        if params.latent_channels != 4:
            yield (
                f"vae: {params.latent_channels}-channel latents, as SD3 and Flux have; the "
                "families here have 4"
            )
    if "tiny" in networks and len(halves := networks["tiny"].tiny) == 1:
        half = next(iter(halves))
        use = "for --preview" if half == "decoder" else "which --preview has no use for"
        yield f"tiny: the {half} alone, {use}"


def next_of(path: Path, verdict: Verdict, networks: Mapping[PartName, NetworkInfo]) -> str:
    """The options that take such a file, with the arguments that it needs."""
    file = foreign.quoted(path)
    if verdict.what is not None:
        return f"{'--lora' if verdict.what == ADAPTER else '--embedding'} {file}"
    needs = dict.fromkeys(need for judged in networks.values() for need in judged.needs)
    options = dict.fromkeys(need.option for need in needs if need.option.startswith("--"))
    more = f" with {' and '.join(options)}" if options else ""
    if "unet" in networks:
        whole = "" if len(networks) > 1 else ", with a full model as the other"
        return f"--base {file} or --distilled {file}{more}{whole}"
    if "vae" in networks:
        params = networks["vae"].vae
        return f"--vae {file}" if params is None or params.latent_channels == 4 else _IN_PYTHON
    if "tiny" in networks:
        return f"--preview {file}" if "decoder" in networks["tiny"].tiny else _ENCODER
    return f"--text {file}{more}"


_IN_PYTHON = "headstart.load_vae(FILE) in Python: no UNet here has such latents"
_ENCODER = "headstart.networks.load.load_tiny(FILE).encode in Python: --preview wants the decoder"
