"""ImageReward (arXiv:2304.05977): a model of how much people like a picture for its prompt.

r = (mlp(t) - mean)/std,   t = the first token of a BLIP text encoder that reads the picture

A reward is no cosine: about -2 to 2, and only differences of it mean something. There are no
features. The file is ImageReward.pt, with BERT's vocabulary beside it: vocab.txt of
bert-base-uncased.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import CheckpointError, InputError
from headstart.spaces.extractor import Array, Judge, Rgb, in_batches
from headstart.spaces.preparation import BICUBIC, CLIP_MEAN, CLIP_STD, Preparation
from headstart.spaces.vit import HEAD, read_vit
from headstart.spaces.weights import Weights, filled, short_digest

SIDE, LENGTH = 224, 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of its rewards in training, as the package image-reward has them."""
LAYERS = ((0, 1024), (2, 128), (4, 64), (6, 16), (7, 1))
"""Numbers and outputs of the linear layers; between them is dropout, and no nonlinearity."""
PREPARE = Preparation(SIDE, SIDE, SIDE, CLIP_MEAN, CLIP_STD, BICUBIC, rounded=True)
VOCABULARY = "vocab.txt"
BERT = ("[UNK]", "[CLS]", "[SEP]", "[PAD]")

Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""Prompts -> token ids and attention mask [n, T]."""


def read_reward(weights: Weights) -> Judge:
    """A judge that scores and has no space.

    Raises CheckpointError for weights that are not ImageReward's, InputError without a vocabulary.
    """
    visual = read_vit(
        weights.within("blip.visual_encoder."), "the picture encoder of ImageReward",
        eps=1e-6, activation="gelu", side=SIDE,
    )  # fmt: skip
    text = _text_encoder(weights.within("blip.text_encoder."), visual.cls_token.shape[-1])
    width: int = text.config.hidden_size
    head = filled(lambda: _head(width), weights.within("mlp.layers."), "ImageReward's head")
    encode = _tokenizer(weights.path.parent / VOCABULARY, text.config.vocab_size)

    def rewards(rgb: Rgb, prompts: Sequence[str]) -> Array:
        tokens, mask = encode(prompts)
        with torch.inference_mode():
            pictures = visual.norm(visual(PREPARE.pixels(rgb)))
            output: Any = text(
                input_ids=tokens,
                position_ids=torch.arange(tokens.shape[1])[None],  # the module's own are not filled
                attention_mask=mask,
                encoder_hidden_states=pictures,
                encoder_attention_mask=torch.ones(pictures.shape[:2], dtype=torch.long),
            )
            values: Tensor = head(output.last_hidden_state[:, 0])
        return ((values[:, 0].double() - MEAN) / STD).numpy()

    name = f"imagereward:{weights.path.stem}:{short_digest([weights])}"
    return Judge((), in_batches(rewards), name)


def _text_encoder(weights: Weights, picture_width: int) -> Any:
    """transformers' BLIP text model, with the file's names."""
    from transformers import BlipTextConfig, BlipTextModel

    shapes = weights.shapes
    try:
        rows, width = shapes["embeddings.word_embeddings.weight"]
        settings: dict[str, Any] = {
            "vocab_size": rows,
            "hidden_size": width,
            "encoder_hidden_size": picture_width,
            "intermediate_size": shapes["encoder.layer.0.intermediate.dense.weight"][0],
            "num_hidden_layers": len({m[0] for n in shapes if (m := _LAYER.match(n))}),
            "num_attention_heads": width // HEAD,
            "max_position_embeddings": shapes["embeddings.position_embeddings.weight"][0],
            "layer_norm_eps": 1e-12,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id")),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{weights.path}: expected the text encoder of ImageReward, and {error} is not there: "
            "give ImageReward.pt whole"
        ) from error
    if width % HEAD or not all(value is None or value > 0 for value in settings.values()):
        raise CheckpointError(
            f"{weights.path}: no text encoder of ImageReward has such sizes, {settings!s:.200}: "
            "give ImageReward.pt whole"
        )
    config: Any = BlipTextConfig(**settings, hidden_act="gelu", is_decoder=True)

    build: Callable[[], nn.Module] = partial(BlipTextModel, config, add_pooling_layer=False)
    return filled(build, weights, "the text encoder of ImageReward", ("position_ids",))


_LAYER = re.compile(r"encoder\.layer\.\d+\.")


def _head(width: int) -> nn.Sequential:
    """Linear layers one after another; their names count the dropout between them."""
    layers = nn.Sequential()
    for number, out in LAYERS:
        layers.add_module(str(number), nn.Linear(width, out))
        width = out
    return layers


def _tokenizer(path: Path, rows: int) -> Encode:
    """BERT's words in small letters, at most 35 tokens with [CLS] and [SEP]."""
    from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"ImageReward reads prompts with BERT's vocabulary, and {str(path)!r} cannot be read "
            f"({error!s:.80}): put vocab.txt of bert-base-uncased there"
        ) from error
    vocabulary = {word.rstrip("\r"): n for n, word in enumerate(lines) if word.rstrip("\r")}
    if not set(BERT) <= vocabulary.keys() or max(vocabulary.values()) >= rows:
        raise InputError(
            f"{str(path)!r}: expected at most {rows} lines with {', '.join(BERT)} among them, as "
            f"bert-base-uncased has, got {len(vocabulary)}: give its vocab.txt"
        )
    tokenizer: Any = BertWordPieceTokenizer(vocabulary, lowercase=True)
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(pad_id=vocabulary["[PAD]"])

    def encode(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encodings: Any = tokenizer.encode_batch(list(prompts))
        ids = torch.tensor([encoding.ids for encoding in encodings])
        return ids, torch.tensor([encoding.attention_mask for encoding in encodings])

    return encode
