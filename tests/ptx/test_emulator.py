"""The emulator of a GPU: memory, threads that meet, matrices, and every fault provoked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from evidence.ptx import Fault, Traffic
from evidence.ptx.probe import THREADS, execute

RNG = np.random.default_rng(0)
COUNT = np.arange(THREADS * 4, dtype=np.uint64).reshape(THREADS, 4)
LD = "ld.global.b32 %r1, [%rd92];"


def test_loads_and_stores_move_bytes_as_they_are_typed() -> None:
    inputs = RNG.integers(0, 2**63, (THREADS, 4), dtype=np.uint64)
    for move in (
        "ld.global.v4.b32 {%r1,%r2,%r3,%r4}, [%rd92+16];"
        "st.global.v4.b32 [%rd93+16], {%r1,%r2,%r3,%r4};",
        "ld.global.v2.b64 {%rd1,%rd2}, [%rd92+16]; st.global.v2.b64 [%rd93+16], {%rd1,%rd2};",
        "ld.global.v8.b16 {%rs1,%rs2,%rs3,%rs4,%rs5,%rs6,%rs7,%rs8}, [%rd92+16];"
        "st.global.v8.b16 [%rd93+16], {%rs1,%rs2,%rs3,%rs4,%rs5,%rs6,%rs7,%rs8};",
    ):
        out = execute(move, inputs)
        assert np.array_equal(out[:, 2:], inputs[:, 2:]) and not out[:, :2].any()
    out = execute("ld.global.s8 %r1, [%rd92+3]; st.global.b32 [%rd93], %r1;", inputs)
    assert np.array_equal(
        out[:, 0].astype(np.uint32).view(np.int32), inputs.view(np.int8).reshape(THREADS, 32)[:, 3]
    )
    out = execute("ld.global.b32 %r1, [%rd92]; st.global.b8 [%rd93], %r1;", inputs)
    assert np.array_equal(out[:, 0], inputs[:, 0] & np.uint64(255))


def test_registers_are_packed_and_unpacked() -> None:
    inputs = RNG.integers(0, 2**63, (THREADS, 4), dtype=np.uint64)
    body = "ld.global.b64 %rd1, [%rd92]; mov.b64 {%r1, %r2}, %rd1; mov.b64 %rd2, {%r2, %r1};"
    out = execute(body + "st.global.b64 [%rd93], %rd2;", inputs)
    assert np.array_equal(
        out[:, 0], (inputs[:, 0] >> np.uint64(32)) | (inputs[:, 0] << np.uint64(32))
    )


def test_branches_diverge_and_meet_again() -> None:
    body = (
        "mov.u32 %r1, 0; mov.u32 %r2, 0; $again: add.s32 %r2, %r2, %r1; add.s32 %r1, %r1, 1;"
        "setp.lt.u32 %p1, %r1, %r90; @%p1 bra $again; setp.gt.u32 %p2, %r90, 9; @!%p2 bra $end;"
        "add.s32 %r2, %r2, 1000; bra.uni $end; $end: bar.sync 0; st.global.b32 [%rd93], %r2;"
    )
    out = execute(body, COUNT)[:, 0]
    assert out.tolist() == [sum(range(max(t, 1))) + 1000 * (t > 9) for t in range(THREADS)]


@pytest.mark.parametrize(
    ("mode", "by", "source"),
    [
        ("bfly", 5, lambda lane: lane ^ 5),
        ("idx", 7, lambda lane: 7),
        ("down", 3, lambda lane: lane + 3 if lane < 29 else lane),
        ("up", 4, lambda lane: lane - 4 if lane > 3 else lane),
    ],
)
def test_shuffles_stay_in_their_warp(mode: str, by: int, source: Callable[[int], int]) -> None:
    body = f"{LD} shfl.sync.{mode}.b32 %r2, %r1, {by}, 31, -1; st.global.b32 [%rd93], %r2;"
    got = (execute(body, COUNT)[:, 0] // 4).tolist()
    assert got == [t // 32 * 32 + source(t % 32) for t in range(THREADS)]


@pytest.mark.parametrize("extreme", ["min", "max"])
@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_a_reduction_is_over_its_warp(extreme: str, kind: str) -> None:
    inputs = RNG.integers(0, 2**63, (THREADS, 4), dtype=np.uint64)
    body = f"{LD} redux.sync.{extreme}.{kind} %r2, %r1, -1; st.global.b32 [%rd93], %r2;"
    words = inputs[:, 0].astype(np.uint32).view({"s32": np.int32, "u32": np.uint32}[kind])
    want = [{"min": min, "max": max}[extreme](words[i : i + 32].tolist()) for i in (0, 32)]
    got = execute(body, inputs)[:, 0].astype(np.uint32).view(words.dtype)
    assert got.tolist() == [want[0]] * 32 + [want[1]] * 32
    with pytest.raises(Fault, match="of part of a warp"):
        execute(body.replace("-1;", "255;"), inputs)


def test_shared_memory_carries_values_between_the_threads_of_a_block() -> None:
    body = (
        f"{LD} shl.b32 %r3, %r90, 2; mov.u32 %r4, box; add.s32 %r3, %r3, %r4;"
        "st.shared.b32 [%r3], %r1;"
        "bar.sync 0; sub.s32 %r5, 63, %r90; shl.b32 %r5, %r5, 2; add.s32 %r5, %r5, %r4;"
        "ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd93], %r6;"
    )
    inputs = np.concatenate([COUNT, COUNT + 1000])
    out = execute(body, inputs, blocks=2)[:, 0]
    assert np.array_equal(out[:THREADS], COUNT[::-1, 0])
    assert np.array_equal(out[THREADS:], COUNT[::-1, 0] + 1000)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_and_stored_by_fragment(transposed: bool) -> None:
    """Row r of matrix m is at lane 8m + r; lane l holds elements (l/4, 2(l%4)) and the next."""
    trans, threads = ".trans" if transposed else "", 32
    inputs = RNG.integers(0, 2**63, (threads, 4), dtype=np.uint64)
    setup = "shl.b32 %r3, %r90, 4; mov.u32 %r4, box; add.s32 %r3, %r3, %r4;"
    body = setup + (
        "ld.global.v4.b32 {%r11,%r12,%r13,%r14}, [%rd92];"
        "st.shared.v4.b32 [%r3], {%r11,%r12,%r13,%r14}; bar.sync 0;"
        f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r21,%r22,%r23,%r24}}, [%r3];"
        "st.global.v4.b32 [%rd93], {%r21,%r22,%r23,%r24};"
        f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3], {{%r21,%r22,%r23,%r24}};"
        "bar.sync 0; ld.shared.v4.b32 {%r11,%r12,%r13,%r14}, [%r3];"
        "st.global.v4.b32 [%rd93+16], {%r11,%r12,%r13,%r14};"
    )
    out = execute(body, inputs, threads=threads)
    rows = inputs[:, :2].copy().view(np.uint16).reshape(4, 8, 8)
    fragments = out[:, :2].copy().view(np.uint16).reshape(threads, 4, 2)
    for lane in range(threads):
        for m in range(4):
            r, c = lane // 4, 2 * (lane % 4)
            pair = [rows[m, c, r], rows[m, c + 1, r]] if transposed else rows[m, r, c : c + 2]
            assert list(fragments[lane, m]) == list(pair)
    assert np.array_equal(out[:, 2:], inputs[:, :2])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_the_matrix_product_is_numpys(kind: str) -> None:
    """Fragments of A, B and C as the PTX ISA's figures 9.7.14.5 have them, filled by hand."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    torch.manual_seed(0)
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    a_bits, b_bits = (t.view(torch.int16).numpy().view(np.uint16) for t in (a, b))
    inputs = np.zeros((32, 20), np.uint32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        positions = [(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]
        for i, (r, k) in enumerate(positions):
            inputs[lane, i] = int(a_bits[r, k]) | int(a_bits[r, k + 1]) << 16
        for i, k in enumerate((2 * t, 2 * t + 8)):
            inputs[lane, 4 + i] = int(b_bits[k, g]) | int(b_bits[k + 1, g]) << 16
        for i, (r, n) in enumerate(((g, 0), (g, 1), (g + 8, 0), (g + 8, 1))):
            inputs[lane, 6 + i] = c[r, 2 * t + n].numpy().view(np.uint32)
    body = (
        "mul.wide.u32 %rd1, %r90, 80; add.s64 %rd1, %rd1, %rd90;"
        "ld.global.v4.b32 {%r1,%r2,%r3,%r4}, [%rd1];"
        + "".join(f"ld.global.b32 %r{5 + i}, [%rd1+{16 + 4 * i}];" for i in range(6))
        + f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r21,%r22,%r23,%r24}},"
        "{%r1,%r2,%r3,%r4}, {%r5,%r6}, {%r7,%r8,%r9,%r10};"
        "st.global.v4.b32 [%rd93], {%r21,%r22,%r23,%r24};"
    )
    out = execute(body, inputs, threads=32)[:, :2].copy().view(np.float32).reshape(32, 4)
    exact = a.double() @ b.double() + c.double()
    for lane in range(32):
        g, t = divmod(lane, 4)
        want = [exact[g, 2 * t], exact[g, 2 * t + 1], exact[g + 8, 2 * t], exact[g + 8, 2 * t + 1]]
        assert out[lane].tolist() == [np.float32(w.item()) for w in want]


FAULTS = {
    "unknown instruction brev.b32": "brev.b32 %r1, %r90;",
    "unknown instruction add.f32": f"{LD} add.f32 %r2, %r1, %r1;",  # an assembler may contract it
    "illegal address: load of 4 bytes": "ld.global.b32 %r1, [%rd92+2048];",
    "illegal address: store of 4 bytes": "st.global.b32 [%rd93+-8], %r90;",
    "misaligned address: load of 8 bytes": "ld.global.b64 %rd1, [%rd92+4];",
    "two threads store different values": "st.global.b32 [%rd91], %r90;",
    "register %r1 is read before it is written": "add.s32 %r2, %r1, 1;",
    "register %r1 has 32 bits, u64 is read": "mov.u32 %r1, 0; mov.u64 %rd1, %r1;",
    "register %rs1 has 16 bits, b32 is written": "not.b32 %rs1, %r90;",
    "register %q1 is not declared": "mov.u32 %q1, 0;",
    "barrier that some threads": "setp.lt.u32 %p1, %r90, 8; @%p1 bra $x; bar.sync 0; $x: ret;",
    "illegal address: byte": "ld.shared.b32 %r1, [box+4096];",
    "misaligned address: 4 bytes of shared": "ld.shared.b32 %r1, [box+2];",
    "unknown label": "bra $nowhere;",
    "3 registers for a vector of 2": "ld.global.v2.b32 {%r1,%r2,%r3}, [%rd92];",
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_a_gpu_would_do_wrong_is_a_fault(message: str) -> None:
    with pytest.raises(Fault, match=message.replace("$", r"\$")):
        execute(FAULTS[message], COUNT)


def test_blocks_that_race_are_caught_although_they_run_one_after_the_other() -> None:
    inputs = np.zeros((THREADS * 2, 4), np.uint64)
    same = "mov.u32 %r1, 7; st.global.b32 [%rd91], %r1;"
    assert execute(same, inputs, blocks=2)[0, 0] == 7
    first = "setp.eq.u32 %p1, %r92, 0; @%p1 st.global.b32 [%rd91], %r91;"
    second = f"setp.eq.u32 %p2, %r92, {THREADS}; @%p2 st.global.b32 [%rd91], %r91;"
    with pytest.raises(Fault, match="two blocks store different values"):
        execute(first + second, inputs, blocks=2)
    # Block 1 reads what block 0 wrote, which is in order only by luck.
    body = "st.global.b32 [%rd93], %r90; ld.global.b32 %r2, [%rd91]; st.global.b32 [%rd93+4], %r2;"
    with pytest.raises(Fault, match="reads what another block"):
        execute(body, inputs, blocks=2)


def test_local_memory_and_calls_are_refused() -> None:
    for line in (".local .align 4 .b8 depot[8];", "call.uni f;"):
        with pytest.raises(Fault, match="local memory and calls"):
            execute(line, COUNT)


def test_sectors_are_counted_for_each_warp() -> None:
    inputs = np.zeros((THREADS, 4), np.uint64)
    for body, sectors in (
        (LD, THREADS),
        ("mad.wide.u32 %rd1, %r90, 4, %rd90; ld.global.b32 %r1, [%rd1];", THREADS * 4 // 32),
    ):
        execute(body, inputs, traffic=(traffic := Traffic()))
        aligned = inputs.ctypes.data % 32 == 0
        assert sectors <= traffic.load_sectors <= sectors + (0 if aligned else THREADS)
