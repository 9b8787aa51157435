"""What a file changes in the networks of an engine: network -> layer -> change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headstart.adapters.delta import Delta, LowRank
from headstart.adapters.hooks import Host
from headstart.adapters.kinds import WHOLE
from headstart.adapters.layers import Layer
from headstart.adapters.merged_weights import in_place
from headstart.adapters.resolution import Resolution
from headstart.errors import AdapterError
from headstart.networks.casting import weight_of

Hosts = Mapping[str, Host]


def deltas_of(
    resolutions: Mapping[str, Resolution], models: Hosts, texts: Hosts
) -> dict[Host, Mapping[str, Delta]]:
    """Host -> layer -> change, from model -> resolution. The text encoders serve all models, so the
    resolution of any model has their changes.

    Raises AdapterError where weights are not in memory.
    """
    deltas: dict[Host, Mapping[str, Delta]] = {}
    for model, resolution in resolutions.items():
        for network, host in {"unet": models[model], **texts}.items():
            layers = {path: d for (name, path), d in resolution.deltas.items() if name == network}
            if layers:
                _check_in_memory(model, [host.layers[path] for path in layers])
                deltas[host] = {p: _attachable(models, host, p, d) for p, d in layers.items()}
    return deltas


def _attachable(models: Hosts, host: Host, path: str, delta: Delta) -> Delta:
    """Whole weights as a difference from the base they were tuned on, so that they transfer. A
    grouped convolution has no low-rank path, so its change becomes dense."""
    if isinstance(delta, LowRank):
        return delta.dense() if getattr(host.layers[path], "groups", 1) != 1 else delta
    if delta.kind is not WHOLE:
        return delta
    base = models.get("base")
    of_base = host in models.values() and base is not None and path in base.layers
    source = base if of_base and base is not None else host
    layer = source.layers[path]
    with in_place(source.module):
        return delta.relative_to(weight_of(layer), layer.bias)


def _check_in_memory(model: str, layers: Sequence[Layer]) -> None:
    if any(layer.weight.is_meta for layer in layers):
        raise AdapterError(
            f"attaching to the {model} model: its weights are elsewhere between calls, as "
            "enable_sequential_cpu_offload keeps them, and an adapter is made beside them: attach "
            "to a network that is in memory, such as with enable_model_cpu_offload"
        )
