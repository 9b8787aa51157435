"""Do the tests of the graph runner notice a mistake in it? One mistake at a time must turn one red.

python bench/mutation_runner.py [--out bench/results/mutation_runner.json]

Each row of the table changes one place of a copy of the sources and runs one test there. The same
test must pass without the change. A row whose text is no longer in its file is an error.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import harness

ROOT = Path(__file__).parents[1]
CAPTURE, TRAJECTORY = "src/headstart/runner/capture.py", "src/headstart/runner/trajectory_graph.py"
RUNNER_TEST = "tests/graph/test_graph_runner.py"
TRAJECTORY_TEST = "tests/graph/test_trajectory_graph.py"
SDXL_TEST = "tests/capture/test_sdxl.py"


class Mutation(NamedTuple):
    """A mistake: `old` becomes `new` in `file`, and `test` must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = (
    Mutation(
        "forget the step bump",
        TRAJECTORY,
        "            step.add_(1)\n",
        "",
        f"{TRAJECTORY_TEST}::test_every_hand_off_point[1-2]",
    ),
    Mutation(
        "do not wait for the caller's stream",
        CAPTURE,
        "            self._stream.wait_stream(caller)\n            with backend.stream",
        "            with backend.stream",
        f"{RUNNER_TEST}::test_results_follow_the_callers_stream",
    ),
    Mutation(
        "do not make the caller wait for the result",
        CAPTURE,
        "            caller.wait_stream(self._stream)\n        return outputs",
        "        return outputs",
        f"{RUNNER_TEST}::test_results_follow_the_callers_stream",
    ),
    Mutation(
        "do not wait before warming up",
        CAPTURE,
        "        self._stream.wait_stream(caller)\n        with backend.stream(self._stream):\n"
        "            # On",
        "        with backend.stream(self._stream):\n            # On",
        f"{RUNNER_TEST}::test_outputs_belong_to_the_caller",
    ),
    Mutation(
        "return a graph-owned tensor",
        CAPTURE,
        "        return outputs\n\n    def prepare",
        "        return captured.outputs\n\n    def prepare",
        f"{RUNNER_TEST}::test_outputs_belong_to_the_caller",
    ),
    Mutation(
        "bake the guidance and the coefficients of the first plan",
        TRAJECTORY,
        'table, step = inputs["table"], inputs["step"]\n        draws',
        'table, step = torch.tensor(self.table.coefficients()), inputs["step"]\n        draws',
        f"{TRAJECTORY_TEST}::test_new_numbers_are_copies_and_not_new_captures",
    ),
    Mutation(
        "bake the scale of the start",
        TRAJECTORY,
        '* inputs["init_scale"]',
        "* self.table.init_scale",
        f"{TRAJECTORY_TEST}::test_new_numbers_are_copies_and_not_new_captures",
    ),
    Mutation(
        "bake the timestep",
        TRAJECTORY,
        'timestep = inputs["table"][:, _TIMESTEP].index_select(0, step).expand(len(x_in))',
        "timestep = torch.full((len(x_in),), self.table[self.rows.index(row)].timestep)",
        f"{TRAJECTORY_TEST}::test_new_numbers_are_copies_and_not_new_captures",
    ),
    Mutation(
        "skip the copy of a field of the conditioning",
        CAPTURE,
        "for name, buffer in captured.inputs.items():\n                    buffer",
        "for name, buffer in captured.inputs.items():\n"
        '                    if name == "cond.pooled":\n                        continue\n'
        "                    buffer",
        f"{RUNNER_TEST}::test_every_field_of_the_conditioning_is_copied_in[pooled]",
    ),
    Mutation(
        "do not capture again when a weight is bound anew",
        CAPTURE,
        "if found is not None and not found.bound.holds():",
        "if False:",
        f"{RUNNER_TEST}::test_a_weight_that_is_bound_anew_is_captured_anew",
    ),
    Mutation(
        "do not look at submodules that were replaced",
        CAPTURE,
        "(module._parameters, module._buffers, module._modules)",
        "(module._parameters, module._buffers)",
        f"{RUNNER_TEST}::test_a_weight_that_is_bound_anew_is_captured_anew[rebind_module]",
    ),
    Mutation(
        "leave the state of a network as warm-ups left it",
        CAPTURE,
        "state = [(tensor, tensor.clone()) for tensor in _buffers(program.networks)]",
        "state = []",
        f"{RUNNER_TEST}::test_warm_ups_leave_the_state_of_a_network_as_it_was",
    ),
    Mutation(
        "a pool for every graph",
        CAPTURE,
        "        if self._pool is None:\n",
        "        if True:\n",
        f"{RUNNER_TEST}::test_one_pool_one_stream_and_thread_local_captures",
    ),
    Mutation(
        "drop the newest graph instead of the oldest",
        CAPTURE,
        "self._drop([next(iter(self._graphs))])",
        "self._drop([next(reversed(self._graphs))])",
        f"{RUNNER_TEST}::test_the_graph_used_longest_ago_makes_room",
    ),
    Mutation(
        "swap the halves of a guided pair",
        TRAJECTORY,
        "f_uncond, f_cond = f.split",
        "f_cond, f_uncond = f.split",
        f"{TRAJECTORY_TEST}::test_every_prediction_guided_or_not",
    ),
    Mutation(
        "read a number of the run on the host",
        TRAJECTORY,
        "            step.add_(1)\n",
        "            step.add_(1 + 0 * int(step))\n",
        f"{SDXL_TEST}::test_a_whole_run_may_be_captured_and_no_number_of_a_plan_is_in_it",
    ),
    Mutation(
        "copy seeds to the device at every row",
        "src/headstart/noise.py",
        "if device not in self._placed:",
        "if True:",
        f"{SDXL_TEST}::test_the_sampler_waits_for_nothing_until_the_last_row_is_checked",
    ),
)


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("src", "kernels", "weights", "tests", "pyproject.toml", "CONTRIBUTING.md"):
            place = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            place(ROOT / name, copy / name)
        clean = run(copy, *dict.fromkeys(mutation.test for mutation in MUTATIONS))
        rows = [try_out(copy, mutation) for mutation in MUTATIONS]
    report = {
        "question": "which mistakes in the graph runner turn a test red",
        "evidence": "measured on a CPU, with the emulated torch.cuda",
        "machine": harness.machine(),
        "tests_pass_without_a_mistake": clean == 0,
        "killed": sum(bool(row["killed"]) for row in rows),
        "of": len(rows),
        "rows": rows,
    }
    harness.write_json(options.out, report)
    survivors = [row["mutation"] for row in rows if not row["killed"]]
    print(f"{report['killed']} of {len(rows)} killed; survivors: {survivors}; clean: {clean == 0}")
    return 1 if survivors or clean else 0


def try_out(copy: Path, mutation: Mutation) -> dict[str, object]:
    """Make the mistake, run its test, and undo it."""
    path = copy / mutation.file
    source = path.read_text()
    if source.count(mutation.old) != 1:
        raise SystemExit(
            f"{mutation.name}: expected its text once in {mutation.file}, found it "
            f"{source.count(mutation.old)} times: rewrite the row"
        )
    path.write_text(source.replace(mutation.old, mutation.new))
    try:
        status = run(copy, mutation.test)
    finally:
        path.write_text(source)
    # 1 is "tests failed"; anything else means that they did not run.
    return {
        "mutation": mutation.name,
        "file": mutation.file,
        "test": mutation.test,
        "killed": status == 1,
    }


def run(copy: Path, *tests: str) -> int:
    """pytest's exit status."""
    rooms = os.pathsep.join(str(copy / room) for room in ("src", "kernels", "weights"))
    environment = {**os.environ, "PYTHONPATH": rooms, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, check=False
    ).returncode


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/mutation_runner.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
