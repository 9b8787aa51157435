"""Which layer a module's name means, under every prefix and in every naming."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from adapter_samples import NETWORKS, UNET, Layers, Tensors, write

from headstart.adapters.file import describe_adapter, read_adapter
from headstart.adapters.group import grouped
from headstart.adapters.names import Network, other_family, parse
from headstart.adapters.places import Places, placed
from headstart.checkpoint import keymap
from headstart.errors import AdapterError

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
RESNET = "up_blocks.1.resnets.2.norm2"
AROUND = {
    **{f"time_embedding.linear_{i}": (8, 8) for i in (1, 2)},
    **{f"add_embedding.linear_{i}": (8, 8) for i in (1, 2)},
}
FC = "text_model.encoder.layers.1.mlp.fc1"
LAYERS: Layers = {
    "unet": UNET | AROUND,
    "text": NETWORKS["text"] | {"text_model.final_layer_norm": (24,), "text_projection": (24, 24)},
    "text_2": NETWORKS["text_2"],
}
PLACES = Places(LAYERS)
LDM = keymap.unet_to_ldm(LAYERS["unet"])
WRAPPERS = ("", "_orig_mod.", "module.", "ema.", "model.", "base_model.model.")
PREFIXES: dict[Network, tuple[str, ...]] = {
    "unet": (
        *("unet.", "transformer.", "diffusion_model.", "model.diffusion_model."),
        *("lora_unet_", "lora_unet_unet_", "lora_unet__orig_mod_", "lycoris_", ""),
    ),
    "text": (
        *("text_encoder.", "text_encoders.clip_l.transformer.", "clip_l.", "clip_l.transformer."),
        *("lora_te_", "lora_te1_", "conditioner.embedders.0.transformer.", "clip_h."),
    ),
    "text_2": (
        *("text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g.", "lora_te2_"),
        *("conditioner.embedders.1.model.",),
    ),
}


@pytest.mark.parametrize("network", PREFIXES)
def test_every_prefix_behind_every_wrapper_leads_to_the_same_layer(network: Network) -> None:
    """A wrapper on either side of the prefix; with dots, and with underscores for them."""
    layer = ATTENTION if network == "unet" else FC
    for outer, prefix, inner in product(WRAPPERS, PREFIXES[network], WRAPPERS):
        before = outer + prefix + inner
        for spelled in {layer, layer.replace(".", "_")}:
            assert PLACES.find(before + spelled) == [(network, layer)], before + spelled
            key = parse(f"{before}{spelled}.lora_A.weight")
            assert key is not None and (key.network, key.module) == (network, spelled)


SPELLINGS: list[tuple[Network, str, str]] = [
    *(("unet", LDM[layer], layer) for layer in (ATTENTION, RESNET, *AROUND)),
    ("unet", "time_embed.0", "time_embedding.linear_1"),
    ("unet", "time_embed.2", "time_embedding.linear_2"),
    ("unet", "label_emb.0.0", "add_embedding.linear_1"),
    ("unet", "label_emb.0.2", "add_embedding.linear_2"),
    ("unet", "out.0", "conv_norm_out"),
    ("unet", "input_blocks.0.0", "conv_in"),
    ("text", "transformer.resblocks.1.mlp.c_fc", FC),
    ("text", "resblocks.1.mlp.c_fc", FC),
    (
        "text",
        "transformer.resblocks.1.attn.out_proj",
        FC.replace("mlp.fc1", "self_attn.out_proj"),
    ),
    ("text", "ln_final", "text_model.final_layer_norm"),
    ("text", "encoder.layers.1.mlp.fc1", FC),
    ("text", "text_projection", "text_projection"),
]


@pytest.mark.parametrize(("network", "spelled", "layer"), SPELLINGS)
def test_the_original_networks_names_and_ours_are_one_layer(
    network: Network, spelled: str, layer: str
) -> None:
    dotted, flat = ("unet.", "lora_unet_") if network == "unet" else ("clip_l.", "lora_te1_")
    for name in {dotted + spelled, flat + spelled.replace(".", "_"), dotted + layer}:
        assert PLACES.find(name) == [(network, layer)], name


def group_of(names: dict[str, tuple[int, int]]) -> list[tuple[str, str | None]]:
    """Low-rank changes of modules of these names and shapes -> what they are placed as."""
    layout = tuple(
        (f"{name}.{end}.weight", "F32", shape)
        for name, (o, i) in names.items()
        for end, shape in (("lora_A", (2, i)), ("lora_B", (o, 2)))
    )
    same: Layers = {"text": {f"layers.{i}": (4, 4) for i in range(2)}}
    same["text_2"] = {f"layers.{i}": (4, 4) for i in range(3)}
    found = placed(grouped(layout).groups.values(), same)
    return [(group.name, None if place is None else place[0]) for group, place in found]


def test_what_says_most_of_a_file_decides_and_a_draw_is_an_error_that_names_both() -> None:
    names = {f"layers.{i}": (4, 4) for i in range(3)}
    assert group_of(names) == [(name, "text_2") for name in names]
    with pytest.raises(AdapterError, match=r"layers\.1 of the text and as .* of the text_2"):
        group_of({"layers.1": (4, 4)})
    assert group_of({"text_encoder.layers.1": (4, 4)})[0][1] == "text"
    assert group_of({"layers.7": (4, 4)})[0][1] is None


def test_two_layers_that_underscores_make_one_are_an_error(tmp_path: Path) -> None:
    networks: Layers = {"unet": {"a.b_c": (4, 4), "a_b.c": (4, 4), "a.b.c": (5, 4)}}
    tensors = {f"lora_unet_a_b_c.lora_{x}.weight": torch.ones(2, 4) for x in ("down",)}
    tensors["lora_unet_a_b_c.lora_up.weight"] = torch.ones(4, 2)
    file = read_adapter(write(tmp_path / "a.safetensors", tensors))
    with pytest.raises(AdapterError, match=r"a\.safetensors: 'lora_unet_a_b_c' reads as a\.b_c"):
        file.match(networks)


def test_underscores_before_the_operand_are_read_as_inspect_says(tmp_path: Path) -> None:
    """new.safetensors of github.com/timohavdk/sd-lora."""
    name = "lora_unet_unet_" + ATTENTION.replace(".", "_")
    o, i = UNET[ATTENTION]
    tensors = {
        f"{name}_lora_down.weight": torch.ones(2, i),
        f"{name}_lora_up.weight": torch.ones(o, 2),
    }
    path = write(tmp_path / "a.safetensors", tensors)
    assert describe_adapter(path).modules == {"unet": 1}
    assert [*read_adapter(path).resolve(NETWORKS).require().deltas] == [("unet", ATTENTION)]


OTHERS = {
    "lora_unet_double_blocks_0_img_attn_proj": "Flux (double_blocks)",
    "transformer.single_transformer_blocks.3.proj_mlp": "Flux (single_transformer_blocks)",
    "lora_unet_joint_blocks_0_x_block_attn_qkv": "SD3 (joint_blocks)",
    "transformer.transformer_blocks.0.attn.add_q_proj": "SD3 (attn.add_q_proj)",
    "diffusion_model.blocks.0.self_attn.q": "Wan (blocks.0.self_attn)",
    "diffusion_model.layers.0.attention.qkv": "Lumina (layers.0.attention)",
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_adapter_of_another_architecture_is_named(tmp_path: Path, name: str) -> None:
    """A text encoder of it may fit, as Flux has SD's: it is named all the same."""
    tensors: Tensors = {f"{name}.lora_A.weight": torch.ones(2, 4)}
    tensors[f"{name}.lora_B.weight"] = torch.ones(4, 2)
    o, i = NETWORKS["text"][FC]
    tensors |= {f"lora_te1_{FC.replace('.', '_')}.lora_{x}.weight": t
                for x, t in (("down", torch.ones(2, i)), ("up", torch.ones(o, 2)))}  # fmt: skip
    file = read_adapter(write(tmp_path / "a.safetensors", tensors))
    assert other_family([name]) == describe_adapter(file.path).family == OTHERS[name]
    with pytest.raises(AdapterError) as error:
        file.match(NETWORKS)
    assert OTHERS[name] in str(error.value) and "not of the UNet family" in str(error.value)


def test_no_layer_of_ours_has_the_name_of_another_architecture() -> None:
    spelled = [*LAYERS["unet"], *LDM.values(), *LAYERS["text"]]
    assert other_family([*spelled, *(name.replace(".", "_") for name in spelled)]) is None


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("lora_te1_text_model_embeddings_token_embedding.diff", "of an embedding, which is not"),
        ("clip_g.transformer.resblocks.0.attn.in_proj.diff", "of OpenCLIP's q, k and v in one"),
        ("lora_unet_sideways.diff", "unknown here"),
    ],
)
def test_what_finds_no_place_is_said_with_its_reason(tmp_path: Path, key: str, why: str) -> None:
    tensors = {"unet.conv_norm_out.diff": torch.ones(UNET["conv_norm_out"]), key: torch.ones(4, 4)}
    with pytest.raises(AdapterError, match=f"1 {why}.*{key}"):
        read_adapter(write(tmp_path / "a.safetensors", tensors)).resolve(NETWORKS).require()
