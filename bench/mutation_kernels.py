"""Do the tests of the kernels notice a mistake in one? One mistake at a time must turn one red.

python bench/mutation_kernels.py [--minutes 10] [--out bench/results/mutation_kernels.json]

The tests run the PTX that Triton emits for sm_90 in an emulator. A run that is ended goes on where
it was; see `mutations.py`.
"""

# ruff: noqa: E501  (a table: a row is a line)

from __future__ import annotations

import sys
from functools import partial

from mutations import Mutation, main, tests

DEVICE, IMPL = "kernels/headstart_kernels/device", "kernels/headstart_kernels/impl"
STEP, NORMAL, RGB = f"{DEVICE}/step.py", f"{DEVICE}/normal.py", f"{DEVICE}/rgb.py"
PICTURE, NORM, GATE = f"{DEVICE}/picture.py", f"{DEVICE}/norm.py", f"{DEVICE}/gate.py"
LAYERNORM = f"{DEVICE}/layernorm.py"
ADAPTER, DRAW = f"{DEVICE}/adapter.py", f"{DEVICE}/draw.py"
IMPL_STEP, IMPL_NORM, IMPL_RGB = (f"{IMPL}/triton_{n}.py" for n in ("step", "norm", "rgb"))
in_step, in_pictures, in_layers = (
    partial(tests, f"ptx/test_{name}.py") for name in ("step", "pictures", "layers")
)
in_fused_step = partial(tests, "kernels/test_fused_step.py")
in_winograd = partial(tests, "kernels/test_winograd.py")

BITS = in_step("bits_of_every_prediction_and_update[sm_90-torch.float16]")
SAMPLE_ROWS = in_step("rows_of_samples_have_the_reference_bits[sm_90-torch.float32]")
GUARD = in_step("in_place_unaligned_and_nothing_beside_the_outputs_is_written")
GUIDANCE = in_step("guidance_of_each_sample_and_the_row_that_follows")
SKIPPED = in_step("terms_with_coefficient_0_are_neither_read_nor_added")
LAST = in_step("channels_last_networks_with_a_picture_on_the_way")
NOTICED = in_step("a_sample_with_nan_or_infinity_is_noticed_on_the_way")
FLAGGED = in_step("flags_of_parts_cost_no_launch_beside_the_steps_own")
NORMALS = in_pictures("normals_have_the_reference_bits")
TAILS = in_pictures("a_long_draw_meets_both_tails_with_the_reference_bits")
PREVIEWS = in_pictures("previews_have_the_reference_bytes")
DECODED = in_pictures("pixels_become_the_reference_bytes")
NORMED = in_layers("groupnorm_silu_is_within_its_budget[sm_90-layout0-torch.float16]")
QUIET = in_layers("a_quiet_image_is_normalised_with_its_epsilon")
SHIFTED = in_layers("a_shift_of_each_channel_before_the_norm_and_a_norm_without_silu")
SUMMED = in_layers("a_residual_sum_has_torchs_bits_and_its_norm_is_within_its_budget")
GATED = in_layers("geglu_is_within_its_budget")
ADDED = in_layers("low_rank_addition_is_within_its_budget")
RANKS = in_layers("any_rank_fits_into_registers_and_shared_memory")
IDLE = in_layers("a_sample_of_strength_0_reads_and_writes_nothing")

API = "kernels/headstart_kernels/api.py"

C = "kernels/headstart_kernels/native"
COMPILED = tests("kernels/test_dispatch.py", "there_are_c_kernels_wherever_there_is_a_compiler")


def in_c(name: str, file: str = "native") -> tuple[str, ...]:
    """And the one that fails where the library's own proof refuses it: the others are skipped."""
    return (*COMPILED, *tests(f"kernels/test_{file}.py", name))


IN_C_STEP = in_c("every_step_has_the_bits_of_the_reference")
IN_C_LONG = in_c("what_is_longer_than_a_piece_is_the_same_on_any_number_of_threads")


def offsets(name: str) -> tuple[str, ...]:
    return tests("ptx/test_offsets.py", f"the_last_block_ends_where_a_huge_tensor_ends[{name}]")


IN_STEP = (
    ("store past the end", "tl.store(x_next_ptr + at, y, mask=inside)", "tl.store(x_next_ptr + at, y)", GUARD),
    ("store x0 past the end", "tl.store(x0_ptr + at, x0, mask=inside)", "tl.store(x0_ptr + at, x0)", GUARD),
    ("read the state past its end", "tl.where((c_skip != 0.0) | (keep != 0.0), count, 0)", "BLOCK", GUARD),
    ("read noise that is not added", "pixel < tl.where(add != 0.0, count, 0)", "inside", SKIPPED),
    ("read F_uncond that is not needed", "pixel < tl.where(scale != 1.0, count, 0)", "inside", SKIPPED),
    ("swap keep and add", "tl.load(row_ptr + _KEEP), tl.load(row_ptr + _ADD)", "tl.load(row_ptr + _ADD), tl.load(row_ptr + _KEEP)", BITS),
    ("swap c_skip and c_out", "tl.load(row_ptr + _C_SKIP), tl.load(row_ptr + _C_OUT)", "tl.load(row_ptr + _C_OUT), tl.load(row_ptr + _C_SKIP)", BITS),
    ("this row's c_in for the next input", "tl.load(next_ptr + _C_IN)", "tl.load(row_ptr + _C_IN)", GUIDANCE),
    ("look past the last row", "tl.minimum(row + 1, last)", "(row + 1)", BITS),
    ("drop guidance", "f = tl.where(scale == 1.0, f, u + scale * (f - u))", "f = f + 0.0 * u", BITS),
    ("guide in another order", "u + scale * (f - u))", "f + (scale - 1.0) * (f - u))", BITS),
    ("let NaN in at guidance 1", "f = tl.where(scale == 1.0, f, u + scale * (f - u))", "f = u + scale * (f - u)", GUIDANCE),
    ("the first sample's guidance for all", "_number(guidance_ptr, sample, scale)", "_number(guidance_ptr, 0, scale)", GUIDANCE),
    ("mix in another order", "x0 + keep * (x - x0))", "keep * x + (1.0 - keep) * x0)", BITS),
    ("forget the term that looks back", "y + carry * (x0 - previous))", "y)", BITS),
    ("look back with the wrong sign", "carry * (x0 - previous)", "carry * (previous - x0)", BITS),
    ("forget which row of the plan is row 0", "_noise(element, seed, image, row + first_row, ", "_noise(element, seed, image, row, ", in_step("noise_drawn_in_registers_has_the_bits_of_philox_normal")),
    ("the first sample's row for all", "_number(step_ptr, sample * STEP_STRIDE, row)", "_number(step_ptr, 0, row)", SAMPLE_ROWS),
    ("the first sample's plan for all", "_number(first_row_ptr, sample, first_row)", "_number(first_row_ptr, 0, first_row)", SAMPLE_ROWS),
    ("scale all by the first sample's row", "_number(step_ptr, part, row)", "_number(step_ptr, 0, row)", SAMPLE_ROWS),
    ("scale the first sample alone", "first = part * count + start", "first = start", SAMPLE_ROWS),
    ("a sample's place in 32 bits", "part = tl.program_id(1).to(tl.int64)", "part = tl.program_id(1)", offsets("scale_input, row a sample")),
    ("the same noise in every channel", "        element = element + plane\n", "", LAST),
    ("fill one half of a guided pair", "tl.store(x_in_ptr + (copy * size + at), x_in, mask=inside)", "tl.store(x_in_ptr + at, x_in, mask=inside)", BITS),
    ("the next input from x0", "x_in = (c_in * y)", "x_in = (c_in * x0)", BITS),
    ("show x' and not x0", "_mixed(r, g, b, x0, factors_ptr + channel", "_mixed(r, g, b, y, factors_ptr + channel", LAST),
    ("the first sample's F for all", "quads = (sample * plane + start) * 4", "quads = start * 4", LAST),
    ("swap two channels of a pixel", "tl.join(planes[0], planes[2]), tl.join(planes[1], planes[3])", "tl.join(planes[1], planes[2]), tl.join(planes[0], planes[3])", LAST),
    ("offsets in 32 bits", "sample = tl.program_id(1).to(tl.int64)", "sample = tl.program_id(1)", offsets("fused_step")),
    ("no look at the channels before the last", "largest = tl.maximum(largest, tl.where(inside, _magnitude(x0), 0))", "largest = tl.where(inside, _magnitude(x0), 0)", NOTICED),
    ("take NaN for a number", "mask=largest >= _INFINITY", "mask=largest == _INFINITY", NOTICED),
    ("take NaN for a number, with flags of parts", "tl.max(largest, 0) >= _INFINITY", "tl.max(largest, 0) == _INFINITY", FLAGGED),
    ("blame the first sample", "_flag(finite_ptr + sample * parts", "_flag(finite_ptr", NOTICED),
    ("a program's flags side by side", "tl.num_programs(0) * tl.arange(0, FLAGS)", "tl.arange(0, FLAGS)", FLAGGED),
    ("flags past the end", "tl.zeros_like(part) + fine, mask=part < parts)", "tl.zeros_like(part) + fine)", FLAGGED),
    ("the first row's scale for every row", "tl.load(table_ptr + row * _WIDTH + _C_IN)", "tl.load(table_ptr + _C_IN)", in_step("scale_input_has_the_reference_bits")),
)  # fmt: skip
IN_NORMAL = (
    ("one round less", "tl.static_range(_ROUNDS)", "tl.static_range(_ROUNDS - 1)", NORMALS),
    ("another multiplier", "tl.umulhi(c0, _M0), c0 * _M0", "tl.umulhi(c0, _M1), c0 * _M1", NORMALS),
    ("swap the keys' increments", "k0 + _W0, k1 + _W1", "k0 + _W1, k1 + _W0", NORMALS),
    ("a row late", "(step + 1).to(tl.uint32)", "step.to(tl.uint32)", NORMALS),
    ("lose the seed's upper half", "(seed >> 32).to(tl.uint32)", "(seed >> 31).to(tl.uint32)", NORMALS),
    ("forget the sample", "zero + sample.to(tl.uint32)", "zero", NORMALS),
    ("an eighth of a turn off", "(angle + (1 << 29)) >> 30", "(angle + (1 << 28)) >> 30", NORMALS),
    ("swap sine and cosine", "tl.where(odd, sine, cosine)", "tl.where(odd, cosine, sine)", NORMALS),
    ("lose a sign", "_signed(tl.where(odd, cosine, sine), quarter & 2)", "tl.where(odd, cosine, sine)", NORMALS),
    ("small radii from the rounded word", "f = tl.where(upper, -u, fraction)", "f = tl.where(upper, (1.0 - u) - 1.0, fraction)", TAILS),
    ("half a step of the word lost", "* _UNIT + _HALF", "* _UNIT", NORMALS),
    ("normals in another order", "tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))", "tl.interleave(tl.interleave(n0, n1), tl.interleave(n2, n3))", NORMALS),
    ("the wrong lane", "lane = element & 3", "lane = (element + 1) & 3", LAST),
)  # fmt: skip
IN_DRAW = (
    ("a block counted by elements", "start >> 2", "start", TAILS),
    ("normals past the end", ", mask=offset < count - start", "", NORMALS),
    ("the first image's row for all", "tl.load(step_ptr + image * STEP_STRIDE)", "tl.load(step_ptr)", NORMALS),
    ("the first image's seed for all", "tl.load(seeds_ptr + image)", "tl.load(seeds_ptr)", NORMALS),
)  # fmt: skip
IN_RGB = (
    ("levels rounded down", "unit * 127.5 + 127.5 + _ROUNDER", "unit * 127.5 + 127.0 + _ROUNDER", DECODED),
    ("white overflows", "unit = tl.where(low <= 1.0, low, 1.0)", "unit = low", DECODED),
    ("NaN is not black", "tl.where(pixel >= -1.0, pixel, -1.0)", "tl.where(pixel < -1.0, -1.0, pixel)", DECODED),
    ("swap two bytes of a word", "g1 | (b1 << 8) | (r2 << 16)", "b1 | (g1 << 8) | (r2 << 16)", DECODED),
    ("swap two words of a quad", "tl.join(first, third), tl.join(second, second)", "tl.join(first, second), tl.join(third, second)", DECODED),
    ("a fourth word of a quad", "& (lane < 3)", "& (lane < 4)", DECODED),
    ("bytes past the end", "inside = pixel < count\n", "inside = pixel < BLOCK\n", DECODED),
)  # fmt: skip
IN_PICTURE = (
    ("one row of an upscaled one", "for repeat in range(UPSCALE):", "for repeat in range(1):", PREVIEWS),
    ("stretched and not repeated", "(start + pixel) // UPSCALE", "(start + pixel) % width", PREVIEWS),
    ("no bias on green", "+ tl.load(bias_ptr + 1)\n", "\n", PREVIEWS),
    ("blue by green's factor", "tl.load(factors_ptr + channel * 3 + 2)", "tl.load(factors_ptr + channel * 3 + 1)", PREVIEWS),
    ("green for blue", "tl.load(at + plane + plane, mask", "tl.load(at + plane, mask", DECODED),
    ("pixels past the end", "inside = offset < count - start", "inside = offset < BLOCK", DECODED),
)  # fmt: skip
IN_NORM = (
    ("statistics in the input's dtype", "x = tl.load(start + at, mask=inside, other=0.0).to(tl.float32)", "x = tl.load(start + at, mask=inside, other=0.0)", NORMED),
    ("deviations of what is not there", "deviation = tl.where(inside, x - mean[None, :], 0.0)", "deviation = x - mean[None, :]", NORMED),
    ("a whole tile's count", "count = tl.minimum(plane - tile * PIXELS, PIXELS).to(tl.float32)\n    mean", "count = (plane * 0 + PIXELS).to(tl.float32)\n    mean", NORMED),
    ("forget how far apart the tiles are", "spread + count * difference * difference", "spread", NORMED),
    ("the unbiased variance", "tl.div_rn(tl.sum(square, 0), size)", "tl.div_rn(tl.sum(square, 0), size - 1.0)", NORMED),
    ("forget epsilon", "tl.div_rn(tl.sum(square, 0), size) + eps", "tl.div_rn(tl.sum(square, 0), size)", QUIET),
    ("epsilon outside the root", "tl.sqrt_rn(tl.div_rn(tl.sum(square, 0), size) + eps)", "tl.sqrt_rn(tl.div_rn(tl.sum(square, 0), size)) + eps", QUIET),
    ("forget the mean", "bias - mean * scale", "bias", NORMED),
    ("forget SiLU", "        y = y / (1.0 + tl.exp(-y))", "        y = y + 0.0", NORMED),
    ("SiLU where none is wanted", "    if SILU:\n", "    if True:\n", SHIFTED),
    ("a mean without the shift", "        mean += _load(", "        _load(", SHIFTED),
    ("a shift that moves the mean alone", "        mean = mean - _load(", "        _load(", SHIFTED),
    ("the first sample's shift for all", "first_added = sample * channels + group", "first_added = group", SHIFTED),
    ("one channel's shift for the group", "    if added_ptr is not None:\n        mean += _load(added_ptr + channel, inside)", "    if added_ptr is not None:\n        mean += tl.load(added_ptr + tl.min(channel, 0)).to(tl.float32)", SHIFTED),
    ("the first sample's scale for all", "scale = tl.load(scale_ptr + sample * channels + column", "scale = tl.load(scale_ptr + column", in_layers("groupnorm_silu_is_within_its_budget")),
    ("offsets in 32 bits", "    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]\n    column = tl.program_id(1).to(tl.int64)", "    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]\n    column = tl.program_id(1)", offsets("groupnorm apply")),
)  # fmt: skip
IN_LAYERNORM = (
    ("norm of the first term", "h, count = rounded.to(tl.float32)", "h, count = _load(x_ptr + row + column, inside)", SUMMED),
    ("norm of a sum not rounded", "h, count = rounded.to(tl.float32)", "h, count = h", SUMMED),
    ("deviations of what is not there", "deviation = tl.where(inside, h - mean, 0.0)", "deviation = h - mean", SUMMED),
    ("forget epsilon", "tl.sqrt_rn(variance + eps)", "tl.sqrt_rn(variance)", in_layers("a_row_of_equal_numbers_is_normalised_with_its_epsilon")),
    ("forget the mean", "n = deviation * inverse", "n = h * inverse", SUMMED),
    ("the root itself", "inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))", "inverse = tl.sqrt_rn(variance + eps)", SUMMED),
    ("write past the row", "tl.store(n_ptr + row + column, n.to(n_ptr.dtype.element_ty), mask=inside)", "tl.store(n_ptr + row + column, n.to(n_ptr.dtype.element_ty))", SUMMED),
    ("offsets in 32 bits", "tl.program_id(0).to(tl.int64) * width", "tl.program_id(0) * width", offsets("add_layernorm")),
)  # fmt: skip
IN_GATE = (
    ("erf of the gate itself", "tl.erf(gate * _ROOT_HALF)", "tl.erf(gate)", GATED),
    ("gate with the first half", "x_ptr + row * 2 * width + width + column", "x_ptr + row * 2 * width + column", GATED),
    ("write past the row", "y.to(y_ptr.dtype.element_ty), mask=inside", "y.to(y_ptr.dtype.element_ty)", GATED),
    ("offsets in 32 bits", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)", offsets("geglu")),
)  # fmt: skip
IN_ADAPTER = (
    ("forget the strength", "strength * change", "change", ADDED),
    ("the first sample's strength for all", "strength = tl.load(strength_ptr + sample)", "strength = tl.load(strength_ptr)", ADDED),
    ("work for strength 0", "inside = token < tl.where(strength != 0.0, tokens, 0)", "inside = token < tokens", IDLE),
    ("low rank for strength 0", "tl.where(active, tokens, 0), tl.where(active, rank, 0)", "tokens, rank", IDLE),
    ("one tile of the width", "range(0, width, INNER)", "range(0, INNER, INNER)", RANKS),
    ("one tile of the rank", "range(0, rank, RANK)", "range(0, RANK, RANK)", RANKS),
    ("replace y", "tl.load(at, mask=mask, other=0.0).to(tl.float32) + strength", "strength", ADDED),
    ("write past the rank", "mask = inside[:, None] & (component < rank)[None, :]\n    h = total", "mask = inside[:, None] & (component < RANK)[None, :]\n    h = total", ADDED),
)  # fmt: skip
IN_IMPL = (
    (IMPL_STEP, "pack a picture at any address", " and picture.rgb.data_ptr() % 4 == 0", "", in_step("a_picture_may_lie_at_any_address")),
    (IMPL_STEP, "blocks of four where there are none", "WHOLE_BLOCKS=channels == 1 or plane % 4 == 0", "WHOLE_BLOCKS=True", LAST),
    (IMPL_STEP, "lose the state behind a view", "    outputs.x_next.copy_(inner.x_next)\n", "", in_step("states_that_are_views_of_larger_ones")),
    (IMPL_STEP, "the coefficients of another row", "row = host_row(table, step)\n    following", "row = host_row(table, 0)\n    following", in_step("a_row_on_the_host_travels_as_numbers")),
    (IMPL_STEP, "read channels-last as planes", "f_cond_ptr=inputs.f_cond if f_last else inputs.f_cond.contiguous()", "f_cond_ptr=inputs.f_cond", in_step("states_that_are_views_of_larger_ones")),
    (IMPL_STEP, "one flag for several programs", "    if parts < programs:\n", "    if False:\n", NOTICED),
    (IMPL_NORM, "weights with strides read without", "    weight, bias = weight.contiguous(), bias.contiguous()\n", "", in_layers("an_image_of_one_pixel_and_weights_with_strides")),
    (IMPL_NORM, "one block of channels", "grid = (tiles, blocks(channels, across), batch)", "grid = (tiles, 1, batch)", NORMED),
    (IMPL_NORM, "a shift with strides read without", "shift.contiguous()", "shift", SHIFTED),
    (f"{IMPL}/triton_layernorm.py", "weights with strides read without", "weight.contiguous(), bias.contiguous()", "weight, bias", SUMMED),
    (IMPL_RGB, "pack rows of any length", "PACKED=line * upscale % 4 == 0", "PACKED=True", PREVIEWS),
    (IMPL_STEP, "a row a sample, taken for one", "STEP_STRIDE=step.ndim if isinstance(step, Tensor) else 0", "STEP_STRIDE=0", SAMPLE_ROWS),
    (IMPL_STEP, "rows read as if they were dense", '"step_ptr": step.contiguous()', '"step_ptr": step', SAMPLE_ROWS),
    (API, "a pair the wrong way round", "f_uncond, f_cond = f.split", "f_cond, f_uncond = f.split", in_fused_step("a_guided_pair_may_be_one_tensor")),
    (API, "a pair for a row of one pass", "    if single or inputs", "    if inputs", in_fused_step("a_pair_for_a_row_of_one_pass_is_an_error")),
    ("kernels/headstart_kernels/impl/native_step.py", "C: a pair the wrong way round", "f_at, u_at = f_at + count * f.itemsize, f_at", "u_at = f_at + count * f.itemsize", tests("kernels/test_native.py", "a_loops_own_step_has_the_bits_of_any_step")),
    ("kernels/headstart_kernels/launch.py", "let the compiler contract", '"enable_fp_fusion": False', '"enable_fp_fusion": True', BITS),
)  # fmt: skip
IN_C = (
    (f"{C}/step.h", "C: guide in another order", "f = u + s->guidance * (f - u);", "f = f + (s->guidance - 1.0f) * (f - u);", COMPILED),
    (f"{C}/step.h", "C: guide at 1", "a->f_uncond && s->guidance != 1.0f", "a->f_uncond != 0", IN_C_STEP),
    (f"{C}/step.h", "C: look at x where its coefficient is 0", "if (a->c_skip != 0.0f) terms |= SKIPPED;", "terms |= SKIPPED;", IN_C_STEP),
    (f"{C}/step.h", "C: the first sample's guidance for all", "a->guidance[sample]", "a->guidance[0]", IN_C_STEP),
    (f"{C}/step.h", "C: noise of another element", "aim(drawn, (uint32_t)(first >> 2))", "aim(drawn, (uint32_t)(first >> 3))", IN_C_STEP),
    (f"{C}/step.h", "C: begin at the block", "noise + skipped);", "noise);", IN_C_STEP),
    (f"{C}/step.h", "C: forget the step of the last run", "return w.bad | step_range(&a, &s, terms, w.i, count, noise);", "return w.bad;", COMPILED),
    (f"{C}/step.h", "C: fill one half of a guided pair", "copy * size + at, s.x_next", "at, s.x_next", COMPILED),
    (f"{C}/step.h", "C: feed one half of a guided pair", "s.x_in[1] = s.x_in[0] + size", "s.x_in[1] = s.x_in[0]", COMPILED),
    (f"{C}/step.h", "C: infinity is finite", "0x7fffffffu) + 0x00800000u", "0x7fffffffu) + 0x007fffffu", in_c("finite_says_which_samples_have_an_x0_without_nan_and_infinity", "step_into")),
    (f"{C}/normal.h", "C: normals before their step is done", "round_of(from, &c, 8), cosine(&p);\n  round_of(from, &c, 9), finish(&p, out);", "round_of(from, &c, 8), cosine(&p), finish(&p, out);\n  round_of(from, &c, 9), besides(context, 7);", COMPILED),
    (f"{C}/step.h", "C: past the caches at any address", "(uintptr_t)s->x0 % WIDTH == 0", "1", in_c("large_steps_into_places_that_are_not_aligned_and_over_the_row_before")),
    (f"{C}/step.h", "C: rooms of a CHUNK for a PIECE", "draws(a) && wide &&", "draws(a) &&", in_c("steps_of_any_length_with_the_terms_of_every_sampler")),
    (f"{C}/team.h", "C: forget the piece after the first", "begin = number % each * PIECE;", "begin = 0;", IN_C_LONG),
    (f"{C}/kernels.c", "C: the last normals are forgotten", "  memcpy(out + first, room, (size_t)(part.end - first) * sizeof(float));\n", "", IN_C_LONG),
    (f"{C}/normal.h", "C: one round less", "round < ROUNDS; round++) round_of", "round < ROUNDS - 1; round++) round_of", COMPILED),
    (f"{C}/normal.h", "C: one round less on the way", "round_of(from, &c, 8), cosine(&p);", "cosine(&p);", COMPILED),
    (f"{C}/normal.h", "C: a row late", "(uint32_t)(row + 1)", "(uint32_t)row", COMPILED),
    (f"{C}/normal.h", "C: lose the seed's upper half", "((uint64_t)seed >> 32)", "((uint64_t)seed >> 31)", COMPILED),
    (f"{C}/normal.h", "C: go on where another draw ended", "if (d->ready && d->block == block) return;", "if (d->ready) return;", IN_C_STEP),
    (f"{C}/normal.h", "C: blocks in the order of lanes", "(uint64_t)(lane % 2 * (BLOCKS / 2) + lane / 2)", "(uint64_t)lane", COMPILED),
    (f"{C}/normal.h", "C: sine and cosine never swapped", "(quarter & 0x40000000u) != 0", "(quarter & 0x40000000u) == 1", COMPILED),
    (f"{C}/normal.h", "C: a half turn negates one", "(ints)(quarter & 0x80000000u)", "(ints)(quarter & 0u)", COMPILED),
    (f"{C}/numbers.h", "C: float16 infinity is a number", "0x1p16f ? 0x7f800000u", "0x1p17f ? 0x7f800000u", in_c("every_16_bit_number_is_read_exactly")),
    (f"{C}/numbers.h", "C: ties away from even", "(magnitude + 0xfffu + (magnitude >> 13 & 1)", "(magnitude + 0x1000u", in_c("float32_is_rounded_to_16_bits_as_torch_rounds")),
    (f"{C}/numbers.h", "C: bfloat16 cut off", "(bits + 0x7fffu + (bits >> 16 & 1)) >> 16", "bits >> 16", COMPILED),
    (f"{C}/picture.h", "C: NaN is not black", "pixel >= -1.0f ? pixel : -1.0f", "pixel < -1.0f ? -1.0f : pixel", in_c("pictures_have_the_bytes_of_the_reference")),
    (f"{C}/picture.h", "C: levels rounded down", "+ 127.5f + 0x1p23f", "+ 127.0f + 0x1p23f", COMPILED),
    (f"{C}/winograd.h", "C: pixels beyond the image are what they were", "begin > left || ", "", COMPILED),
    (f"{C}/winograd.h", "C: another point", "#define Q1 1.5f", "#define Q1 1.25f", COMPILED),
    (f"{C}/winograd.h", "C: an output of the wrong sign", "P3 * rest_p + Q3 * rest_q + m[5]", "P3 * rest_p + Q3 * rest_q - m[5]", COMPILED),
    (f"{C}/winograd.h", "C: a sum begins anew", "to + first * stride + column, stride, k > 0)", "to + first * stride + column, stride, 0)", COMPILED),
    (f"{C}/winograd.h", "C: the last channels are forgotten", "least(DEPTH, a->inputs - k)", "least(DEPTH, (a->inputs - k) & ~7)", COMPILED),
    (f"{C}/winograd.h", "C: the first image for all", "a->x + image * a->inputs", "a->x + 0 * a->inputs", COMPILED),
    (f"{C}/winograd.h", "C: no bias", "o[i] + bias, LANES", "o[i], LANES", COMPILED),
    (f"{C}/winograd.h", "C: the first strip for all", "left = first * TILE - 1", "left = -1", COMPILED),
    ("kernels/headstart_kernels/winograd.py", "weights rounded twice", "[at * SLICE : (at + 1) * SLICE].double()", "[at * SLICE : (at + 1) * SLICE].half().double()", in_winograd("a_filter_is_rounded_once_from_whatever_the_weight_is")),
    ("kernels/headstart_kernels/winograd.py", "pays whatever reading the weights takes", "(tiles + _WEIGHTS)", "tiles", in_winograd("it_pays_where_tiles_are_many_and_channels_too")),
    (f"{C}/norm.h", "C: a shift is not in the mean", "(double)center + shift + left", "(double)center + left", COMPILED),
    (f"{C}/norm.h", "C: parts have one mean", "square + apart * apart * (all->count * count / whole)", "square", in_c("neither_size_nor_a_mean_far_above_the_spread_costs_digits", "native_layers")),
    (f"{C}/norm.h", "C: the last part counts as a whole one", "(double)least(rows, a->plane - part * rows)", "(double)rows", COMPILED),
    (f"{C}/norm.h", "C: the first channels of a wide pixel for all", "as_floats(a->x, a->type, at + c, rows * some, room)", "as_floats(a->x, a->type, at, rows * some, room)", in_c("the_largest_width_of_a_part_is_not_the_largest_image", "native_layers")),
    (f"{C}/norm.h", "C: the first image's scales for all", "const float *scale = a->scratch + image * a->channels, *offset", "const float *scale = a->scratch, *offset", in_c("a_group_norm_is_within_its_budget", "native_layers")),
    (f"{C}/exponential.h", "C: no power is infinite", "most = all_floats(128.0f)", "most = all_floats(100.0f)", in_c("silu_of_every_size", "native_layers")),
    (f"{C}/exponential.h", "C: every gate is positive", "chosen(x < zero, tail, all_floats(1.0f) - tail)", "(all_floats(1.0f) - tail)", COMPILED),
    (f"{C}/exponential.h", "C: a tail without an end", "x = chosen(x < least, least, x);", "", in_c("geglu_of_every_size_of_a_gate", "native_layers")),
    (f"{C}/gate.h", "C: a number is its own gate", "at + a->width, some, other", "at, some, other", COMPILED),
    ("kernels/headstart_kernels/impl/native_norm.py", "C: rows of a shift lie together", "0 if shift is None else shift.stride(0)", "0 if shift is None else shift.shape[1]", in_c("operands_may_lie_anywhere_and_have_a_dtype_of_their_own", "native_layers")),
    (f"{C}/library.py", "C: load what others may have written", "elif status.st_mode & 0o022:", "elif False:", in_c("nothing_is_loaded_from_a_folder_that_others_may_write_to", "native_library")),
    (f"{C}/library.py", "C: use it unproven", "        if wrong:\n", "        if False:\n", in_c("a_library_whose_bits_differ_is_refused", "native_library")),
)  # fmt: skip
BY_FILE = {
    STEP: IN_STEP, NORMAL: IN_NORMAL, DRAW: IN_DRAW, RGB: IN_RGB, PICTURE: IN_PICTURE,
    NORM: IN_NORM, GATE: IN_GATE, ADAPTER: IN_ADAPTER, LAYERNORM: IN_LAYERNORM,
}  # fmt: skip
ROWS = [(file, *row) for file, rows in BY_FILE.items() for row in rows]
MUTATIONS = tuple(
    Mutation(f"{file.rpartition('/')[2].removesuffix('.py')}: {name}", file, old, new, tests)
    for file, name, old, new, tests in (*ROWS, *IN_IMPL, *IN_C)
)

if __name__ == "__main__":
    question = "which mistakes in the kernels turn a test red"
    sys.exit(main(question, MUTATIONS, "mutation_kernels.json"))
