"""The engines of `tiny_pair` on a GPU, and as the command line opens them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from tiny_pair import tiny_engine

import headstart as hs
from headstart.engine.devices import choose_device


def gpu_engine(family: str, device: str = "cuda", runner: Any = "auto") -> hs.Engine:
    """As `Engine.load` leaves it, but for the files."""
    device_ = choose_device(device)
    pair = tiny_engine(family).weights
    for module in (*pair.denoisers.values(), pair.vae, *pair.text.towers):
        module.to(device_)  # type: ignore[attr-defined]
    # The demo's plans are the shortest, and 16 px pictures have a scorer.
    pair = replace(pair, device=device_, preset="demo")
    return hs.Engine(pair).with_runner(runner)


def opened(args: argparse.Namespace) -> hs.Engine:
    """In the place of `headstart.commands.session._load`."""
    assert torch.device(args.device).type == "cuda"
    return gpu_engine("sd15", args.device, args.runner)
