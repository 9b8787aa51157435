"""The cases of `bench/peers.py` as data: which network, at which size, and whom it is run by.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Kind = Literal["unet", "vae", "runs"]
STEPS = (1, 2, 4, 8, 50)
GUIDANCE = 5.0
ANCHOR = "ours float32"
EXACT = "ours float64"
"""Not timed: what every other output is compared with, where memory allows it."""

EAGER = (
    *(
        "ours float32",
        "ours packed",
        "diffusers float32",
        "OpenVINO float32",
        "onnxruntime float32",
    ),
    *("ours bfloat16", "ours packed bfloat16", "diffusers bfloat16", "OpenVINO bfloat16"),
)
COMPILED = ("ours compiled", "ours frozen", "ours frozen bfloat16")
EVERY = (
    *EAGER,
    *("stable-diffusion.cpp float32", "stable-diffusion.cpp float16"),
    *COMPILED,
    *("diffusers compiled", "diffusers frozen", "diffusers frozen bfloat16"),
)
XL = (
    *("ours stored", "ours bfloat16", "ours packed bfloat16"),
    *("diffusers bfloat16", "OpenVINO bfloat16"),
)


class Case(NamedTuple):
    """
    network   "tiny", "sd15", "sdxl": random weights from a seed; "pair": the bundled one
    size      the side of the latent; of a decode and of whole runs, pixels
    rows      names of `peers_rows.ROWS`
    limit_s   the most seconds a process has to start, and then for one call
    rounds    at most
    anchor    the row that every ratio and every error is to; it runs beside each group
    exact     whether a float64 network fits into memory too
    room_gb   what a process needs besides its weights
    changes   whether what is compiled is then given other weights, a hook and another size
    """

    name: str
    kind: Kind
    network: str
    size: int
    rows: tuple[str, ...]
    batch: int = 1
    limit_s: int = 300
    rounds: int = 9
    anchor: str = ANCHOR
    exact: bool = False
    room_gb: float = 0.7
    changes: bool = False

    @property
    def about(self) -> str:
        images = f", batch {self.batch}" if self.batch > 1 else ""
        return {
            "unet": f"a pass of the UNet {self.network}, {self.size}x{self.size} latents{images}",
            "vae": f"a decode of SD's VAE, {self.size} px",
            "runs": f"whole runs of the bundled pair, {self.size} px: steps, decode; no text",
        }[self.kind]

    @property
    def variants(self) -> tuple[str, ...]:
        """What one process of the case is asked to run, by name."""
        if self.kind != "runs":
            return (self.name,)
        return ("hybrid", *(f"{n} {how}" for how in ("plain", "guided") for n in STEPS))


CASES = (
    Case("tiny", "unet", "tiny", 16, EAGER, limit_s=120, exact=True),
    Case("pair", "runs", "pair", 64, (*EAGER, "ours replay", "ours compiled"), limit_s=240,
         exact=True),
    Case("sd15-32", "unet", "sd15", 32, EVERY, changes=True),
    Case("vae-256", "vae", "sd15", 256, EAGER, room_gb=2),
    Case("sd15-32-2", "unet", "sd15", 32, EAGER, batch=2),
    Case("sd15-32-4", "unet", "sd15", 32, EAGER, batch=4, rounds=5),
    Case("sd15-64", "unet", "sd15", 64, EAGER + COMPILED, rounds=5, room_gb=1.5),
    Case("sd15-64-2", "unet", "sd15", 64, EAGER, batch=2, rounds=5, room_gb=2.5),
    Case("vae-512", "vae", "sd15", 512, EAGER, rounds=5, room_gb=3),
    Case("sdxl-64", "unet", "sdxl", 64, XL, rounds=3, anchor="ours stored", room_gb=1.5),
    Case("sdxl-128", "unet", "sdxl", 128, XL, limit_s=600, rounds=3, anchor="ours stored",
         room_gb=3),
    Case("vae-1024", "vae", "sd15", 1024, EAGER, limit_s=1200, rounds=3, room_gb=7),
)  # fmt: skip
BY_NAME: Mapping[str, Case] = {case.name: case for case in CASES}
QUICK = ("tiny", "sd15-32", "vae-256")
QUICK_ROUNDS = 3
SLOW_LIMITS = 4
"""Times the limit of a case, for a row that may take minutes until it is ready."""
