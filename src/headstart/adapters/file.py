"""An adapter's file: which form it has, and what it changes in our networks.

read_adapter(path) -> AdapterFile          names and header only
AdapterFile.resolve(networks) -> Resolved  every tensor checked, every layer a LowRank or a Dense
Adapters are untrusted input: they are read through `checkpoint.header`, as checkpoints are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from headstart.adapters.delta import Delta
from headstart.adapters.group import Group, Grouping, group_keys
from headstart.adapters.kind import Shape
from headstart.adapters.layer_names import Networks, match_layers
from headstart.adapters.layer_numbers import is_numbered
from headstart.adapters.layers import layers_of
from headstart.adapters.names import AdapterForm, Network, other_family
from headstart.adapters.peft import Peft, read_peft
from headstart.adapters.resolution import Match, Mismatch, Resolution
from headstart.adapters.tuners import tuners_of
from headstart.checkpoint.embeddings import Token, token_keys, tokens_of
from headstart.checkpoint.families import CONTEXT_WIDTHS
from headstart.checkpoint.fit import first_few
from headstart.checkpoint.header import read_json
from headstart.checkpoint.kinds import STEERS, kind_of
from headstart.checkpoint.tensors import Checkpoint
from headstart.errors import AdapterError, CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter's header: names and shapes, no tensor.

    grouping  its modules; the same object for files of the same names, dtypes and shapes
    tokens    learned tokens beside the modules: OneTrainer's, ai-toolkit's, cloneofsimo's
    tokens_problem  why those tokens cannot be used, or None
    """

    path: Path
    form: AdapterForm
    checkpoint: Checkpoint
    grouping: Grouping
    peft: Peft
    tokens: tuple[Token, ...] = ()
    tokens_problem: str | None = None

    @property
    def groups(self) -> Mapping[str, Group]:
        return self.grouping.groups

    @property
    def strays(self) -> tuple[str, ...]:
        """Keys that no naming knows."""
        tokens = token_keys(self.checkpoint)
        return tuple(key for key in self.grouping.strays if key not in tokens)

    def resolve(self, networks: Networks, match: Match | None = None) -> Resolution:
        """The changes of `networks`, {network: {module path: shape of its weight}}.

        Tensors are read, checked to be finite, and keep the file's dtype. `match` may come from
        another file of the same grouping on the same networks. Raises AdapterError as `match`
        does, and for a NaN or a bad alpha.
        """
        match = match or self.match(networks)
        checkpoint = self.checkpoint
        try:
            alphas = {group.name: group.alpha(checkpoint) for group in match.owners.values()}
            deltas: dict[tuple[Network, str], Delta] = {
                layer: group.delta(
                    checkpoint, networks[layer[0]][layer[1]], self.peft, alphas[group.name]
                )
                for layer, group in match.owners.items()
            }
        except AdapterError as error:
            raise AdapterError(f"{self.path}: {error}") from error
        except CheckpointError as error:  # a dtype that is not read, or a bad scale
            raise AdapterError(str(error)) from error
        ranks = [group.rank for group in match.owners.values() if group.rank is not None]
        return Resolution(
            deltas=deltas,
            form=self.form,
            rank=max(ranks, default=0),
            matched=tuple(key for group in match.owners.values() for key in group.slots.values()),
            mismatched=match.mismatched,
            unmatched=match.unmatched,
            notes=self.notes(alphas),
        )

    def notes(self, alphas: Mapping[str, float | None]) -> tuple[str, ...]:
        """Which scales are not in the file, and how they are read; `alphas` by module.

        ComfyUI (weight_adapter/lora.py) and A1111 (Lora/network.py) take a missing alpha for a
        scale of 1; sd-scripts and LyCORIS an alpha of 0, which says "no scaling" when they train.
        """
        scaled = [g for g in self.groups.values() if g.rank is not None]
        without = [
            g.name for g in scaled if "alpha" not in g.slots and not self.peft.has_scale(g.network)
        ]
        zero = [group.name for group in scaled if alphas.get(group.name) == 0]
        modules = {"no alpha": without if len(without) < len(scaled) else [], "an alpha of 0": zero}
        return tuple(
            f"{len(names)} of {len(scaled)} modules have {lack} (such as {names[0]:.120}): their "
            "scale is 1"
            for lack, names in modules.items()
            if names
        )

    def match(self, networks: Networks) -> Match:
        """Find every module's layer; no tensor is read.

        Raises AdapterError for two modules for one layer, an adapter of another family, a name
        that fits two layers equally well, and one that fits nothing.
        """
        owners: dict[tuple[Network, str], Group] = {}
        mismatched: list[Mismatch] = []
        unmatched = list(self.strays)
        try:
            layers = [*match_layers(self.groups.values(), networks)]
        except AdapterError as error:
            raise AdapterError(f"{self.path}: {error}") from error
        for group, layer in layers:
            if layer is None:
                unmatched += group.slots.values()
            elif not group.fits(expected := networks[layer[0]][layer[1]]):
                mismatched.append(Mismatch(group.name, expected, group.sides()))
            elif layer in owners:
                raise AdapterError(
                    f"{self.path}: {owners[layer].name!r} and {group.name!r} are both {layer[1]} "
                    f"of the {layer[0]}: expected each layer once; remove one of them"
                )
            else:
                owners[layer] = group
        self._check_matches(networks, owners, mismatched)
        return Match(owners, tuple(mismatched), tuple(unmatched))

    @property
    def family(self) -> str | None:
        """The lineage whose text is as wide as the adapter's cross-attention; None if unchanged."""
        shapes = (group.sides() for group in self.groups.values() if _is_cross(group))
        widths = {sides[1] for sides in shapes if len(sides) > 1 and sides[1] is not None}
        return CONTEXT_WIDTHS.get(widths.pop()) if len(widths) == 1 else None

    def _check_matches(
        self,
        networks: Networks,
        owners: Mapping[tuple[Network, str], Group],
        mismatched: list[Mismatch],
    ) -> None:
        where = " and ".join(networks) or "no network"
        cross = next((m for m in mismatched if _reads_text(m.name)), None)
        steered = any(network == "unet" for network, _ in owners)
        unet = networks.get("unet", {}).items()
        width = next((shape[-1] for name, shape in unet if _reads_text(name)), 0)
        family, example = CONTEXT_WIDTHS.get(width), ""
        if cross is not None:
            family = CONTEXT_WIDTHS.get(cross.expected[-1], "another family")
            example = f"{cross}; "
        another = not steered and family is not None and self.family != family
        if (cross is not None or another) and self.family is not None:
            raise AdapterError(
                f"{self.path}: expected an adapter for {family}, got one for {self.family}: "
                f"{example}attach it to a model of {self.family}"
            )
        if not steered and (foreign := other_family(self.groups)):
            raise AdapterError(
                f"{self.path}: expected an adapter for {where}, got one for {foreign}, which is "
                "not of the UNet family: attach it to a network of its own family"
            )
        if not owners:
            example = next(iter(self.groups.values())).name
            shaped = f"; {mismatched[0]}" if mismatched else ""
            raise AdapterError(
                f"{self.path}: none of its {len(self.groups)} modules ({self.form.value}, such as "
                f"{example}) fits {where}{shaped}; attach it to the network it was made for"
            )


def layer_shapes(network: nn.Module) -> dict[str, Shape]:
    """Layer -> shape of its weight, for `AdapterFile.resolve`."""
    return {path: tuple(layer.weight.shape) for path, layer in layers_of(network).items()}


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
        config_json = read_json(config) if config.is_file() else {}
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    if not checkpoint.names:
        raise AdapterError(f"{path}: expected an adapter, got a file without tensors")
    layout = tuple((name, *checkpoint.entry(name)[:2]) for name in checkpoint.names)
    try:
        grouping = group_keys(layout)
        settings = config_json if _is_peft(grouping.groups) else {}
        peft = read_peft(checkpoint.metadata, settings, path)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    groups, strays = grouping
    kind = kind_of(checkpoint.names)
    if kind is not None and (kind.fix == STEERS or not groups):
        raise AdapterError(f"{path}: {kind.what}: {kind.fix}")
    if parts and 2 * len(strays) > len(layout):
        raise AdapterError(
            f"{path}: expected an adapter, got a checkpoint ({', '.join(parts)}): give it as "
            "--base or --distilled, or make a difference of it with `headstart transfer`"
        )
    if not groups:
        raise AdapterError(f"{path}: expected {_EXPECTED}, got {_describe_strays(strays)}")
    tokens, tokens_problem = _tokens(path, checkpoint)
    return AdapterFile(
        path=path,
        form=_form(groups),
        checkpoint=checkpoint,
        grouping=grouping,
        peft=peft,
        tokens=tokens,
        tokens_problem=tokens_problem,
    )


def _tokens(path: Path, checkpoint: Checkpoint) -> tuple[tuple[Token, ...], str | None]:
    """The learned tokens beside the layers, or why they cannot be used."""
    keys = token_keys(checkpoint)
    try:
        return (tokens_of(path, checkpoint, keys=keys), None) if keys else ((), None)
    except CheckpointError as error:
        return (), str(error)


_EXPECTED = (
    "an adapter that is computed here (LoRA, LoCon, LoHa, LoKr, DoRA, GLoRA, OFT, BOFT, OFTv2, "
    "(IA)^3, differences, whole weights)"
)


def _describe_strays(strays: Sequence[str]) -> str:
    """The name of a tuner that is not implemented, or some unknown keys."""
    foreign = tuners_of(strays)
    if not foreign:
        return f"the keys {first_few(strays)}"
    title, keys = max(foreign.items(), key=lambda row: len(row[1]))
    return f"{title}, which is not implemented ({first_few(keys)})"


# What a layer computes names the file before how its keys are spelled does.
_KINDS = (
    *(AdapterForm.GLORA, AdapterForm.BOFT, AdapterForm.OFT, AdapterForm.OFT_V2, AdapterForm.IA3),
    *(AdapterForm.LOHA, AdapterForm.LOKR),
)
_NAMINGS = (
    *(AdapterForm.PEFT, AdapterForm.DIFFUSERS_PREFIXED, AdapterForm.DIFFUSERS_PROCESSOR),
    *(AdapterForm.DIFFUSERS, AdapterForm.CLONEOFSIMO, AdapterForm.KOHYA),
    *(AdapterForm.CUSTOM_DIFFUSION, AdapterForm.WHOLE, AdapterForm.FULL),
)
_CONVOLUTIONS = re.compile(r".*(conv|skip_connection|emb_layers|in_layers|out_layers|time_emb).*")
_SLIDER_MODULES = re.compile(r".*(_attn[12]_to_|_resnets_|samplers_).*")


def _form(groups: Mapping[str, Group]) -> AdapterForm:
    """A Concept Slider touches attention and resnets of the UNet, never what is around them."""
    present = frozenset[AdapterForm]().union(*(group.forms for group in groups.values()))
    kinds = {group.kind.form for group in groups.values()}
    if AdapterForm.DORA in present:
        return AdapterForm.DORA
    form = next((form for form in _KINDS if form in kinds), None)
    form = form or next(form for form in _NAMINGS if form in present)
    if form is not AdapterForm.KOHYA:
        return form
    if all(g.network == "unet" and _SLIDER_MODULES.fullmatch(g.module) for g in groups.values()):
        return AdapterForm.SLIDER
    convolves = any(_CONVOLUTIONS.fullmatch(group.module) for group in groups.values())
    return AdapterForm.LOCON if convolves else AdapterForm.KOHYA


def _is_peft(groups: Mapping[str, Group]) -> bool:
    """Whether an `adapter_config.json` beside the file can be its own."""
    forms = {AdapterForm.PEFT, AdapterForm.LOHA, AdapterForm.LOKR, AdapterForm.OFT_V2}
    return any(group.forms & forms for group in groups.values())


def _reads_text(module: str) -> bool:
    return module.replace(".", "_").endswith(("attn2_to_k", "attn2_to_v"))


def _is_cross(group: Group) -> bool:
    """By the name; of a numbered layer by its shape, which is neither square nor [8*c, c]."""
    if not is_numbered(group.name):
        return _reads_text(group.module)
    sides = group.sides()
    if group.network != "unet" or len(sides) != 2 or sides[1] is None:
        return False
    return sides[0] not in (sides[1], 8 * sides[1])
