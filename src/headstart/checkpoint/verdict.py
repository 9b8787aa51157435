"""What a file is and whether it can be loaded: for `inspect` and for every loader.

file -> its kind, its networks (`network_info`), or one sentence why it cannot be loaded
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from headstart.checkpoint import foreign
from headstart.checkpoint.embeddings import EmbeddingInfo, describe_embedding
from headstart.checkpoint.families import Family
from headstart.checkpoint.fit import first_few
from headstart.checkpoint.folder import COMPONENTS, root_of
from headstart.checkpoint.keymap import PartName
from headstart.checkpoint.kinds import STEERS, Kind, kind_of
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
    """The verdict on a file, or on a component of a folder.

    what      `ADAPTER` or `EMBEDDING`, if it is one
    networks  the networks in it; embedding: the tokens of a textual inversion
    problem   what is wrong with the file as a whole, so that nothing of it can be loaded
    """

    path: Path
    family: Family | None = None
    what: str | None = None
    embedding: EmbeddingInfo | None = None
    networks: Mapping[PartName, NetworkInfo] = field(default_factory=dict[PartName, NetworkInfo])
    problem: str | None = None

    def require(self, name: PartName, *, needs: bool = True) -> NetworkInfo:
        """That network, ready to be loaded. Raises CheckpointError with the reason if it is not.

        `needs`: also raise if the caller must give an option (`NetworkInfo.needs`).
        """
        network = self._network(name)
        if (refusal := self.refusal(name)) is not None:
            error = CheckpointError(f"{self.path}: {refusal}")
            for note in () if network is None else network.details:
                error.add_note(note)
            raise error
        assert network is not None
        if needs and network.needs:
            raise CheckpointError(f"{self.path}: {network.needs[0].error}")
        return network

    def refusal(self, name: PartName) -> str | None:
        """Why that network cannot be loaded: the file's problem, its absence, or its own."""
        if self.problem is not None:
            return self.problem
        if (network := self._network(name)) is not None:
            return network.problem
        return f"expected a {TITLES[name]}, found {self._contents()}"

    def problems(self) -> tuple[str, ...]:
        """The file's problem, else those of its networks."""
        if self.problem is not None:
            return (self.problem,)
        problems = (network.problem for network in self.networks.values())
        return tuple(dict.fromkeys(problem for problem in problems if problem is not None))

    def _network(self, name: PartName) -> NetworkInfo | None:
        """A text encoder whose prefix names the second may be the only one in its file."""
        lone = name == "text" and name not in self.networks
        return self.networks.get("text_2" if lone else name)

    def _contents(self) -> str:
        """What the file holds and which option takes it, for the end of an error message."""
        if self.what is not None:
            return f"{self.what}: {FIXES[self.what]}"
        option_of = {"unet": "--base or --distilled", "tiny": "--preview", "text_2": "--text"}
        options = dict.fromkeys(option_of.get(part, f"--{part}") for part in self.networks)
        titles = ", ".join(TITLES[part] for part in self.networks)
        return f"{titles}: give such a file as {', '.join(options)}"


def judge(
    path: str | Path,
    checkpoint: Checkpoint,
    overrides: Overrides | None = None,
    *,
    second: Checkpoint | None = None,
) -> Verdict:
    """The verdict on an open file or component; `second`: its folder's second text encoder.

    Reads headers, and the few numbers by which a file describes itself. Never raises for the
    content of the file: that becomes `problem`.
    """
    path = Path(path)
    try:
        return _judge(path, checkpoint, overrides or Overrides(), second)
    except CheckpointError as error:
        folder = checkpoint.files[0].parent
        inside = folder.parent == path and folder.name in COMPONENTS.values()
        problem = _without_path(error, path, checkpoint)
        return Verdict(path=path, problem=f"{folder.name}: {problem}" if inside else problem)


def _judge(
    path: Path, checkpoint: Checkpoint, overrides: Overrides, second: Checkpoint | None
) -> Verdict:
    if (embedding := describe_embedding(path, checkpoint)) is not None:
        return Verdict(path=path, what=EMBEDDING, embedding=embedding)
    kind = kind_of(checkpoint.names)
    steers = kind is not None and kind.fix == STEERS
    if "adapter" in checkpoint.split() and not steers:  # also of another architecture
        return Verdict(path=path, what=ADAPTER)
    parts = checkpoint.parts()
    if kind is not None and not _is_beside(kind, parts):
        raise CheckpointError(f"{kind.what}: {kind.fix}")
    if all(part.shapes.keys() <= _NO_ENCODER for part in parts.values()):
        raise CheckpointError(_no_network(checkpoint, parts))
    _check_claimed(checkpoint, overrides.allow)
    checkpoint.check_numbers()
    if second is not None and "text" in parts:
        second.check_numbers()
        parts["text_2"] = _second(path, second, overrides)
    family = family_of(path, checkpoint)
    networks: dict[PartName, NetworkInfo] = {}

    def add(name: PartName, judge_part: Callable[[Part], NetworkInfo]) -> None:
        if name in parts:
            try:
                networks[name] = judge_part(parts[name])
            except CheckpointError as error:
                problem = f"the {TITLES[name]}: {_without_path(error, path, checkpoint)}"
                networks[name] = NetworkInfo(part=parts[name], problem=problem)

    add("unet", lambda part: judge_unet(part, family, overrides))
    add("vae", lambda part: judge_vae(part, vae_family(path, part), overrides))
    root = root_of(path)
    folders = () if root is None else (root / "tokenizer", root / "tokenizer_2")
    tokenizer = overrides.tokenizer or "headstart.tokenizer" in checkpoint.metadata
    tokenizer = tokenizer or any(map(Path.is_dir, folders))
    networks |= judge_texts(parts, family, replace(overrides, tokenizer=tokenizer))
    add("tiny", lambda part: judge_tiny(part, overrides))
    return Verdict(path=path, family=family, networks=networks)


_NO_ENCODER = frozenset({"text_projection.weight"})
"""All that key maps have of a text encoder (github.com/ostris/ai-toolkit, keymaps)."""


def _no_network(checkpoint: Checkpoint, parts: Mapping[PartName, Part]) -> str:
    """The problem of a file without a network, with what it is if its shapes show that."""
    if parts:
        return f"{NO_NETWORK}: a text encoder's projection alone is none"
    shapes = [*checkpoint.shapes.values()]
    if shapes and all(len(s) in (2, 3) and s[-2] == CLIP_POSITIONS for s in shapes):
        return (
            f"an encoded prompt {list(shapes[0])}, no network: give such a tensor to "
            "Engine.sample(cond=) in Python"
        )
    return NO_NETWORK


def _without_path(error: CheckpointError, path: Path, checkpoint: Checkpoint) -> str:
    """The message without the path at its start, which is added later."""
    return str(error).removeprefix(f"{path}: ").removeprefix(f"{checkpoint.files[0]}: ")


def _is_beside(kind: Kind, parts: Mapping[PartName, Part]) -> bool:
    """Whether the file has a whole network too: a ControlNet has half of a UNet's tensors."""
    unet = parts.get("unet")
    is_complete = unet is None or any(name.startswith("up_blocks.") for name in unet.shapes)
    return kind.beside and bool(parts) and is_complete


def _check_claimed(checkpoint: Checkpoint, allow: Collection[str], where: str = "") -> None:
    """Raise CheckpointError for tensors that belong to no network and are not allowed."""
    strays = checkpoint.split().get("", {}).values()
    names = sorted(name for name in strays if not is_allowed(name, allow))
    if not names:
        return
    kind = kind_of(names)
    if kind is not None and all(map(kind.sign.search, names)):
        pattern = names[0].partition(".")[0] + ".*"
        raise CheckpointError(
            f"{where}{len(names)} tensors of {kind.what} lie beside its networks "
            f"({first_few(names)}): {kind.fix}; `--allow '{pattern}'` (allow=) lets them be, and "
            "the rest is loaded"
        )
    raise CheckpointError(
        f"{where}{len(names)} tensors of the file belong to no network: {first_few(names)}. "
        "`--allow NAME` (allow=, `*` for any text) lets such tensors be, if they may be missing"
    )


def _second(path: Path, second: Checkpoint, overrides: Overrides) -> Part:
    """The text encoder of the folder text_encoder_2: its file looks like that of the first."""
    parts = second.parts()
    _check_claimed(second, overrides.allow, "text_encoder_2: ")
    if "text" not in parts:
        raise CheckpointError(f"{path}: text_encoder_2: {NO_NETWORK}")
    return replace(parts["text"], name="text_2")


def notes_of(networks: Mapping[PartName, NetworkInfo]) -> Iterator[str]:
    """Notes on networks that can be loaded: half autoencoders, and unusual latents."""
    networks = {name: network for name, network in networks.items() if network.problem is None}
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
    """The options that take the file, with other options that it needs."""
    file = foreign.quoted(path)
    if verdict.what is not None:
        return f"{'--lora' if verdict.what == ADAPTER else '--embedding'} {file}"
    needs = dict.fromkeys(need for network in networks.values() for need in network.needs)
    options = dict.fromkeys(need.option for need in needs if need.option.startswith("--"))
    more = f" with {' and '.join(options)}" if options else ""
    if "unet" in networks:
        other = "" if len(networks) > 1 else ", with a full model as the other"
        return f"--base {file} or --distilled {file}{more}{other}"
    if "vae" in networks:
        params = networks["vae"].vae
        return f"--vae {file}" if params is None or params.latent_channels == 4 else _IN_PYTHON
    if "tiny" in networks:
        return f"--preview {file}" if "decoder" in networks["tiny"].tiny else _ENCODER
    return f"--text {file}{more}"


_IN_PYTHON = "headstart.load_vae(FILE) in Python: no UNet here has such latents"
_ENCODER = "headstart.networks.load.load_tiny(FILE).encode in Python: --preview wants the decoder"
