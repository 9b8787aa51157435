"""A name on the Hugging Face Hub in place of a path, and the command that fetches it."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = r"(?P<owner>[A-Za-z0-9][\w.-]*)/(?P<name>[A-Za-z0-9][\w.-]*)"
# A Path has one slash where the address had two.
_SITE = r"(?P<site>(?:https?:/+)?(?:huggingface\.co|hf\.co)/|hf:/+)"
_FILE = r"(?:/(?:resolve|blob|tree)/[^/?]+(?:/(?P<file>[^?]+))?)?/?(?:\?.*)?"
_HUB = re.compile(f"{_SITE}?{_NAME}{_FILE}")
_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".json", ".toml")


def download_of(path: str | Path) -> str | None:
    """What to do about a path that is not there and reads like a repository; None for any other.

    `owner/name`, and addresses of a repository or of a file in it. A name whose folder is there, or
    that ends as a file does, is a path.
    """
    text = str(path)
    match = _HUB.fullmatch(text)
    if match is None:
        return None
    plain = match["site"] is None
    if plain and (match["file"] or text.endswith(_FILES) or Path(match["owner"]).exists()):
        return None
    repository, file = f"{match['owner']}/{match['name']}", match["file"]
    command = f"hf download {repository} {file or 'FILE'} --local-dir models"
    files = "" if file else f", FILE being one of https://huggingface.co/{repository}/tree/main"
    return f"nothing is fetched here: `{command}`{files}; then give models/{file or 'FILE'}"
