"""A recording has the memory of the run that it recorded, and no value is lost by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evidence.open_tape import poison
from evidence.oracle import random_latents
from headstart_kernels.recording.lifetimes import Block, _set_offsets
from headstart_kernels.recording.tape import Tape


def chain(x: Tensor, length: int) -> Tensor:
    for i in range(length):
        x = (x + i).sin()
    return x


def test_a_chain_takes_what_the_run_took_however_long_it_is() -> None:
    x, tape = random_latents(1, 1, 16, 64), Tape()
    with tape.recording():
        chained = chain(x, 50)
    # A step has its input, what lies between and its output; and the last one is held.
    assert tape.size_bytes <= 4 * chained.nbytes
    expected = chained.clone()
    poison(tape)
    tape.replay()
    assert torch.equal(chained, expected)


def replays(body: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> None:
    """A recording of body(x), whose own memory is written over, gives body(x) of the x of now."""
    tape = Tape()
    with torch.no_grad(), tape.recording():
        results = body(x)
    for factor in (1.0, -3.0):
        x.mul_(factor)
        poison(tape)
        with torch.no_grad():
            tape.replay()
            assert all(map(torch.equal, results, body(x)))


def test_what_is_needed_later_is_not_written_over() -> None:
    def body(x: Tensor) -> list[Tensor]:
        skips = [chain(x + i, 2) for i in range(4)]
        whole = chain(torch.cat(skips, 1), 3)
        rows = whole.unbind(1)  # a view keeps the memory of the whole
        del whole
        more = chain(x, 5)
        return [more + rows[2] - skips[0].mean()]

    replays(body, random_latents(1, 1, 8, 8))


def test_a_tensor_that_somebody_kept_stays_theirs() -> None:
    """As a hook does; and it is filled again at every replay."""
    x, tape, tensors = random_latents(1, 1, 8, 8), Tape(), list[Tensor]()
    with tape.recording():
        tensors.append(x * 3)
        chained = chain(tensors[0], 4)
    x.add_(1)
    tape.replay()
    assert torch.equal(tensors[0], x * 3) and torch.equal(chained, chain(x * 3, 4))


def test_memory_that_was_written_in_parts_is_one_piece() -> None:
    def body(x: Tensor) -> list[Tensor]:
        whole = x.new_empty(1, 1, 8, 6)
        whole[:, :, :4] = x.exp()
        whole[:, :, 4:].copy_(x).mul_(2)
        return [whole.flip(2).contiguous() + 1]

    replays(body, random_latents(1, 1, 4, 6))


def test_other_dtypes_lie_where_they_may() -> None:
    def body(x: Tensor) -> list[Tensor]:
        flags = x > 0
        wide, order = x.double() * flags, x.argsort(-1)
        return [wide.gather(-1, order).half().float() + flags]

    replays(body, random_latents(1, 1, 5, 7))


def test_no_two_pieces_in_use_share_a_byte() -> None:
    generator = torch.Generator().manual_seed(3)
    ends = torch.randint(1, 9, (200,), generator=generator).tolist()
    sizes = torch.randint(0, 5000, (200,), generator=generator).tolist()
    pieces = [
        Block(None, size, begin // 2, begin // 2 + length)  # pyright: ignore[reportArgumentType]
        for begin, (size, length) in enumerate(zip(sizes, ends, strict=True))
    ]
    total = _set_offsets(pieces)
    for i, a in enumerate(pieces):
        assert a.end is not None and a.offset % 64 == 0 and a.offset + a.size <= total
        for b in pieces[:i]:
            apart_in_time = b.end is not None and (b.end <= a.begin or a.end <= b.begin)
            apart = a.offset + a.size <= b.offset or b.offset + b.size <= a.offset
            assert apart_in_time or apart
    most = max(
        sum(p.size for p in pieces if p.end is not None and p.begin <= call < p.end)
        for call in range(110)
    )
    assert total < 1.5 * most


def test_of_several_results_those_that_are_read_are_filled() -> None:
    """An operator without a form for given memory runs, and what it makes is copied."""

    def body(q: Tensor) -> list[Tensor]:
        scaled = torch.nn.functional.scaled_dot_product_attention(q, q + 1, q * 2)
        low, order = q.sort(-1)
        del low
        return [scaled.exp(), order]

    replays(body, random_latents(1, 2, 8, 16))


def test_a_recording_that_failed_holds_nothing() -> None:
    tape = Tape()
    try:
        with tape.recording():
            chain(torch.ones(9), 3)
            raise KeyError
    except KeyError:
        assert tape.calls == [] and tape.size_bytes == 0
