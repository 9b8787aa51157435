"""The recipe's stages by name: where each lives, what it does, its minutes by default."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """Where a stage lives (`module:function`, called with StageOptions) and its time limit."""

    target: str
    about: str
    minutes: float = 0.0


STAGES: dict[str, Stage] = {
    "data": Stage("dataset:main", "fetch artwork, draw sprites and pictures"),
    "restore": Stage("restore:main", "unpack the bundled files, to train on from them"),
    "tokenizer": Stage("tokenizer:main", "fit the byte-pair vocabulary"),
    "codec": Stage("codec:main", "train the VAE", 10.0),
    "base": Stage("base:main", "train the text encoder and the base UNet", 60.0),
    "distill": Stage("distill:main", "distil the base to a few steps", 40.0),
    "control": Stage("distill:control", "distil the base again, from an unguided teacher", 15.0),
    "unnoised": Stage("distill:unnoised", "without noised pictures; not bundled", 40.0),
    "renoise": Stage("distill:renoise", "trained to re-noise; not bundled", 40.0),
    "renoise-unnoised": Stage("distill:renoise_unnoised", "both of these; not bundled", 40.0),
    "dp": Stage("distill:dp", "its first step lands as its teacher does; not bundled", 40.0),
    "renoise-dp": Stage("distill:renoise_dp", "this and trained to re-noise; not bundled", 40.0),
    "variety": Stage(
        "variety:main", "adapters on the first step of two students; not bundled", 4.0
    ),
    "progressive": Stage("progressive:main", "distil by regression; a control, not bundled", 8.0),
    "tiny": Stage("tiny:main", "train the small decoder, fit the linear rgb map", 4.0),
    "scorer": Stage("scorer:main", "train the image-text scorer", 12.0),
    "slider": Stage("control:sliders", "train two sliders on the base", 4.0),
    "style": Stage("control:style", "train a style on the base", 4.0),
    "reverse": Stage("control:reverse", "train a slider on the distilled model", 4.0),
    "reference": Stage("reference:main", "describe the training pictures in the scorer's features"),
    "export": Stage("export:main", "write the bundled files and the manifest"),
}
