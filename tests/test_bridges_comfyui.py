"""The ComfyUI nodes, on a real ComfyUI where there is one, and everywhere on a stand-in for it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import NEGATIVE, POSITIVE, SHAPE, Host, StandIn, alone, nodes, plan, start
from comfy_real import real_or_skip
from torch import Tensor

import headstart as hs
from headstart.bridges import comfyui
from headstart.bridges.comfy_model import inspect_model
from headstart.bridges.comfyui import HeadstartGuider, HeadstartPlan, HeadstartSampler
from headstart.plan.table import StepTable

pytestmark = pytest.mark.filterwarnings("ignore")  # ComfyUI's own

LIMIT = 1e-5
"""Of the largest latent: about a hundred float32 roundings, of which a row has ten."""
KIND = {hs.Prediction.FLOW: "flow", hs.Prediction.EPS: "eps"}
PRESETS = [name for name in hs.presets() if name != "demo"]  # a schedule that no ComfyUI model has


@pytest.fixture(params=["stand-in", "ComfyUI"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host:
    return StandIn(monkeypatch) if request.param == "stand-in" else real_or_skip()


@pytest.fixture
def pair(host: Host) -> tuple[Any, Any]:
    return host.model("eps", 0), host.model("eps", 1)


def preset_table(name: str, mode: str = "hybrid", **settings: Any) -> StepTable:
    """By the pair's own schedules, which ComfyUI has no part in."""
    pair = hs.presets()[name]
    plan = hs.preset(name, mode=mode, **settings)
    return plan.compile(pair.schedules, prediction=pair.predictions)


def apart(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest number."""
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_headstart_alone(host: Host, name: str) -> None:
    one_step = name == "lightning-1step"
    mode = "distilled" if one_step else "hybrid"
    kind = KIND[hs.presets()[name].prediction]
    models = host.model(kind, 0), host.model(kind, 1)
    tables = []
    for cfg in (1.0, 4.0):
        settings: dict[str, Any] = {"base_guidance": cfg, "distilled_guidance": cfg}
        planned, sigmas = plan(name, mode, **settings)
        table = preset_table(name, mode, **settings)
        tables.append(nodes(host, planned, models, sigmas))
        last = alone(host, table, models)[-1].x * table.end_scale
        assert apart(tables[-1], host.process_out(models[0], last)) <= LIMIT
    assert apart(*tables) > 100 * LIMIT


@pytest.mark.parametrize("kind", ["v", "edm", "x0"])
def test_a_plan_takes_schedule_and_prediction_from_the_models_it_is_given(
    host: Host, kind: str
) -> None:
    models = host.model(kind, 0), host.model(kind, 1)
    planned, sigmas = plan("lightning", base=models[0], distilled=models[1], base_guidance=3.0)
    assert {model.prediction.value for model in planned.models.values()} == {kind}
    last = alone(host, planned.table, models)[-1].x
    outputs = nodes(host, planned, models, sigmas)
    assert apart(outputs, host.process_out(models[0], last)) <= LIMIT


@pytest.mark.parametrize(
    ("kind", "name"), [("sdxl", "lightning"), ("sdxl", "lcm"), ("flux", "krea2")]
)
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_comfyuis_sdxl_and_flux_are_headstart_alone(kind: str, name: str, cfg: float) -> None:
    host = real_or_skip()
    models = host.model(kind, 0), host.model(kind, 1)
    planned, sigmas = plan(name, base_guidance=cfg, distilled_guidance=cfg)
    last = alone(host, planned.table, models)[-1].x
    outputs = nodes(host, planned, models, sigmas)
    assert apart(outputs, host.process_out(models[0], last)) <= LIMIT


def test_comfyuis_own_sampling_nodes_are_read() -> None:
    host = real_or_skip()
    model = host.model("v", 0)
    patched = host.sampled(model, "v_prediction", True)
    outputs = inspect_model("base", patched)
    ended = hs.NoiseSchedule.scaled_linear().zero_terminal_snr()  # of which only the end differs
    assert isinstance(outputs.process, hs.NoiseSchedule)
    assert torch.allclose(
        *(torch.tensor(process.sigmas[:-1]) for process in (outputs.process, ended)), 1e-4
    )
    planned, sigmas = plan("lightning", base=patched, distilled=patched, base_guidance=4.0)
    last = alone(host, planned.table, (model, model))[-1].x
    outputs = nodes(host, planned, (patched, patched), sigmas)
    assert apart(outputs, host.process_out(model, last)) <= LIMIT
    with pytest.raises(hs.InputError, match="take away a ModelSamplingDiscrete node"):
        inspect_model("base", host.sampled(model, "lcm", False))


@pytest.mark.parametrize("mode", ["hybrid", "replace-final"])
def test_the_distilled_model_may_be_the_base_with_a_lora(mode: str) -> None:
    host = real_or_skip()
    base, apart_from_it = host.model("eps", 0), host.model("eps", 0)
    weight = apart_from_it.model.diffusion_model.out[2].weight
    change = 0.3 * weight.detach().roll(1, 0)
    models = base, host.lora(base, change)
    with torch.no_grad():
        weight += change
    planned, sigmas = plan("lightning", mode, base_guidance=4.0)
    last = alone(host, planned.table, (host.model("eps", 0), apart_from_it))[-1].x
    for _ in range(2):
        outputs = nodes(host, planned, models, sigmas)
        assert apart(outputs, host.process_out(base, last)) <= LIMIT


def test_sigmas_are_comfyuis_levels() -> None:
    planned, sigmas = plan("lightning")
    levels = [step.sigma for step in planned.table]
    assert sigmas.tolist() == torch.tensor([*levels, 0.0]).tolist()
    planned, sigmas = plan("sd35-turbo")
    times = [step.timestep / 1000 for step in planned.table]
    assert torch.allclose(sigmas, torch.tensor([*times, 0.0]), rtol=1e-6)
    assert sigmas[0] == 1.0


def test_denoise_leaves_the_first_rows_out(host: Host, pair: tuple[Any, Any]) -> None:
    planned, sigmas = plan("lightning", denoise=0.6)
    assert len(sigmas) == 1 + round(0.6 * len(planned.table))
    latents = 3 * start(8)
    outputs = nodes(host, planned, pair, sigmas, latents)
    table, level = preset_table("lightning"), float(sigmas[0])
    x = host.process_in(pair[0], latents) + level * start(5)
    resume = hs.from_latent(table, x, level)
    last = alone(host, table, pair, resume=resume)[-1].x
    assert apart(outputs, host.process_out(pair[0], last)) <= LIMIT


@pytest.mark.parametrize("name", ["lightning", "dmd2", "z-image"])
def test_parts_of_split_sigmas_are_the_whole(host: Host, name: str) -> None:
    kind = KIND[hs.presets()[name].prediction]
    models = host.model(kind, 0), host.model(kind, 1)
    planned, sigmas = plan(name)
    whole = nodes(host, planned, models, sigmas, noise_seed=5)
    for cut in range(1, len(planned.table)):
        high = nodes(host, planned, models, sigmas[: cut + 1], noise_seed=5)
        low = nodes(host, planned, models, sigmas[cut:], high, noise_seed=5, blank=True)
        assert apart(low, whole) <= LIMIT


@pytest.mark.parametrize("name", ["lightning", "tcd", "dmd2", "sd35-turbo"])
def test_what_a_mask_keeps_is_kept_to_the_last_bit(host: Host, name: str) -> None:
    kind = KIND[hs.presets()[name].prediction]
    models = host.model(kind, 0), host.model(kind, 1)
    mask = torch.zeros(1, *SHAPE[2:])
    mask[..., 4:] = 1.0
    latents = start(8)
    planned, sigmas = plan(name, base_guidance=4.0)
    outputs = nodes(host, planned, models, sigmas, latents, mask=mask)
    expected = host.process_out(models[0], host.process_in(models[0], latents))
    assert torch.equal(outputs[..., :4], expected[..., :4])
    assert apart(outputs[..., 4:], latents[..., 4:]) > 0.01


def test_previews_are_x0_of_each_row(host: Host, pair: tuple[Any, Any]) -> None:
    planned, sigmas = plan("dmd2", base_guidance=4.0)
    previews: list[tuple[int, Tensor, int]] = []
    nodes(host, planned, pair, sigmas, seen=lambda *row: previews.append(row))
    states = alone(host, preset_table("dmd2", base_guidance=4.0), pair)
    assert [(step, total) for step, _, total in previews] == [
        (n, len(sigmas) - 1) for n in range(4)
    ]
    for (_, x0, _), state in zip(previews, states, strict=True):
        assert apart(x0, state.x0) <= LIMIT


def test_an_interrupt_stops_before_the_next_row(host: Host, pair: tuple[Any, Any]) -> None:
    planned, sigmas = plan("lightning")
    previews: list[int] = []

    def stop(step: int, x0: Tensor, total: int) -> None:
        previews.append(step)
        if step == 1:
            host.interrupt()

    with pytest.raises(host.interrupted):
        nodes(host, planned, pair, sigmas, seen=stop)
    assert previews == [0, 1]
    assert nodes(host, planned, pair, sigmas).isfinite().all()


def test_noise_that_rows_add_is_of_the_noise_seed(host: Host, pair: tuple[Any, Any]) -> None:
    planned, sigmas = plan("lcm")
    first = nodes(host, planned, pair, sigmas)
    again = nodes(host, planned, pair, sigmas)
    assert torch.equal(first, again)
    assert apart(nodes(host, planned, pair, sigmas, noise_seed=6), first) > 100 * LIMIT


def test_the_models_that_were_given_are_left_as_they_are(host: Host, pair: tuple[Any, Any]) -> None:
    before = [model.get_model_object("model_sampling") for model in pair]
    planned, sigmas = plan("nitrofusion")
    nodes(host, planned, pair, sigmas)
    assert [model.get_model_object("model_sampling") for model in pair] == before


def test_a_plan_in_toml_states_its_rows(host: Host, pair: tuple[Any, Any]) -> None:
    toml = """
        name = "mine"
        [[leg]]
        model = "base"
        steps = 2
        spacing = "even"
        until = "next"
        guidance = 3.0
        [[leg]]
        model = "distilled"
        timesteps = [499, 249]
        update = "ancestral"
    """
    planned, sigmas = plan("lightning", toml=toml)
    assert [step.model for step in planned.table] == ["base", "base", "distilled", "distilled"]
    last = alone(host, planned.table, pair)[-1].x
    outputs = nodes(host, planned, pair, sigmas)
    assert apart(outputs, host.process_out(pair[0], last)) <= LIMIT


REFUSED = [
    ("the distilled model, and Headstart Guider has no distilled MODEL", ("eps", None), {}),
    ("connect the same MODELs to Headstart Plan", ("flow", "flow"), {}),
    ("one is a flow and the other is not", ("eps", "flow"), {}),
    ("which no plan has", ("alien", "eps"), {}),
    ("no rows of table", ("eps", "eps"), {"sigmas": torch.tensor([14.6, 7.0, 0.0])}),
    ("no rows of table", ("eps", "eps"), {"sigmas": torch.tensor([0.0])}),
    ("no rows of table", ("eps", "eps"), {"sigmas": torch.tensor([float("nan"), 0.0])}),
]


@pytest.mark.parametrize(("message", "kinds", "inputs"), REFUSED)
def test_a_wrong_graph_is_refused_with_what_to_do(
    message: str, kinds: tuple[str, str | None], inputs: dict[str, Any], monkeypatch: Any
) -> None:
    host = StandIn(monkeypatch)
    models = tuple(None if kind is None else host.model(kind, 0) for kind in kinds)
    planned, sigmas = plan("lightning")
    with pytest.raises(hs.HeadstartError, match=message):
        nodes(host, planned, models, inputs.get("sigmas", sigmas))  # type: ignore[arg-type]


def test_a_guided_row_needs_a_negative_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    host = StandIn(monkeypatch)
    models = host.model("eps", 0), host.model("eps", 1)
    planned, _ = plan("lightning", base_guidance=4.0)
    with pytest.raises(hs.InputError, match="no negative CONDITIONING"):
        HeadstartGuider().make(planned, [[POSITIVE, {}]], *models)
    planned, _ = plan("lightning")
    assert HeadstartGuider().make(planned, [[POSITIVE, {}]], *models)


def test_models_of_other_latents_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    host = StandIn(monkeypatch)
    models = host.model("eps", 0), host.model("eps", 1)
    models[1].objects["latent_format"] = "another"
    with pytest.raises(hs.InputError, match="latents of two kinds"):
        HeadstartGuider().make(plan("lightning")[0], [[POSITIVE, {}]], *models)


def test_sigmas_cannot_be_split_where_a_row_looks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    host = StandIn(monkeypatch)
    models = host.model("eps", 0), host.model("eps", 1)
    planned, sigmas = plan("sdxl-flash")
    cut = next(n for n, step in enumerate(planned.table) if step.carry)
    with pytest.raises(hs.InputError, match=f"row {cut} .* looks back"):
        nodes(host, planned, models, sigmas[cut:])


def test_guider_and_sampler_belong_together(host: Host, pair: tuple[Any, Any]) -> None:
    planned, sigmas = plan("lightning")
    (guider,) = HeadstartGuider().make(planned, [[POSITIVE, {}]], *pair, [[NEGATIVE, {}]])
    with pytest.raises(hs.InputError, match="connect Headstart Sampler"):
        guider.sample(start(5), torch.zeros(SHAPE), object(), sigmas)
    (sampler,) = HeadstartSampler().make()
    with pytest.raises(hs.InputError, match="connect the GUIDER of Headstart Guider"):
        sampler.sample(guider, sigmas, {}, None, start(5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"toml": "[[leg]]\nmodel = 'base'\nsteps = 4\n", "k": 2}, "states its own k"),
        ({"toml": "[[leg]]\nmodel = 'teacher'\nsteps = 4\n"}, "models here are"),
        (
            {"toml": "[[leg]]\nmodel = 'base'\nsteps = 4\nadapters = { ink = 0.5 }\n"},
            "load them with LoraLoader",
        ),
        ({"toml": "steps = ["}, "not TOML"),
        ({"k": 9}, "k must be a whole number from 1 to 3"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(hs.PlanError, match=message):
        plan("lightning", **settings)


def test_two_lines_install_the_nodes(tmp_path: Path) -> None:
    lines = [line.strip() for line in (comfyui.__doc__ or "").splitlines()]
    two = [line for line in lines if line.startswith(("from headstart", "__all__"))]
    assert len(two) == 2
    options: dict[str, Any] = {}
    exec("\n".join(two), options)
    names = options["NODE_CLASS_MAPPINGS"]
    assert list(names) == list(options["NODE_DISPLAY_NAME_MAPPINGS"])
    assert set(options["__all__"]) < set(options)
    for node in names.values():
        parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
        inputs = node.INPUT_TYPES()
        listed = {name for kind in inputs.values() for name in kind}
        variable = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        assert variable or listed == set(parameters) - {"self"}
        assert len(node.RETURN_TYPES) == len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES))


def test_each_default_makes_the_presets_own_plan() -> None:
    inputs = HeadstartPlan.INPUT_TYPES()["required"]
    defaults = {name: kind[1]["default"] for name, kind in inputs.items() if len(kind) > 1}
    options = {"preset": "dmd2", "mode": "hybrid"} | {
        name: value for name, value in defaults.items() if name not in ("preset", "mode")
    }
    planned, _, text = HeadstartPlan().make(**options)
    assert planned.table == preset_table("dmd2")
    assert "base hands over to distilled" in text
