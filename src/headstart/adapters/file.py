"""An adapter's file: which form it has, and what it changes in our networks.

read_adapter(path) -> AdapterFile          names and header only
AdapterFile.resolve(networks) -> Resolved  every tensor checked, every layer a LowRank or a Dense
Adapters are untrusted input: they are read through `checkpoint.header`, as checkpoints are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from torch import nn

from headstart.adapters.delta import Delta, LowRank
from headstart.adapters.group import Group, Grouping, grouped
from headstart.adapters.names import AdapterForm, Network, Places
from headstart.adapters.peft_scale import PeftScale, peft_scales
from headstart.checkpoint.embeddings import Token, beside_layers, tokens_of
from headstart.checkpoint.families import CONTEXT_WIDTHS
from headstart.checkpoint.header import read_json
from headstart.checkpoint.tensors import Checkpoint
from headstart.errors import AdapterError, CheckpointError

Shape = tuple[int, ...]
Networks = Mapping[Network, Mapping[str, Shape]]
"""Network -> module path -> the shape of its weight."""


class Mismatch(NamedTuple):
    """A module of the file whose layer has another shape: `expected` is ours, `came` the file's."""

    name: str
    expected: Shape
    came: Shape


class Match(NamedTuple):
    """Where the modules of a file go, from names and shapes alone.

    owners      layer -> the module that changes it; mismatched, unmatched: as in `Resolved`
    """

    owners: Mapping[tuple[Network, str], Group]
    mismatched: tuple[Mismatch, ...]
    unmatched: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What a file changes: one delta a layer, and everything of the file that found no layer.

    deltas      (network, module path) -> LowRank | Dense
    matched     keys of the file that went into deltas
    mismatched  modules whose layer exists with another shape
    unmatched   keys that mean no layer of these networks
    rank        the largest rank of a low-rank delta; 0 where there is none
    """

    deltas: Mapping[tuple[Network, str], Delta]
    form: AdapterForm
    rank: int
    matched: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    unmatched: tuple[str, ...] = ()

    def require(self, allow: Collection[str] = ()) -> Resolved:
        """Itself, if the whole file found its place or what did not is allowed by name.

        `allow` holds names of modules or keys as the file spells them, `*` and `?` for any text:
        `lora_te_*`, or `*` for everything. Raises AdapterError listing each group that is left.
        """
        odd = {
            "of another shape": [
                f"{name} {list(came)} instead of {list(expected)}"
                for name, expected, came in self.mismatched
                if not allowed(name, allow)
            ],
            "unknown here": [name for name in self.unmatched if not allowed(name, allow)],
        }
        lines = [f"{len(names)} {what}: {', '.join(names)}" for what, names in odd.items() if names]
        if lines:
            raise AdapterError(
                f"{len(self.matched)} keys of the adapter ({self.form.value}) fit, but "
                f"{'; '.join(lines)}. Attach it to the network it was made for, or allow these by "
                "name"
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter as its header tells: nothing but names and shapes has been read.

    grouping  its modules; the same object for files of the same names, dtypes and shapes
    tokens    learned tokens that lie beside them: OneTrainer's, ai-toolkit's, cloneofsimo's
    no_tokens why those that lie there cannot be used, where that is so
    """

    path: Path
    form: AdapterForm
    checkpoint: Checkpoint
    grouping: Grouping
    scales: Mapping[Network | None, PeftScale]
    tokens: tuple[Token, ...] = ()
    no_tokens: str | None = None

    @property
    def groups(self) -> Mapping[str, Group]:
        return self.grouping.groups

    @property
    def strays(self) -> tuple[str, ...]:
        """Keys that no naming knows."""
        tokens = beside_layers(self.checkpoint)
        return tuple(key for key in self.grouping.strays if key not in tokens)

    def resolve(self, networks: Networks, match: Match | None = None) -> Resolved:
        """What changes in `networks`, {network: {module path: shape of its weight}}.

        Tensors are read, checked to be finite, and kept in the file's dtype. `match` is that of
        another file of the same grouping on the same networks. Raises AdapterError as `match`
        does, and for a NaN or a bad alpha.
        """
        match = match or self.match(networks)
        try:
            deltas: dict[tuple[Network, str], Delta] = {
                layer: group.delta(self.checkpoint, networks[layer[0]][layer[1]], self.scales)
                for layer, group in match.owners.items()
            }
        except AdapterError as error:
            raise AdapterError(f"{self.path}: {error}") from error
        ranks = [delta.rank for delta in deltas.values() if isinstance(delta, LowRank)]
        return Resolved(
            deltas=deltas,
            form=self.form,
            rank=max(ranks, default=0),
            matched=tuple(key for group in match.owners.values() for key in group.slots.values()),
            mismatched=match.mismatched,
            unmatched=match.unmatched,
        )

    def match(self, networks: Networks) -> Match:
        """Find every module's layer; no tensor is read.

        Raises AdapterError for two modules for one layer, alphas in some modules only, an adapter
        of another family, one that fits nothing, and one that leaves a UNet that was given
        untouched.
        """
        self._check_alphas()
        owners: dict[tuple[Network, str], Group] = {}
        mismatched: list[Mismatch] = []
        unmatched = list(self.strays)
        for group, layer in self._layers(networks):
            if layer is None:
                unmatched += group.slots.values()
            elif not group.fits(networks[layer[0]][layer[1]]):
                expected = networks[layer[0]][layer[1]]
                mismatched.append(Mismatch(group.name, expected, group.shape()))
            elif layer in owners:
                raise AdapterError(
                    f"{self.path}: {owners[layer].name!r} and {group.name!r} are both {layer[1]} "
                    f"of the {layer[0]}: expected each layer once; remove one of them"
                )
            else:
                owners[layer] = group
        self._check_found(networks, owners, mismatched)
        return Match(owners, tuple(mismatched), tuple(unmatched))

    def _layers(self, networks: Networks) -> Iterator[tuple[Group, tuple[Network, str] | None]]:
        """Each module with its layer: a fitting one where its name can mean several."""
        places = Places(networks)
        for group in self.groups.values():
            found = places.find(group.network, group.module, group.name)
            fitting = [place for place in found if group.fits(networks[place[0]][place[1]])]
            yield group, next(iter(fitting or found), None)

    @property
    def family(self) -> str | None:
        """The lineage whose text is as wide as the adapter's cross-attention; None if unchanged."""
        widths = {
            group.shape()[1]
            for group in self.groups.values()
            if _reads_text(group.module) and len(group.shape()) > 1
        }
        return CONTEXT_WIDTHS.get(widths.pop()) if len(widths) == 1 else None

    def _check_alphas(self) -> None:
        """All modules of a file have an alpha, or none: then the scale is 1."""
        scaled = [group for group in self.groups.values() if group.takes_alpha]
        without = [group.name for group in scaled if "alpha" not in group.slots]
        if without and len(without) < len(scaled):
            raise AdapterError(
                f"{self.path}: {len(without)} of {len(scaled)} modules have no alpha "
                f"({without[0]}, ...): expected one in each, or in none (then the scale is 1); the "
                "file is torn, fetch it again"
            )

    def _check_found(
        self,
        networks: Networks,
        owners: Mapping[tuple[Network, str], Group],
        mismatched: list[Mismatch],
    ) -> None:
        where = " and ".join(networks) or "no network"
        misfit = next((m for m in mismatched if _reads_text(m.name)), None)
        if misfit is not None and self.family is not None:
            theirs = CONTEXT_WIDTHS.get(misfit.expected[-1], "another family")
            raise AdapterError(
                f"{self.path}: expected an adapter for {theirs}, got one for {self.family}: "
                f"{misfit.name} is {list(misfit.came)}, the layer {list(misfit.expected)}; "
                f"attach it to a model of {self.family}"
            )
        if not owners:
            example = next(iter(self.groups.values()))
            raise AdapterError(
                f"{self.path}: none of its {len(self.groups)} modules ({self.form.value}, such as "
                f"{example.name}) fits {where}; attach it to the network it was made for"
            )
        if "unet" in networks and not any(network == "unet" for network, _ in owners):
            kinds = Counter(network for network, _ in owners)
            raise AdapterError(
                f"{self.path}: expected changes of the UNet, got only the text encoder's "
                f"({', '.join(f'{n} in {k}' for k, n in kinds.items())}): nothing would be steered "
                "between base and distilled"
            )


def layer_shapes(network: nn.Module) -> dict[str, Shape]:
    """Module path -> shape of its weight: what `AdapterFile.resolve` wants to know of a network."""
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in network.state_dict().items()
        if name.endswith(".weight")
    }


def read_adapter(path: str | Path) -> AdapterFile:
    """An adapter's names and shapes, from a safetensors file or a folder as PEFT saves it.

    Raises AdapterError for a file that cannot be read, a pickle (`headstart convert` makes a
    safetensors file of it), a checkpoint, an empty file, and one in no known form.
    """
    path = Path(path)
    try:
        checkpoint = Checkpoint.open(path)
        parts = [part for part in checkpoint.parts() if part != "tiny"]
        config = (path if path.is_dir() else path.parent) / "adapter_config.json"
        beside = read_json(config) if config.is_file() else {}
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    if not checkpoint.names:
        raise AdapterError(f"{path}: expected an adapter, got a file without tensors")
    if parts:
        raise AdapterError(
            f"{path}: expected an adapter, got a checkpoint ({', '.join(parts)}): give it as "
            "--base or --distilled, or make a difference of it with `headstart transfer`"
        )
    layout = tuple((name, *checkpoint.entry(name)[:2]) for name in checkpoint.names)
    try:
        grouping = grouped(layout)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    groups, strays = grouping
    if not groups:
        raise AdapterError(
            f"{path}: expected the keys of a LoRA, LoHa, LoKr or full difference, got "
            f"{', '.join(strays[:3])}{', ...' if len(strays) > 3 else ''}"
        )
    tokens, no_tokens = _tokens(path, checkpoint)
    return AdapterFile(
        path=path,
        form=_form(groups),
        checkpoint=checkpoint,
        grouping=grouping,
        scales=peft_scales(checkpoint.metadata, beside if _is_peft(groups) else {}, path),
        tokens=tokens,
        no_tokens=no_tokens,
    )


def _tokens(path: Path, checkpoint: Checkpoint) -> tuple[tuple[Token, ...], str | None]:
    """The learned tokens beside the layers, or why there are none of those that lie there."""
    keys = beside_layers(checkpoint)
    try:
        return (tokens_of(path, checkpoint, keys=keys), None) if keys else ((), None)
    except CheckpointError as error:
        return (), str(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """What an adapter's header tells.

    family    lineage whose text its cross-attention reads; None where it does not change that
    ranks     smallest and largest rank of its low-rank factors; None where there are none
    modules   number of changed modules: unet, text, text_2, and "" where names do not say which
    dtype     the dtype most bytes have
    strays    keys that no naming knows
    tokens    learned tokens that prompts know while it is attached
    """

    path: str
    form: str
    family: str | None
    ranks: tuple[int, int] | None
    modules: Mapping[str, int]
    dtype: str
    size_bytes: int
    tensors: int
    strays: tuple[str, ...]
    tokens: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def describe_adapter(path: str | Path) -> AdapterInfo:
    """Triage of an adapter from its header: no tensor is read. Raises AdapterError."""
    file = read_adapter(path)
    checkpoint = file.checkpoint
    ranks = [group.rank for group in file.groups.values() if group.rank is not None]
    return AdapterInfo(
        path=str(path),
        form=file.form.value,
        family=file.family,
        ranks=(min(ranks), max(ranks)) if ranks else None,
        modules=dict(Counter(group.network or "" for group in file.groups.values())),
        dtype=checkpoint.dtype,
        size_bytes=checkpoint.size_bytes,
        tensors=len(checkpoint.names),
        strays=file.strays if file.no_tokens is None else file.grouping.strays,
        tokens=tuple(token.name for token in file.tokens),
    )


# What a layer computes names the file before how its keys are spelled does.
_FORMS = (
    *(AdapterForm.DORA, AdapterForm.LOHA, AdapterForm.LOKR, AdapterForm.PEFT),
    *(AdapterForm.DIFFUSERS_PREFIXED, AdapterForm.DIFFUSERS_PROCESSOR, AdapterForm.DIFFUSERS),
    *(AdapterForm.CLONEOFSIMO, AdapterForm.KOHYA, AdapterForm.CUSTOM_DIFFUSION, AdapterForm.FULL),
)
_CONVOLUTIONS = re.compile(r".*(conv|skip_connection|emb_layers|in_layers|out_layers|time_emb).*")
_SLIDER_MODULES = re.compile(r".*(_attn[12]_to_|_resnets_|samplers_).*")


def _form(groups: Mapping[str, Group]) -> AdapterForm:
    """A Concept Slider touches attention and resnets of the UNet, never what is around them."""
    present = frozenset[AdapterForm]().union(*(group.forms for group in groups.values()))
    form = next(form for form in _FORMS if form in present)
    if form is not AdapterForm.KOHYA:
        return form
    if all(g.network == "unet" and _SLIDER_MODULES.fullmatch(g.module) for g in groups.values()):
        return AdapterForm.SLIDER
    convolves = any(_CONVOLUTIONS.fullmatch(group.module) for group in groups.values())
    return AdapterForm.LOCON if convolves else AdapterForm.KOHYA


def _is_peft(groups: Mapping[str, Group]) -> bool:
    """Whether an `adapter_config.json` beside the file can be its own."""
    own = {AdapterForm.PEFT, AdapterForm.LOHA, AdapterForm.LOKR}
    return any(group.forms & own for group in groups.values())


def _reads_text(module: str) -> bool:
    return module.replace(".", "_").endswith(("attn2_to_k", "attn2_to_v"))


def allowed(name: str, allow: Collection[str]) -> bool:
    """Whether a module or key may find no place: `*` and `?` in a pattern are any text."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in allow)
