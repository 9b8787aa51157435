"""The host that HEADSTART_COMFYUI names: a real ComfyUI, for the tests of its nodes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy_host import POOLED, POSITIVE, SHAPE, WIDTH, start
from torch import Tensor

import headstart as hs


class Real:
    """ComfyUI itself, on the CPU."""

    def __init__(self, folder: str) -> None:
        if folder not in sys.path:
            sys.path.insert(0, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import comfy.cli_args

            comfy.cli_args.args.cpu = True
            import comfy.latent_formats
            import comfy.model_base
            import comfy.model_management
            import comfy.model_patcher
            import comfy.supported_models
            import latent_preview
            import nodes  # noqa: F401
            from comfy_extras import nodes_custom_sampler, nodes_model_advanced
        self.comfy, self.previews, self.custom = comfy, latent_preview, nodes_custom_sampler
        self.advanced_nodes = nodes_model_advanced
        self.management = comfy.model_management
        self.interrupted = comfy.model_management.InterruptProcessingException

    def model(self, kind: str, seed: int) -> Any:
        loaded = self._flux() if kind == "flux" else self._unet(kind)
        network = loaded.diffusion_model.eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weights in network.parameters():
                weights.normal_(std=0.1, generator=generator)
            last = network.final_layer.linear if kind == "flux" else network.out[2]
            cond = hs.Conditioning(POSITIVE, self._pooled(loaded, POOLED[0])).expand(SHAPE[0])
            time = torch.full((SHAPE[0],), 500.0)
            last.weight /= self._predicted(loaded, start(9), time, cond).std()  # so that it counts
        cpu = torch.device("cpu")
        return self.comfy.model_patcher.ModelPatcher(loaded, load_device=cpu, offload_device=cpu)

    def _unet(self, kind: str) -> Any:
        config = {
            **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32},
            **{"num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1]},
            **{"transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1},
            **{"context_dim": WIDTH, "num_heads": 4, "num_head_channels": -1},
            **{"use_spatial_transformer": True, "use_linear_in_transformer": kind == "sdxl"},
            **{"adm_in_channels": None, "dtype": torch.float32},
        }
        base, supported = self.comfy.model_base, self.comfy.supported_models
        if kind == "sdxl":
            config |= {"adm_in_channels": 6 * 256 + WIDTH, "num_classes": "sequential"}
            settings = supported.SDXL(config)
            settings.unet_config["num_head_channels"] = 16  # its own 64 are more than are here
            return base.SDXL(settings, device="cpu")
        names = {"eps": "EPS", "v": "V_PREDICTION", "flow": "FLOW", "edm": "EDM", "x0": "EPS"}
        model = base.BaseModel(supported.SD15(config), base.ModelType[names[kind]], device="cpu")
        if kind == "x0":
            sampling = self.comfy.model_sampling
            kinds = (sampling.X0, sampling.ModelSamplingDiscrete)
            model.model_sampling.__class__ = type("X0", kinds, {})
        return model

    def _flux(self) -> Any:
        """With four channels, as the tests' latents have."""
        config = {
            **{"image_model": "flux", "in_channels": 4, "out_channels": 4, "vec_in_dim": WIDTH},
            **{"context_in_dim": WIDTH, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2},
            **{"depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6], "theta": 10000},
            **{"patch_size": 2, "qkv_bias": True, "guidance_embed": False},
            "dtype": torch.float32,
        }
        if "txt_ids_dims" in self.comfy.ldm.flux.model.FluxParams.__dataclass_fields__:
            config["txt_ids_dims"] = []  # in 0.8, not in 0.3.64
        model = self.comfy.model_base.Flux(self.comfy.supported_models.Flux(config), device="cpu")
        model.latent_format = self.comfy.latent_formats.SD15()
        return model

    def _pooled(self, model: Any, pooled: Tensor) -> Tensor | None:
        """What the network is told of the pooled text, and of the size where it is SDXL's."""
        return model.encode_adm(pooled_output=pooled, width=64, height=64, device="cpu")

    def _predicted(
        self, model: Any, x_in: Tensor, timestep: Tensor, cond: hs.Conditioning
    ) -> Tensor:
        flux = hasattr(model.diffusion_model, "final_layer")
        time = timestep.float() / (1000 if flux else 1)
        return model.diffusion_model(x_in, time, context=cond.context, y=cond.pooled)

    def network(self, model: Any) -> Callable[[Tensor, Tensor, hs.Conditioning], Tensor]:
        return lambda *args: self._predicted(model.model, *args)

    def pooled(self, model: Any, pooled: Tensor) -> Tensor | None:
        return self._pooled(model.model, pooled)

    def sampled(self, model: Any, sampling: str, zero_snr: bool) -> Any:
        """After the node ModelSamplingDiscrete."""
        return self.advanced_nodes.ModelSamplingDiscrete().patch(model, sampling, zero_snr)[0]

    def lora(self, model: Any, change: Tensor) -> Any:
        """The same checkpoint with a LoRA: another MODEL of the same module."""
        clone = model.clone()
        key = "diffusion_model.out.2.weight"
        assert clone.add_patches({key: ("diff", (change,))}) == [key]
        return clone

    def advanced(
        self, noise: Any, guider: Any, sampler: Any, sigmas: Tensor, latent: Any, seen: Any
    ) -> Tensor:
        node, prepare = self.custom.SamplerCustomAdvanced, self.previews.prepare_callback

        def prepared(*args: Any) -> Any:
            callback = prepare(*args)

            def both(step: int, x0: Tensor, x: Tensor, total: int) -> None:
                callback(step, x0, x, total)
                seen(step, x0, total)

            return both

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.previews, "prepare_callback", prepared)
            inputs = (noise, guider, sampler, sigmas, latent)
            if hasattr(node, "define_schema"):  # in 0.8, not in 0.3.64
                return node.execute(*inputs)[0]["samples"]
            return node().sample(*inputs)[0]["samples"]

    def interrupt(self) -> None:
        self.management.interrupt_current_processing()

    def process_in(self, model: Any, latents: Tensor) -> Tensor:
        return model.model.process_latent_in(latents)

    def process_out(self, model: Any, latents: Tensor) -> Tensor:
        return model.model.process_latent_out(latents)


def real_or_skip() -> Real:
    folder = os.environ.get("HEADSTART_COMFYUI")
    if not folder:
        pytest.skip(
            "needs ComfyUI: HEADSTART_COMFYUI names its folder, in a Python that can run it"
        )
    return Real(folder)
