"""A first half hour on a GPU, as one command: tests, milliseconds, kernels, memory, and a table.

    python bench/gpu.py                       everything, in the order of what is learned first
    python bench/gpu.py --list                the cases, and the most seconds each may take
    python bench/gpu.py --cases unet,vae      some; --again runs what the file has already
    python bench/gpu.py --base FILE --distilled FILE      your own files too, cold and warm
    python bench/gpu.py --dry-run             every path of it on an emulated GPU, in a minute or so

Each case runs in a process of its own, with a limit, and its figures are written as they come (into
bench/results/gpu.json, under a temporary name that is renamed): whatever fails takes nothing with
it, and the same command goes on with the case in which it was ended. Networks are SDXL's, of random
or no weights. The end is a Markdown table; please paste it into an issue. Without a CUDA device it
says so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any
from unittest import mock

import gpu_machine
import gpu_profile
import gpu_runs
import gpu_stages
import gpu_unet
import harness
import torch
from gpu_case import Bench, Case, Figure
from gpu_report import DONE, FAILED, LATE, Report

from evidence.gpu import emulated_gpu
from evidence.torch_cuda import EmulatedCuda
from headstart.runner import capture

KERNELS, GRAPHS = "tests/gpu/test_kernels.py", "tests/gpu/test_gpu.py"
CASES = (
    Case("machine", "device, driver, versions, compiler", 60, gpu_machine.environment),
    Case("test-kernels", "our kernels' bits and budgets", 300, gpu_machine.tests(KERNELS)),
    Case("test-graphs", "graphs, streams, weights in place", 300,
         gpu_machine.tests(GRAPHS, "-k", f"not {gpu_machine.FAILS}")),
    Case("test-failures", "what a failed capture leaves", 180,
         gpu_machine.tests(GRAPHS, "-k", gpu_machine.FAILS)),
    Case("unet", "a pass of SDXL at 1024 px: ours and diffusers'", 240, gpu_unet.passes),
    Case("kernels", "which kernels run, and how long each", 240, gpu_profile.names),
    Case("vae", "decode: dtype, layout, norm", 240, gpu_stages.decoders),
    Case("text", "both text encoders", 120, gpu_stages.texts),
    Case("step", "the sampler's kernels, and their bytes/s", 120, gpu_stages.kernels),
    Case("runs", "prompt to pixels by every runner", 300, gpu_runs.runs),
    *(Case(f"memory-{gb}", f"a hybrid in {gb} GB: what is chosen", 180, gpu_runs.memory(gb))
      for gb in (24, 16, 12, 8)),
    Case("files", "your own files, cold and warm", 300, gpu_runs.real),
    Case("unet-4", "the same pass for four images", 240, gpu_unet.four),
    Case("compiled", "compiled, and diffusers' compiled", 420, gpu_unet.compiled),
    Case("recipe", "diffusers' own recipe, which searches long", 600, gpu_unet.recipe),
)  # fmt: skip
BY_NAME: Mapping[str, Case] = {case.name: case for case in CASES}


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    if options.list:
        print("\n".join(f"{c.name:<15}{c.limit_s:>5} s  {c.about}" for c in CASES))
        return 0
    if not (options.dry_run or torch.cuda.is_available()):
        print("bench/gpu.py: no CUDA device here, so nothing was measured; see --dry-run")
        return 0
    with _machine(options.dry_run) as emulated, tempfile.TemporaryDirectory() as folder:
        rounds = options.rounds if emulated is None else 1
        bench = Bench(emulated, rounds, Path(folder), _files(options))
        if options.alone:
            return alone(BY_NAME[options.alone], bench, options.out)
        try:  # before minutes are spent on what cannot be kept
            report = Report.open(options.out, _head(bench))
            report.write()
        except OSError as error:
            print(f"bench/gpu.py: {options.out} cannot be written ({error}): give another --out")
            return 2
        for name in options.cases:
            if report.has(name) and not options.again:
                print(f"{name}: in {report.path} already")
                continue
            print(f"{name}: {BY_NAME[name].about}", flush=True)
            case = BY_NAME[name]  # a dry run need not pay for torch's import in each
            here = bench.dry and name != options.apart
            record(case, case.figures(bench) if here else in_process(case, bench), report)
    print(f"\n{report.table()}\n\nwrote {report.path}")
    return 0 if report.sound else 1


class ChildError(Exception):
    """What the process of a case says of itself, in one line."""


def record(case: Case, figures: Iterator[Figure], report: Report) -> None:
    """Write every figure as it comes, then how the case ended."""
    begin, status, why = time.perf_counter(), FAILED, None
    report.begin(case.name)
    try:
        for name, value in figures:
            report.figure(case.name, name, value)
        status = DONE
    except TimeoutError as error:
        status, why = LATE, str(error)
    except ChildError as error:
        why = str(error)
    except Exception as error:
        traceback.print_exc(limit=-3)
        why = harness.one_line(error)
    report.end(case.name, status, time.perf_counter() - begin, why)


def in_process(case: Case, bench: Bench) -> Iterator[Figure]:
    """The figures of a process group, which is ended when the case's time is over.

    They come as lines of JSON through a pipe of their own; all else is shown as it is.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--alone", case.name]
    command += ["--rounds", str(bench.rounds), *(["--dry-run"] if bench.dry else [])]
    command += [part for role, path in bench.files.items() for part in (f"--{role}", str(path))]
    begin, (reading, writing) = time.perf_counter(), os.pipe()
    child = subprocess.Popen(
        [*command, "--out", f"/dev/fd/{writing}"], pass_fds=[writing], start_new_session=True
    )
    os.close(writing)
    end = Timer(max(0.1, case.limit_s), os.killpg, (child.pid, signal.SIGKILL))
    end.start()
    try:
        with os.fdopen(reading) as lines:
            for name, value in map(json.loads, lines):
                if name == _ERROR:
                    raise ChildError(value)
                yield name, value
        child.wait()
    finally:
        end.cancel()
        if child.poll() is None:  # with the compilers that it may have started
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode == -signal.SIGKILL and time.perf_counter() - begin >= case.limit_s:
        raise TimeoutError(f"its {case.limit_s} s")
    if child.returncode:
        raise ChildError(f"its process ended with {child.returncode}")


_ERROR = "\0error"


def alone(case: Case, bench: Bench, out: Path) -> int:
    """The child's part: figures as lines of JSON."""
    with out.open("w") as pipe:
        try:
            for figure in case.figures(bench):
                print(json.dumps(figure), file=pipe, flush=True)
        except Exception as error:
            traceback.print_exc(limit=-3)
            print(json.dumps((_ERROR, harness.one_line(error))), file=pipe, flush=True)
            return 1
    return 0


@contextmanager
def _machine(dry: bool) -> Generator[EmulatedCuda | None]:
    """The GPU that there is, or an emulated one, with graphs of its own."""
    if not dry:
        yield None
        return
    with mock.patch.dict(capture._SITES, clear=True), emulated_gpu() as cuda:  # pyright: ignore[reportPrivateUsage]
        yield cuda


def _head(bench: Bench) -> dict[str, Any]:
    machine = harness.machine()
    return {
        "question": "what does a GPU say: tests, milliseconds, kernels, memory?",
        "evidence": "emulated on a CPU, no figure means anything" if bench.dry else "measured",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "headstart": machine["versions"].get("headstart", "a checkout"),
        "files": {role: path.name for role, path in bench.files.items()},
        "rounds": bench.rounds,
        "machine": machine,
    }


def _files(options: argparse.Namespace) -> dict[str, Path]:
    files = {"base": options.base, "distilled": options.distilled}
    return {role: path for role, path in files.items() if path is not None}


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.options(__doc__, None)
    parser.add_argument("--list", action="store_true", help="the cases, and end")
    parser.add_argument(
        "--cases", type=harness.names("case", BY_NAME), default=list(BY_NAME), metavar="A,B"
    )
    parser.add_argument("--again", action="store_true", help="those too that the file has")
    parser.add_argument("--rounds", type=int, default=21, help="times each variant runs")
    parser.add_argument("--base", type=Path, metavar="FILE")
    parser.add_argument("--distilled", type=Path, metavar="FILE")
    parser.add_argument("--dry-run", action="store_true", help="on an emulated GPU")
    parser.add_argument("--out", type=Path, help="default: bench/results/gpu.json")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--apart", help=argparse.SUPPRESS)  # of a dry run, one as on a GPU
    options = parser.parse_args(argv)
    if options.out is None:
        dry = Path(tempfile.gettempdir()) / "headstart_gpu_dry_run.json"
        options.out = dry if options.dry_run else harness.RESULTS / "gpu.json"
    return options


if __name__ == "__main__":
    sys.exit(main())
