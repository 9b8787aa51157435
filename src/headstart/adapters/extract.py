"""A fine-tune as a low-rank adapter: the first R singular vectors of T - B, layer by layer.

M = T - B as [o, i*kh*kw] = U S V^T     up = U_R sqrt(S_R)     down = sqrt(S_R)^-1 U_R^T M
captured energy = sum_{r<R} S_r^2 / sum S_r^2 = |up @ down|^2 / |M|^2    (Eckart & Young, 1936)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from headstart.adapters.delta import LowRank
from headstart.adapters.names import Network
from headstart.adapters.transfer import DTYPES, check_request, open_parts
from headstart.checkpoint.folder import COMPONENTS
from headstart.checkpoint.tensors import Part
from headstart.convert.container import Slot, write
from headstart.errors import CheckpointError, InputError
from headstart.output import writing

Naming = Literal["kohya", "diffusers"]
NAMINGS: tuple[Naming, ...] = get_args(Naming)
_PREFIXES: dict[Naming, dict[Network, str]] = {
    "kohya": {"unet": "lora_unet_", "text": "lora_te1_", "text_2": "lora_te2_"},
    "diffusers": {"unet": "unet.", "text": "text_encoder.", "text_2": "text_encoder_2."},
}

OnLayer = Callable[[str], object]


class Captured(NamedTuple):
    """One layer: which part of its squared difference the adapter has, and how large that is."""

    network: Network
    module: str
    rank: int
    energy: float
    square: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """What was written; energies are before the factors are rounded to the file's dtype.

    energy      captured, of all layers together
    layers      each changed layer
    left_out    changed tensors that are no layer's weight: biases, norms, embeddings
    left_share  their part of the whole squared difference
    """

    target: str
    naming: Naming
    rank: int
    energy: float
    left_share: float
    layers: tuple[Captured, ...]
    left_out: tuple[str, ...]
    size_bytes: int

    def to_json(self) -> dict[str, object]:
        fields: dict[str, object] = asdict(self)
        return fields | {"layers": [layer._asdict() for layer in self.layers]}


def extract(
    base: str | Path,
    tuned: str | Path,
    target: str | Path,
    *,
    rank: int,
    strength: float = 1.0,
    distilled: str | Path | None = None,
    parts: Sequence[Network] = ("unet",),
    naming: Naming = "kohya",
    overwrite: bool = False,
    on_layer: OnLayer = lambda _: None,
) -> Extraction:
    """Write strength*(T - B) as a LoRA of rank `rank`, or less where a layer is smaller than that.

    It is the nearest of that rank in squared error, layer by layer, found in float64 from the
    smaller Gram matrix. The file has float16 or bfloat16 if the tuned checkpoint has, else float32.
    A distilled model, if given, is only checked to have the same layers.

    Raises as `headstart.adapters.transfer.transfer` does, and CheckpointError if nothing differs.
    """
    sources = [Path(path) for path in (base, tuned, distilled) if path is not None]
    target = Path(target)
    if rank < 1:
        raise InputError(f"rank must be at least 1, got {rank}")
    if naming not in NAMINGS:
        raise InputError(f"naming {naming!r:.40}: expected one of {', '.join(NAMINGS)}")
    check_request(sources, target, parts, overwrite)
    tensors: dict[str, Tensor] = {}
    layers: list[Captured] = []
    skipped: dict[str, float] = {}
    for network in parts:
        first, second = open_parts(sources, network)[:2]
        prefix = _prefix(naming, network, sources[0], first)
        dtype = DTYPES.get(second.checkpoint.dtype, torch.float32)
        dtype = torch.float32 if dtype == torch.float64 else dtype
        for name in first.shapes:
            change = second.tensor(name).double() - first.tensor(name).double()
            square = float(change.square().sum())
            if not square < float("inf"):
                raise CheckpointError(f"{name}: expected finite numbers, got NaN or infinity")
            if square == 0:
                continue
            if not _is_layer(name, change):
                skipped[f"{network} {name}"] = square
                continue
            module = name.removesuffix(".weight")
            factors, energy = nearest(change, rank)
            factors = factors._replace(up=strength * factors.up)
            layers.append(Captured(network, module, factors.rank, energy, square))
            tensors |= _layer_tensors(naming, prefix, module, factors, dtype)
            on_layer(module)
    if not layers:
        raise CheckpointError(f"{tuned}: expected other weights than in {base}, got the same")
    total = sum(layer.square for layer in layers)
    return Extraction(
        target=str(target),
        naming=naming,
        rank=rank,
        energy=sum(layer.energy * layer.square for layer in layers) / total,
        left_share=sum(skipped.values()) / (total + sum(skipped.values())),
        layers=tuple(layers),
        left_out=tuple(skipped),
        size_bytes=_write(target, tensors),
    )


def nearest(change: Tensor, rank: int) -> tuple[LowRank, float]:
    """The nearest change of that rank and the energy it captures; float64 [o, i(, kh, kw)].

    The eigenvectors of M M^T (or M^T M, whichever is smaller) are M's singular vectors. Forming it
    loses singular values below 1e-8 of the largest, which have no energy to speak of.
    """
    matrix = change.double().flatten(1)
    tall = matrix.shape[0] > matrix.shape[1]
    gram = matrix.T @ matrix if tall else matrix @ matrix.T
    squares, vectors = cast(
        "tuple[Tensor, Tensor]",
        torch.linalg.eigh(gram),  # pyright: ignore[reportUnknownMemberType]
    )
    squares, vectors = squares.clamp(min=0).flip(0), vectors.flip(1)[:, :rank]
    roots = squares[: vectors.shape[1]].sqrt().clamp(min=1e-300).sqrt()
    if tall:
        up, down = (matrix @ vectors) / roots, (vectors * roots).T
    else:
        up, down = vectors * roots, (vectors / roots).T @ matrix
    energy = float(squares[:rank].sum() / squares.sum())
    return LowRank(down.reshape(-1, *change.shape[1:]), up, 1.0), energy


def _is_layer(name: str, change: Tensor) -> bool:
    return name.endswith(".weight") and change.ndim in (2, 4) and ".embeddings." not in name


def _prefix(naming: Naming, network: Network, base: Path, part: Part) -> str:
    """Kohya writes `lora_te_` where there is one text encoder, `lora_te1_` where there are two."""
    two = "text_2" in part.checkpoint.parts() or (base / COMPONENTS["text_2"]).is_dir()
    prefix = _PREFIXES[naming][network]
    return prefix if two or naming != "kohya" or network != "text" else "lora_te_"


def _layer_tensors(
    naming: Naming, prefix: str, module: str, factors: LowRank, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The layer's tensors as the naming has them; alpha is the rank, so the scale is 1."""
    down, up = factors.down.to(dtype), factors.up.to(dtype)
    up = up.reshape(*up.shape, *[1] * (down.ndim - 2))
    if naming == "diffusers":
        return {f"{prefix}{module}.lora_A.weight": down, f"{prefix}{module}.lora_B.weight": up}
    name = prefix + module.replace(".", "_")
    return {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(float(factors.rank), dtype=dtype),
    }


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _write(target: Path, tensors: Mapping[str, Tensor]) -> int:
    def pieces(slot: Slot) -> list[bytes]:
        flat = tensors[slot.name].contiguous().reshape(-1)
        return [flat.view(torch.uint8).numpy().tobytes()]

    slots = (Slot(name, _NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items())
    with writing(target) as partial:
        return write(partial, slots, {}, pieces)
