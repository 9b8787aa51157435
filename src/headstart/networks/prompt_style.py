"""The names of how a prompt may be read; loads without torch, as the command line needs them."""

from __future__ import annotations

from typing import Literal

PromptStyle = Literal["plain", "a1111", "comfyui"]
PROMPT_STYLES: tuple[PromptStyle, ...] = ("plain", "a1111", "comfyui")
"""As typed, or with weights as AUTOMATIC1111's webui or ComfyUI read them (`networks.grammar`)."""

Exclamation = Literal["openclip", "transformers"]
EXCLAMATIONS: tuple[Exclamation, ...] = ("openclip", "transformers")
"""What "!" becomes (`ClipTokenizer.exclamation`)."""
