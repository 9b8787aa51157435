"""What a run costs on a card that is not here: the counts, the roofs, and the budget of SDXL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bundled import needs_pair
from networks import PARAMS, VAE
from torch import Tensor, nn

import headstart_weights
from headstart.checkpoint import blueprint
from headstart.checkpoint.params import UNetParams
from headstart.commands.estimate import FAMILIES
from headstart.cost.cards import CARDS, card_of
from headstart.cost.estimate import (
    Estimate,
    decode_dtype,
    device_ms,
    estimate,
    floor_ms,
    peak_of,
)
from headstart.cost.operators import Kind, Operator, Tally, by_kind, count
from headstart.cost.sizes import FULL, Sizes, sizes_of_family, sizes_of_files
from headstart.cost.stages import Pass, Stage, decode, stages_of, text_pass, unet_pass
from headstart.errors import InputError
from headstart.networks.unet import TransformerBlock
from headstart.plan.by_name import named_pair, named_plan
from headstart.plan.table import StepTable

META = torch.device("meta")
SDXL_BUDGET = {
    "operators": 1097,
    "launches": 1241,
    "GEMM": 447,
    "convolution": 51,
    "attention": 140,
    "gigabytes": 19.18,
}
"""Of one pass of SDXL's UNet at 1024 px, one sample, float16, as a GPU runs it. A change that needs
more fails here; one that needs less lowers the number."""
DECODE_BUDGET = {"operators": 99, "launches": 196, "gigabytes": 35.2}
"""Of one decode at 1024 px in bfloat16, as `Engine.load(dtype="float16")` has it."""


def _empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _one(body: Callable[[], object]) -> Operator:
    (row,) = count(body)
    return row


def _table(mode: str = "hybrid", **settings: Any) -> StepTable:
    options: Any = {"preset": "dmd2", **settings}
    pair = named_pair(mode, options)
    return named_plan(mode, options).compile(pair.schedules, prediction=pair.predictions)


@pytest.fixture(scope="module")
def sdxl() -> Pass:
    return unet_pass(sizes_of_family("sdxl").unet, (4, 128, 128))


@pytest.fixture(scope="module")
def small() -> Sizes:
    return sizes_of_family("sdxl")._replace(unet=PARAMS, vae=VAE, text=())


def test_a_pass_of_sdxl_stays_within_its_budget(sdxl: Pass) -> None:
    whole, kinds = Tally.of(sdxl.row), by_kind(sdxl.row)
    numbers = {"operators": whole.operators, "launches": whole.launches}
    numbers |= {kind.value: kinds[kind].operators for kind in Kind if kind.heavy}
    spent: dict[str, float] = {**numbers, "gigabytes": whole.moved / 1e9}
    over = {name: n for name, n in spent.items() if n > SDXL_BUDGET[name]}
    assert not over, f"more than {SDXL_BUDGET}"
    slack = {name: n for name, n in spent.items() if n < 0.99 * SDXL_BUDGET[name]}
    assert not slack, f"less than {SDXL_BUDGET}: lower the budget, so that it holds"


def test_sdxl_has_the_flops_that_others_counted(sdxl: Pass) -> None:
    """6761 GFLOP with FlopCounterMode over diffusers' UNet, keys and values of the prompt among
    them: one product of all 70 blocks, 60 of 1280 channels and 10 of 640."""
    (read,) = sdxl.prompt
    assert read.kind is Kind.GEMM and read.flops == 2 * 77 * 2048 * 2 * (60 * 1280 + 10 * 640)
    assert 6.760e12 <= read.flops + Tally.of(sdxl.row).flops <= 6.762e12
    sizes = sizes_of_family("sdxl")
    assert 10.3e12 < Tally.of(decode(sizes.vae, (4, 128, 128), 1, torch.float32)).flops < 10.6e12


def test_a_decode_of_sdxl_stays_within_its_budget() -> None:
    tally = Tally.of(decode(sizes_of_family("sdxl").vae, (4, 128, 128), 1, torch.bfloat16))
    spent = {"operators": tally.operators, "launches": tally.launches}
    assert spent == {name: DECODE_BUDGET[name] for name in spent}, "more, or less: lower it"
    assert 0.99 < tally.moved / 1e9 / DECODE_BUDGET["gigabytes"] <= 1


@pytest.mark.parametrize(("rows", "tokens", "words"), [(1, 64, 77), (2, 100, 7)])
def test_a_transformer_block_has_the_flops_of_its_formula(
    rows: int, tokens: int, words: int
) -> None:
    channels, context = 64, 48
    with META:
        block = TransformerBlock(channels, context, heads=4).half()
    x, context_of = _empty(rows, tokens, channels), _empty(rows, words, context)
    found = count(lambda: block(x, context_of))
    square = 2 * rows * tokens * channels * channels
    products = 4 * square + 4 * rows * tokens * tokens * channels
    cross = 2 * square + 2 * 2 * rows * words * context * channels
    cross += 4 * rows * tokens * words * channels
    assert Tally.of(found).flops == products + cross + (8 + 4) * square
    assert by_kind(found)[Kind.ATTENTION].operators == 2


def test_bytes_are_of_every_operand_once() -> None:
    a, row = _empty(4, 8), _empty(8)
    assert _one(lambda: a + row)[4:6] == (2 * (32 + 8 + 32),) * 2
    assert _one(lambda: a * a).moved == 2 * (32 + 32)  # one operand, named twice
    assert _one(lambda: a + row.expand(4, 8)).moved == 2 * (32 + 8 + 32)
    assert _one(lambda: a.add_(row)).moved == 2 * (32 + 8 + 32)
    assert _one(lambda: a.copy_(row)).moved == 2 * (8 + 32)  # what was there is not read
    table, ids = _empty(1000, 8), _empty(3, dtype=torch.int64)
    assert _one(lambda: F.embedding(ids, table)).moved == 2 * 2 * 3 * 8


def test_what_launches_nothing_is_not_counted() -> None:
    a = _empty(4, 8)
    assert count(lambda: a.view(8, 4).t()[:2].unsqueeze(0).expand(3, 2, 8)) == ()
    assert count(lambda: (torch.empty_like(a), a.detach())) == ()
    assert count(lambda: torch.arange(9).float() * 2) == ()  # the host's


def test_a_convolution_tells_its_bias_and_the_copies_into_another_layout() -> None:
    x, y = 2 * 4 * 64, 2 * 8 * 64
    with META:
        plain = nn.Conv2d(4, 8, 3, padding=1, bias=False).half()
        biased = nn.Conv2d(4, 8, 3, padding=1).half()
        last = nn.Conv2d(4, 8, 3, padding=1, bias=False).half()
    nn.Module.to(last, memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = _empty(1, 4, 8, 8)
    least = _one(lambda: plain(image)).least
    assert _one(lambda: plain(image)).launches == 1
    assert _one(lambda: biased(image)).launches == 2
    assert _one(lambda: biased(image)).moved == least + 2 * 8 + 2 * y
    assert _one(lambda: last(image)).moved == least + 2 * x
    assert _one(lambda: last(image)).launches == 2
    ordered = image.to(memory_format=torch.channels_last)
    assert _one(lambda: last(ordered)).launches == 1
    tensors: list[Tensor] = []
    count(lambda: tensors.append(last(image)))
    assert tensors[0].is_contiguous(memory_format=torch.channels_last)


def test_an_attention_is_one_operator_in_every_dtype_and_width() -> None:
    for dtype, width, mask in (
        (torch.float16, 64, None),
        (torch.float32, 64, None),
        (torch.float16, 512, None),
        (torch.float16, 64, _empty(1, 1, 16, 16)),
    ):
        q = _empty(2, 3, 16, width, dtype=dtype)
        row = _one(lambda q=q, m=mask: F.scaled_dot_product_attention(q, q, q, attn_mask=m))
        assert row.kind is Kind.ATTENTION
        assert row.flops == 4 * 2 * 3 * 16 * 16 * width


def test_headstarts_kernels_are_counted_as_they_run_on_a_gpu() -> None:
    rows = unet_pass(PARAMS, (4, 8, 8)).row
    names = {row.name for row in rows}
    assert {"groupnorm_silu", "geglu"} <= names
    assert "gelu" not in names


def test_an_operator_takes_the_higher_of_its_roofs() -> None:
    card = card_of("h100")
    bound = Operator("mm", Kind.GEMM, torch.float16, 10**12, 10, 10, 1)
    moved = Operator("add", Kind.POINTWISE, torch.float16, 0, 3350 * 10**6, 10, 1)
    assert device_ms([bound], card) == pytest.approx(1e12 / 989.5e12 * 1e3)
    assert device_ms([moved], card) == pytest.approx(1.0)
    assert device_ms([bound, moved], card) == pytest.approx(1.0 + 1e12 / 989.5e12 * 1e3)
    assert floor_ms([bound, moved], card) == device_ms([bound], card)


def test_float32_runs_convolutions_as_tf32_and_products_in_float32() -> None:
    card = card_of("a100")
    assert peak_of(card, torch.float32, Kind.CONV) == 156
    assert peak_of(card, torch.float32, Kind.GEMM) == 19.5
    assert peak_of(card_of("t4"), torch.float32, Kind.CONV) == 8.1
    with pytest.raises(InputError, match="no matrix units for bfloat16"):
        peak_of(card_of("t4"), torch.bfloat16, Kind.GEMM)


def test_full_sizes_have_the_parameters_that_are_published() -> None:
    """Of the checkpoints of stable-diffusion-v1-5, -2-1 and -xl-base-1.0."""

    def sizes(name: str) -> tuple[int, int, list[int]]:
        own = sizes_of_family(name)
        shapes: list[Any] = [blueprint.unet(own.unet), blueprint.vae(own.vae)]
        shapes += [blueprint.clip(params) for params, _ in own.text]
        counts = [sum(torch.Size(s).numel() for s in rows.values()) for rows in shapes]
        assert len(shapes[0]) == own.family.signature.tensors
        return counts[0], counts[1], counts[2:]

    assert FULL == FAMILIES
    assert sizes("sd15") == (859_520_964, 83_653_863, [123_060_480])
    assert sizes("sd21") == (865_910_724, 83_653_863, [340_387_840])
    assert sizes("sdxl") == (2_567_463_684, 83_653_863, [123_060_480, 694_659_840])


@needs_pair
def test_sizes_of_files_are_those_that_are_loaded() -> None:
    import headstart as hs

    paths = {role: headstart_weights.path(role) for role in ("distilled", "base")}
    sizes = sizes_of_files(paths)
    engine = hs.Engine.demo(device="cpu")
    for role, size in sizes.items():
        network: Any = engine.denoisers[role]
        codec: Any = engine.vae
        assert size.unet == network.params and size.vae == codec.params
        (tower,) = engine.text.towers
        assert [params for params, _ in size.text] == [tower.params]


def _named(stages: tuple[Stage, ...]) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages}


def test_a_guided_row_has_twice_the_samples_and_the_text_is_encoded_for_both(small: Sizes) -> None:
    models = {"base": small, "distilled": small}
    plain = stages_of(models, _table(), pixels=(16, 16), batch=2)
    guided = stages_of(models, _table(base_guidance=5.0), pixels=(16, 16), batch=2)
    assert [stage[:3] for stage in plain] == [
        *(("text", 1, 1), ("base prompt", 1, 2), ("base pass", 1, 2)),
        *(("distilled prompt", 1, 2), ("distilled pass", 3, 2), ("step", 1, 0), ("decode", 1, 2)),
    ]
    assert [stage[:3] for stage in guided][:5] == [
        *(("text", 1, 2), ("base prompt", 1, 4), ("base pass", 1, 4)),
        *(("distilled prompt", 1, 2), ("distilled pass", 3, 2)),
    ]
    base, doubled = (Tally.of(_named(stage)["base pass"].operators) for stage in (plain, guided))
    assert doubled.operators == base.operators
    # All but the embeddings of one number, which is expanded, is twice the work.
    assert doubled.flops == 2 * base.flops
    # Networks of one size are counted once.
    assert _named(plain)["base pass"].operators is _named(plain)["distilled pass"].operators


def test_five_images_two_at_once_are_three_calls_and_their_rest_has_its_own_line(
    small: Sizes,
) -> None:
    models = {"base": small, "distilled": small}
    whole = _named(stages_of(models, _table(), pixels=(16, 16), batch=5))
    parts = _named(stages_of(models, _table(), pixels=(16, 16), batch=5, chunks=(2, 1, 4)))
    called = {name: stage[1:3] for name, stage in parts.items() if "distilled" in name}
    assert called == {
        **{"distilled prompt of 2": (2, 2), "distilled prompt of 1": (1, 1)},
        **{"distilled pass of 2": (6, 2), "distilled pass of 1": (3, 1)},
    }
    assert parts["decode"][1:3] == (5, 1)
    assert by_kind(parts["decode"].operators)[Kind.NORM].operators > 2 * 4, "moments, and each band"
    for kind in ("pass", "decode"):
        spent = (
            sum(s.times * Tally.of(s.operators).flops for n, s in stage.items() if kind in n)
            for stage in (whole, parts)
        )
        first, second = spent
        assert second >= first  # bands convolve the rows beside them again
        assert second == first or kind == "decode"


def test_a_network_without_cross_attention_reads_no_prompt(small: Sizes) -> None:
    plain = replace(PARAMS, down=tuple(replace(level, depths=(0,)) for level in PARAMS.down))
    plain = replace(plain, up=tuple(replace(level, depths=(0, 0)) for level in plain.up), mid=None)
    models = dict.fromkeys(("base", "distilled"), small._replace(unet=plain))
    names = [level.name for level in stages_of(models, _table(), pixels=(16, 16))]
    assert names == ["text", "base pass", "distilled pass", "step", "decode"]


def test_a_step_is_one_kernel_a_row_and_one_where_noise_is_drawn(small: Sizes) -> None:
    models = {"base": small, "distilled": small}
    table = _table()
    steps = _named(stages_of(models, table, pixels=(16, 16)))["step"].operators
    draws = sum(row.name == "philox_normal" for row in steps)
    assert sum(row.name == "fused_step_into" for row in steps) == len(table)
    assert draws == 1 + sum(step.add != 0 for step in table)


def test_the_decoder_is_counted_in_the_dtype_that_a_card_decodes_in(small: Sizes) -> None:
    """As `engine.parts.decoder_dtype`: bfloat16 where a card has it, from Ampere on."""
    for name in CARDS:
        expected = torch.float32 if name in ("t4", "v100") else torch.bfloat16
        assert decode_dtype(card_of(name), torch.float16) is expected
        assert decode_dtype(card_of(name), torch.float32) is torch.float32
    models = {"base": small, "distilled": small}
    options: Any = {"pixels": (16, 16)}
    assert estimate(models, _table(), card_of("t4"), **options).decode_dtype is torch.float32
    half = estimate(models, _table(), card_of("t4"), vae_dtype=torch.float16, **options)
    assert half.decode_dtype is torch.float16
    with pytest.raises(InputError, match="no matrix units for bfloat16"):
        estimate(models, _table(), card_of("t4"), vae_dtype=torch.bfloat16, **options)


def test_an_encoder_is_counted_once_a_text(small: Sizes) -> None:
    (first, _) = sizes_of_family("sdxl").text
    one, two = (text_pass((first,), texts) for texts in (1, 2))
    assert Tally.of(two).flops == 2 * Tally.of(one).flops
    layer = 2 * 77 * (4 * 768 * 768 + 2 * 768 * 3072) + 4 * 77 * 77 * 768
    assert Tally.of(one).flops == 11 * layer, "the last of its 12 layers is never read"


def _estimate(small: Sizes, params: UNetParams = PARAMS) -> Estimate:
    models = {"base": small._replace(unet=params), "distilled": small}
    return estimate(models, _table(), card_of("h100"), pixels=(16, 16))


def test_stages_add_up_and_nothing_is_below_its_floor(small: Sizes) -> None:
    estimate = _estimate(small)
    total = estimate.total
    assert total.device_ms == pytest.approx(sum(line.device_ms for line in estimate.lines))
    assert total.tally.flops == sum(line.tally.flops for line in estimate.lines)
    assert all(0 <= line.floor_ms <= line.device_ms for line in estimate.lines)
    assert estimate.graph_ms == pytest.approx(total.device_ms + total.graph_ms)
    assert estimate.eager_ms >= max(estimate.graph_ms, total.eager_ms)
    for stage, kinds in estimate.kinds.items():
        (line,) = (line for line in estimate.lines if line.stage == stage)
        assert sum(ms for _, ms in kinds.values()) * line.times == pytest.approx(line.device_ms)
