"""The C kernels as a library: compiled once by this machine's C compiler, checked, cached, loaded.

Its name in the cache is a hash of everything that went into it: the sources, the constants, the
flags, the compiler and the processor. So another version, or another machine with the same home
folder, compiles its own. Compiling and checking take 4 CPU s (measured, gcc 12); loading a cached
library takes 1 ms.

These give the bits: gcc 11, gcc 12 and clang for x86-64 with AVX-512, AVX2 and SSE2 (run), gcc 12
and clang for aarch64 Linux (run under an emulator). gcc before 9 has no conversion of vectors.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from headstart_kernels import philox
from headstart_kernels.native.calls import Calls, bound, has_fused_products
from headstart_kernels.native.proof import differences

log = logging.getLogger(__name__)

SWITCH = "HEADSTART_NATIVE"
"""The environment variable that turns compiling off: 0."""

_SOURCES = (
    *("attention.h", "direct.h", "exponential.h", "gate.h", "kernels.c", "norm.h", "normal.h"),
    *("numbers.h", "picture.h", "step.h", "team.h", "vectors.h", "winograd.h"),
)
_EXACT = ("-ffp-contract=off", "-fno-fast-math")
_FREE = ("-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing")
"""None of these changes a value: nobody reads errno or floating-point flags."""
FLAGS = ("-O3", *_EXACT, *_FREE, "-std=gnu11", "-shared", "-fPIC")
_TARGETS = (("-march=native",), ())
"""Tried in order: this processor's own instructions, then those of every one of its kind."""
_TIMEOUT_S = 120
_NEWEST = 16
"""Libraries in the cache: a home folder may serve several machines and versions."""


class UnavailableError(RuntimeError):
    """There is no library of C kernels here, and this says why."""


def library() -> ctypes.CDLL:
    """The library, compiled if it is not cached yet. Raises UnavailableError."""
    outcome = _outcome()
    if isinstance(outcome, str):
        raise UnavailableError(outcome)
    return outcome


def why_not() -> str | None:
    """Why there is no library, or None where there is one."""
    outcome = _outcome()
    return outcome if isinstance(outcome, str) else None


@cache
def calls() -> Calls:
    """The library's functions. Raises UnavailableError."""
    return bound(library())


@cache
def fast_products() -> bool:
    """Whether products are fast here: `has_fused_products`. Raises UnavailableError."""
    return has_fused_products(library())


@cache
def _outcome() -> ctypes.CDLL | str:
    """Tried once a process: what fails once is not tried at every step."""
    try:
        return _load_or_compile()
    except (UnavailableError, OSError, subprocess.SubprocessError) as error:
        log.info("the kernels run in torch and numpy, not in C: %s", error)
        return str(error)


def _load_or_compile() -> ctypes.CDLL:
    if os.environ.get(SWITCH, "1") == "0":
        raise UnavailableError(f"{SWITCH}=0 is set")
    if os.name != "posix":
        raise UnavailableError(f"C is compiled on Linux and macOS, and this is {platform.system()}")
    compiler = _compiler()
    sources = _texts()
    path = _folder() / f"kernels-{_fingerprint(sources, compiler)}.so"
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            log.info("compiled again, because it is damaged: %s", error)
    _compile_and_check(sources, compiler, path)
    return ctypes.CDLL(str(path))


def _compiler() -> list[str]:
    """The command of the environment's CC, else `cc`."""
    name, *options = shlex.split(os.environ.get("CC") or "cc")
    path = shutil.which(name)
    if path is None:
        raise UnavailableError(f"there is no C compiler {name!r} on the path")
    return [path, *options]


def _texts() -> dict[str, str]:
    folder = Path(__file__).parent
    return {name: (folder / name).read_text("utf-8") for name in _SOURCES} | {
        "philox.h": constants()
    }


def constants() -> str:
    """`headstart_kernels.philox` as a C header: hexadecimal, so that no digit is lost."""
    numbers = {
        "ROUNDS": str(philox.ROUNDS),
        **{f"MULTIPLIER_{i}": f"{value:#x}u" for i, value in enumerate(philox.MULTIPLIERS)},
        **{f"WEYL_{i}": f"{value:#x}u" for i, value in enumerate(philox.WEYL)},
        "UPPER": f"{philox.UPPER:#x}u",
        "TWO_THIRDS_BITS": f"{philox.TWO_THIRDS_BITS:#x}",
        "MINUS_2_LN_2": f"{philox.MINUS_2_LN_2.hex()}f",
        "LOG_DEGREE": str(len(philox.LOG) - 1),
        "ANGLE_DEGREE": str(len(philox.SIN) - 1),
    }
    series = {"LOG": philox.LOG, "SIN": philox.SIN, "COS": philox.COS}
    lines = [f"#define {name} {value}" for name, value in numbers.items()]
    for name, coefficients in series.items():
        values = ", ".join(f"{value.hex()}f" for value in coefficients)
        lines.append(f"static const float {name}[] = {{{values}}};")
    return "\n".join(lines) + "\n"


def _fingerprint(sources: dict[str, str], compiler: list[str]) -> str:
    real = Path(compiler[0]).resolve()
    status = real.stat()
    parts = (
        *(f"{name}\0{text}" for name, text in sorted(sources.items())),
        *FLAGS,
        f"{real} {compiler[1:]} {status.st_size} {status.st_mtime_ns}",
        platform.machine(),
        _processor(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    """What decides which instructions -march=native may use."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return platform.processor()
    lines = text.split("\n\n", 1)[0].splitlines()
    fields = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in lines if line.startswith(fields))


def _folder() -> Path:
    """The cache of libraries: the user's, else a folder of the user in the system's /tmp.

    Nothing is loaded from a folder that somebody else could have written to.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    candidates = (
        Path(home).expanduser() / "headstart",
        Path(tempfile.gettempdir()) / f"headstart-{os.getuid()}",
    )
    reasons: list[str] = []
    for folder in candidates:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.lstat()
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
            continue
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            reasons.append(f"{folder}: is not a folder of this user")
        elif status.st_mode & 0o022:
            reasons.append(f"{folder}: others may write to it")
        elif not os.access(folder, os.W_OK):
            reasons.append(f"{folder}: is read-only")
        else:
            return folder
    raise UnavailableError(f"there is nowhere to keep it: {'; '.join(reasons)}")


def _compile_and_check(sources: dict[str, str], compiler: list[str], path: Path) -> None:
    """Compile, compare the bits, and only then give the library its name."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="making-") as scratch:
        for name, text in sources.items():
            Path(scratch, name).write_text(text, "utf-8")
        output = Path(scratch, "kernels.so")
        _compile(compiler, output)
        wrong = differences(ctypes.CDLL(str(output)))
        if wrong:
            raise UnavailableError(
                f"{compiler[0]} made kernels whose bits differ: {', '.join(wrong)}"
            )
        os.replace(output, path)
    log.info("compiled %s in %.1f s", path, time.perf_counter() - begin)
    _tidy(path.parent)


def _tidy(folder: Path) -> None:
    """Delete all but the newest libraries, and the folders of interrupted compilations."""
    with suppress(OSError):  # another process may do the same
        libraries = sorted(folder.glob("kernels-*.so"), key=lambda path: path.stat().st_mtime)
        for old in libraries[:-_NEWEST]:
            old.unlink()
        for scratch in folder.glob("making-*"):
            if scratch.stat().st_mtime < time.time() - 10 * _TIMEOUT_S:
                shutil.rmtree(scratch)


def _compile(compiler: list[str], output: Path) -> None:
    message = ""
    for target in _TARGETS:
        files = ("-o", str(output), str(output.with_name("kernels.c")), "-lm")
        command = [*compiler, *FLAGS, *target, *files]
        process = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
        if process.returncode == 0:
            return
        message = f"({process.returncode}): {process.stderr.strip()[-500:]}"
    raise UnavailableError(f"{compiler[0]} failed {message}")
