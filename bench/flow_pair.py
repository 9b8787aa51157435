"""The bundled pair as a flow: the same weights, called as velocity networks of rectified flow.

    z = (1 - t)*x0 + t*eps,  sigma = t/(1 - t),  v = eps - x0      a flow's state and its target
    x = (1 + sigma)*z = x0 + sigma*eps                              the state of both processes
    F = network(c_in*x, timestep of sigma),  x0 = c_skip*x + c_out*F     as it was trained
    v = (x - x0)/sigma - x0 = (1 + sigma)/sigma * (z - x0)

So nothing is trained and nothing is approximated: v says the same x0 at the same level. Above the
highest level that the network was trained on, where no timestep is its own, it is called at its
last one with the same unit-variance input, and x0 is read as it is there: pure noise (t = 1) gives
the x0 that it would give on its own schedule.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import harness
import torch
from torch import Tensor

import headstart as hs
from headstart.compare.compare import compare, sheet_of
from headstart.engine.pair import Pair, load_demo
from headstart.interfaces import Conditioning, Denoiser
from headstart.metrics.judges import PictureSource, choose_judge
from headstart.networks.casting import compute_dtype
from headstart.output import write_file
from headstart.pictures.png import encode_png
from headstart.plan.pair import HANDOFF
from headstart.plan.pairs import DEMO_RATIO, PAIRS
from headstart.plan.preset import Mode, Request, plan_of
from headstart.plan.request import parse_seeds

FLOW_LEVELS = hs.NoiseSchedule.flow()
"""Timesteps 1000*t to levels; a shift moves grids alone, so that any flow's may be read here."""
SHIFT = 3.0 * DEMO_RATIO
"""Z-Image-Turbo's shift, matched to the small latent: it multiplies every level, as the pair's own
schedule is Stable Diffusion's with every level times DEMO_RATIO."""
STEPS = 8
"""Z-Image-Turbo's."""
_FLOW = hs.NoiseSchedule.flow(shift=SHIFT)
PAIR = replace(
    PAIRS["z-image"],
    name="demo-as-flow",
    card="the bundled pair, asked as velocity networks on Z-Image-Turbo's grid",
    schedule=_FLOW,
    base_schedule=None,
    base_guidance=1.0,
    base_steps=PAIRS["demo"].base_steps,
    base_scale=PAIRS["demo"].base_scale,
    handoff=HANDOFF * DEMO_RATIO,
    ratio=DEMO_RATIO,
)
"""Hands over by level: at 5.0 in SDXL's terms."""

Model = Literal["base", "distilled"]


class VelocityMap(NamedTuple):
    """One level: what a network is called with, and its output as a velocity.

    v = of_state*z + of_output*network(scale*z, timestep)
    """

    timestep: float
    scale: float
    of_state: float
    of_output: float


def velocity_map(time: float, schedule: hs.NoiseSchedule, prediction: hs.Prediction) -> VelocityMap:
    """For a flow's timestep 1000*t, in float64.

    `schedule` and `prediction` are those that the network was trained with. Raises PlanError for a
    level below the schedule's lowest.
    """
    sigma = FLOW_LEVELS.sigma(time)
    top, highest = schedule.highest
    own = min(sigma, highest)
    timestep = top if sigma >= highest else schedule.timestep(sigma, "log")
    scalings = prediction.scalings(own)
    scale = prediction.scalings(sigma).c_in * (1.0 + sigma)
    share = (1.0 + sigma) / sigma
    of_state = share * (1.0 - scalings.c_skip * scale / scalings.c_in)
    return VelocityMap(timestep, scale, of_state, -share * scalings.c_out)


class FlowNetwork(NamedTuple):
    """(z, 1000*t, cond) -> v of a network of another process; call it with `as_flow`.

    It reads the timesteps on the host, so it runs eagerly and in no captured graph.
    """

    network: Denoiser
    schedule: hs.NoiseSchedule
    prediction: hs.Prediction

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.network)

    def __call__(self, z: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        times: list[float] = timestep.tolist()
        maps = {time: velocity_map(time, self.schedule, self.prediction) for time in set(times)}
        rows = torch.tensor([maps[time] for time in times], dtype=torch.float64)
        dtype = torch.promote_types(z.dtype, torch.float32)
        own_timestep, *factors = rows.to(z.device, dtype).T
        scale, of_state, of_output = (part.view(-1, 1, 1, 1) for part in factors)
        wide = z.to(dtype)
        f = self.network((scale * wide).to(z.dtype), own_timestep, cond)
        return (of_state * wide + of_output * f.to(dtype)).to(z.dtype)


def as_flow(
    network: Denoiser, schedule: hs.NoiseSchedule, prediction: str | hs.Prediction
) -> FlowNetwork:
    """A denoiser (x_in, timestep, cond) -> F of `schedule` and `prediction` as one of a flow.

    The result is a denoiser for `Prediction.FLOW` on `NoiseSchedule.flow(...)` of any shift.
    """
    return FlowNetwork(network, schedule, hs.Prediction(prediction))


def flow_pair(pair: Pair, shift: float = SHIFT) -> Pair:
    """The same networks, codec and text encoders, with both models seen as flows.

    It has no preset, because the grids of the pair's own are timesteps of another process: an
    engine of it needs plans that are written out, such as those of `flow_plan`.
    """
    networks: dict[str, Denoiser] = {}
    for role, network in pair.denoisers.items():
        own = pair.schedules[role]
        assert isinstance(own, hs.NoiseSchedule)
        networks[role] = as_flow(network, own, pair.predictions[role])
    return replace(
        pair,
        denoisers=networks,
        schedules=dict.fromkeys(pair.denoisers, hs.NoiseSchedule.flow(shift=shift)),
        predictions=dict.fromkeys(pair.denoisers, hs.Prediction.FLOW),
        preset=None,
        guesses={},
    )


def flow_engine(shift: float = SHIFT, *, device: str = "cpu") -> hs.Engine:
    """The bundled pair as flows, with plans by `flow_plan`."""
    return hs.Engine(flow_pair(load_demo(device=device), shift), "eager")


def base_plan() -> hs.Plan:
    """The guided base alone, on a grid of its own."""
    return replace(plan_of(PAIR, Request(PAIR.name, mode="base")), name="flow-base")


def compare_tables(engine: hs.Engine, handoff: float | None = None) -> dict[str, hs.StepTable]:
    """The four plans of `headstart compare`, handed over by level."""
    modes: dict[Mode, float | None] = {
        "base": None, "distilled": None, "hybrid": handoff, "skip-first": handoff,
    }  # fmt: skip
    return {
        mode: engine.compile(plan_of(PAIR, Request(PAIR.name, mode=mode, handoff=level)))
        for mode, level in modes.items()
    }


def flow_plan(first: Model, row: int, k: int | None = None) -> hs.Plan:
    """`first` goes in k steps to the level of `row` of the student's grid, the student goes on.

    row   0 .. STEPS; 0 is the student alone
    k     steps that are even in u, the flow's time before it is shifted; None: those of the grid
    """
    alone = hs.Leg(model="distilled", steps=STEPS)
    if row == 0:
        return hs.Plan((alone,), name="flow-distilled")
    k = row if k is None else k
    legs = (hs.Leg(model=first, steps=k, spacing=hs.Spacing.EVEN),)
    if row < STEPS:
        legs += (replace(alone, skip=row),)
    return hs.Plan(legs, name=f"flow-{first}-{row}-in-{k}")


def main() -> None:
    """`headstart compare` on the pair as flows."""
    parser = harness.options(__doc__, "flow.png")  # beside it a JSON file
    parser.add_argument("prompt", nargs="?", default="a fox")
    parser.add_argument("--seeds", default="0-15")
    parser.add_argument("--handoff", type=float, metavar="SIGMA")
    args = parser.parse_args()
    engine = flow_engine()
    seeds = parse_seeds(args.seeds)
    side = engine.weights.image_size
    drawn = PictureSource("the pair as flows", engine.weights.lineage, frozenset({(side, side)}))
    judge = choose_judge([drawn]).judge
    tables = compare_tables(engine, args.handoff)
    print(tables["hybrid"].describe(PAIR.ratio), end="\n\n")
    comparison = compare(engine, args.prompt, seeds, judge, tables=tables)
    write_file(args.out, encode_png(sheet_of(comparison)))
    rows = {name: [list(step) for step in table] for name, table in tables.items()}
    report = {"machine": harness.machine(), "rows": rows, **comparison.to_json(args.out.name)}
    harness.write_json(args.out.with_suffix(".json"), report)
    print(f"{args.prompt!r}, {len(seeds)} seeds\n\n{comparison}\n\n{args.out}")


if __name__ == "__main__":
    main()
