"""Numbers of AUTOMATIC1111's webui and of ComfyUI for prompts with weights, into prompts.json.

    WEBUI=.. COMFYUI=.. PYTHONPATH=src:tests python tests/parity/record_prompts.py

WEBUI is a checkout of AUTOMATIC1111/stable-diffusion-webui v1.10 (of which prompt_parser,
sd_hijack_clip, sd_hijack_open_clip and sd_emphasis are run, on stand-ins for the rest), COMFYUI one
of Comfy-Org/ComfyUI a125cd8; open_clip_torch 3.3.0 and lark have to be there. The networks are
`encoders.written_towers`. Of each context every 7th position is kept, along one direction.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from encoders import FAMILY_TOWERS, reference, written_towers

from headstart.networks.tower import Tower

FILE = Path(__file__).with_name("prompts.json")
COLOURS = ("red", "green", "tiny", "huge", "quiet", "painted", "wooden", "golden", "silver", "odd")
LONG = ", ".join(f"a {colour} fox beside an old stone bridge" for colour in COLOURS)
PROMPTS = {
    "plain": "a photo of a fox",
    "empty": "",
    "weights": "a (red:1.4) fox, (((oil))) painting, (blurry:0.3) :3",
    "square": "a [red] fox [[in (the) snow]] by night",
    "escaped": r"fox \(animal\), (owl \(bird\):1.2) \[x\] \\ end",
    "unbalanced": "a (fox in [the snow) and :1.5) (owl",
    "nested": "(a (quiet:1.2) [old] (house:0.8) in ((fog)):1.5)",
    "zero": "a fox (and an owl:0) (hat:-0.5)",
    "break": "a fox BREAK in the snow, BREAKFAST BREAK (oil:1.3)",
    "break first": "BREAK a fox",
    "no space": "fox(owl)(cat)dog",
    "commas": f"(masterpiece:1.2), {LONG}",
    "no commas": f"(masterpiece:1.2) {LONG.replace(',', ' and')}",
    "spans": "x " * 70
    + "(one two three four five six:1.1) (seven:1.2) "
    + "y " * 72
    + "(z z z:1.3)",
    "shout": "wow!!! a fox! (really!:1.2)",
}
"""Texts that both programs read; the webui prompt editing apart."""
PAIRS = {"other": ("a (red:1.3) fox", "an owl"), "longer": ("a fox", f"(oil:1.2) {LONG}")}
"""First and second prompt of SDXL, in ComfyUI."""


def sampled(context: torch.Tensor) -> list[float]:
    """[77k, D] -> every 7th position, along one direction."""
    return [round(float(value), 6) for value in (context.double() @ direction(context))[::7]]


def direction(values: torch.Tensor) -> torch.Tensor:
    return torch.cos(torch.arange(values.shape[-1], dtype=torch.float64))


def texts(count: int = 150) -> list[str]:
    """Random texts, most of them of signs."""
    rng = random.Random(18)
    parts = ["(", ")", "[", "]", ":1.3)", ":", "\\", "\\(", "\\)", "fox", " ", "a", ":0.5", "1.2",
             "( owl", ": -2 )", ", "]  # fmt: skip
    prompts = ["".join(rng.choices(parts, k=rng.randint(1, 14))) for _ in range(count)]
    return list(dict.fromkeys(prompts))


# ------------------------------------------------------------------- webui


def webui() -> dict[str, Any]:
    root = Path(os.environ["WEBUI"])
    opts = SimpleNamespace(
        emphasis="Original", comma_padding_backtrack=20, CLIP_stop_at_last_layers=1,
        use_old_emphasis_implementation=False, textual_inversion_add_hashes_to_infotext=False,
        sdxl_clip_l_skip=False,
    )  # fmt: skip
    nothing = SimpleNamespace(find_embedding_at_position=lambda *_: (None, None))
    hijack = SimpleNamespace(embedding_db=nothing, extra_generation_params={}, fixes=None)
    package = ModuleType("modules")
    package.__path__ = [str(root / "modules")]
    stands = {
        "modules": package,
        "modules.devices": SimpleNamespace(device="cpu", torch_npu_set_device=lambda: None),
        "modules.shared": SimpleNamespace(opts=opts),
        "modules.sd_hijack": SimpleNamespace(model_hijack=hijack),
        "open_clip": _open_clip(),
    }
    sys.modules.update(stands)  # type: ignore[arg-type]
    for name in ("devices", "shared", "sd_hijack"):
        setattr(package, name, stands[f"modules.{name}"])
    from modules import prompt_parser, sd_hijack_clip, sd_hijack_open_clip  # type: ignore[import]
    from transformers import CLIPTokenizer

    from headstart.networks.vocabulary import clip_vocabulary

    words = CLIPTokenizer(vocab=clip_vocabulary().ids, merges=clip_vocabulary().merges)
    record: dict[str, Any] = {"spans": {}}
    for text in texts():
        try:
            record["spans"][text] = prompt_parser.parse_prompt_attention(text)
        except ValueError:  # a weight that is no number
            record["spans"][text] = None
    for family, towers in ((name, written_towers(name)) for name in FAMILY_TOWERS):
        engines = []
        for tower in towers:
            model = reference(tower)
            if tower.rule.pad == "eot" and family == "sdxl":
                inner = SimpleNamespace(
                    tokenizer=words, transformer=model, layer="hidden", layer_idx=-2
                )
                engines.append(sd_hijack_clip.FrozenCLIPEmbedderForSDXLWithCustomWords)
            elif tower.rule.pad == "eot":
                inner = SimpleNamespace(tokenizer=words, transformer=model)
                engines.append(sd_hijack_clip.FrozenCLIPEmbedderWithCustomWords)
            elif family == "sdxl":
                inner = SimpleNamespace(
                    layer="penultimate", return_pooled=True, encode_with_transformer=_bigg(model)
                )
                engines.append(sd_hijack_open_clip.FrozenOpenCLIPEmbedder2WithCustomWords)
            else:
                inner = SimpleNamespace(
                    encode_with_transformer=lambda tokens, model=model: (
                        model(input_ids=tokens).last_hidden_state
                    )
                )
                engines.append(sd_hijack_open_clip.FrozenOpenCLIPEmbedderWithCustomWords)
            engines[-1] = _built(engines[-1], inner, hijack)
        record[family] = {name: _webui_row(engines, text) for name, text in PROMPTS.items()}
        if family == "sd15":
            opts.CLIP_stop_at_last_layers = 2
            record["sd15 skip 2"] = {"weights": _webui_row(engines, PROMPTS["weights"])}
            opts.CLIP_stop_at_last_layers = 1
    return record


def _built(kind: Any, inner: Any, hijack: Any) -> Any:
    """Its wrapped module need not be one."""
    holder = torch.nn.Module()
    for name, value in vars(inner).items():
        object.__setattr__(holder, name, value)
    return kind(holder, hijack)


def _bigg(model: Any) -> Any:
    def encode(tokens: torch.Tensor) -> dict[str, Any]:
        out = model(input_ids=tokens, output_hidden_states=True)
        return {"penultimate": out.hidden_states[-2], "pooled": out.text_embeds}

    return encode


def _webui_row(engines: list[Any], text: str) -> dict[str, list[float]]:
    with torch.no_grad():
        outs = [engine([text]) for engine in engines]
    contexts = [out[0] if isinstance(out, tuple) else out for out in outs]
    row = {"context": sampled(torch.cat(contexts, -1)[0])}
    if isinstance(outs[-1], tuple):
        row["pooled"] = sampled(outs[-1][1])
    return row


def _open_clip() -> ModuleType:
    """Its tokenizer alone: the rest needs torchvision."""
    import importlib.util

    spec = importlib.util.find_spec("open_clip")
    assert spec is not None and spec.submodule_search_locations
    package = ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations)
    return package


# ----------------------------------------------------------------- ComfyUI


def comfyui() -> dict[str, Any]:
    sys.path.insert(0, os.environ["COMFYUI"])
    import comfy.cli_args  # type: ignore[import]

    comfy.cli_args.args.cpu = True
    from comfy import sd1_clip, sdxl_clip  # type: ignore[import]
    from comfy.text_encoders import sd2_clip  # type: ignore[import]

    kinds = {
        "sd15": (sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel, "l"),
        "sd21": (sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel, "h"),
        "sdxl": (sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel, "lg"),
    }
    record: dict[str, Any] = {"spans": {}}
    for text in texts():
        spans = sd1_clip.token_weights(sd1_clip.escape_important(text), 1.0)
        record["spans"][text] = [
            [sd1_clip.unescape_important(part), weight] for part, weight in spans
        ]
    for family, (tokenizer, model, letters) in kinds.items():
        towers = written_towers(family)
        options = {
            f"clip_{letter}_model_config": _config(tower, 1 if family == "sd21" else 0)
            for letter, tower in zip(letters, towers, strict=True)
        }
        network = model(device="cpu", dtype=torch.float32, model_options=options)
        for letter, tower in zip(letters, towers, strict=True):
            weight = getattr(network, f"clip_{letter}").transformer
            for parameter in weight.parameters():  # the layer that is never read, and projections
                parameter.data.zero_()
            weight.load_state_dict(tower.state_dict(), strict=False)
        words = tokenizer()
        record[family] = {
            name: _comfy_row(network, words.tokenize_with_weights(text))
            for name, text in PROMPTS.items()
        }
        for skip in (1, 2, 3) if family != "sd21" else ():
            network.set_clip_options({"layer": -skip})
            row = _comfy_row(network, words.tokenize_with_weights(PROMPTS["weights"]))
            record[f"{family} skip {skip}"] = {"weights": row}
            network.reset_clip_options()
        if family == "sdxl":
            record["second"] = {
                name: _comfy_row(network, _two(words, *both)) for name, both in PAIRS.items()
            }
    return record


def _two(words: Any, first: str, second: str) -> Any:
    """As CLIPTextEncodeSDXL does it: the shorter text gets empty pieces."""
    tokens = words.tokenize_with_weights(second)
    tokens["l"] = words.tokenize_with_weights(first)["l"]
    empty = words.tokenize_with_weights("")
    while len(tokens["l"]) < len(tokens["g"]):
        tokens["l"] += empty["l"]
    while len(tokens["l"]) > len(tokens["g"]):
        tokens["g"] += empty["g"]
    return tokens


def _config(tower: Tower, more: int) -> dict[str, Any]:
    p = tower.params
    return {"num_hidden_layers": p.layers + more, "hidden_size": p.width,
            "num_attention_heads": p.heads, "intermediate_size": p.mlp_width,
            "hidden_act": p.act, "eos_token_id": 49407}  # fmt: skip


def _comfy_row(network: Any, tokens: Any) -> dict[str, list[float]]:
    with torch.no_grad():
        context, pooled = network.encode_token_weights(tokens)
    assert math.isfinite(float(context.sum()))
    row = {"context": sampled(context[0])}
    return row | ({"pooled": sampled(pooled)} if hasattr(network, "clip_g") else {})


def main() -> None:
    FILE.write_text(json.dumps({"a1111": webui(), "comfyui": comfyui()}, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
