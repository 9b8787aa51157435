"""The one error family; every message says what was expected, what came, and what to do."""


def counted(count: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{count} {noun}" + "s" * (count != 1)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class HeadstartError(Exception):
    """Root of every error this package raises on purpose."""


class PlanError(HeadstartError, ValueError):
    """A plan that cannot be run exactly: zero base steps, a gap or a rise in noise level."""


class CheckpointError(HeadstartError, ValueError):
    """A file that is not what it should be: truncated, hostile, mismatched, or a pickle."""


class AdapterError(HeadstartError, ValueError):
    """An adapter whose keys or shapes do not match the network it is attached to."""


class CaptureError(HeadstartError, RuntimeError):
    """A step that cannot be captured into, or replayed from, a graph."""


class InputError(HeadstartError, ValueError):
    """A request that cannot be served: prompt, seeds, size, device, or an output path."""
