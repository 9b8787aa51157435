"""Do the tests of the graph runner notice a mistake in it? One mistake at a time must turn one red.

python bench/mutation_runner.py [--minutes 10] [--out bench/results/mutation_runner.json]

A run that is ended goes on where it was; see `mutations.py`.
"""

from __future__ import annotations

import sys

from mutations import ROOT, Mutation, main

CAPTURE, TRAJECTORY = "src/headstart/runner/capture.py", "src/headstart/runner/trajectory_body.py"
BOUND = "src/headstart/runner/binding.py"
RUNNER_TEST = "tests/graph/test_graph_runner.py"
BOUND_TEST, FAILED_TEST = "tests/test_binding.py", "tests/graph/test_failed_capture.py"
TRAJECTORY_TEST = "tests/graph/test_trajectory_graph.py"
ADAPTER_TEST = "tests/graph/test_adapter_graphs.py"
EMULATED_TEST = "tests/graph/test_emulated_graph.py"
SDXL_TEST = "tests/capture/test_sdxl.py"

MUTATIONS = (
    Mutation(
        "forget the step bump",
        TRAJECTORY,
        "            step.add_(1)\n",
        "",
        (f"{TRAJECTORY_TEST}::test_every_hand_off_point[1-2]",),
    ),
    Mutation(
        "do not wait for the caller's stream",
        CAPTURE,
        "            self._stream.wait_stream(caller)\n            with backend.stream",
        "            with backend.stream",
        (f"{RUNNER_TEST}::test_results_follow_the_callers_stream",),
    ),
    Mutation(
        "do not make the caller wait for the result",
        CAPTURE,
        "            caller.wait_stream(self._stream)\n        return outputs",
        "        return outputs",
        (f"{RUNNER_TEST}::test_results_follow_the_callers_stream",),
    ),
    Mutation(
        "do not wait before warming up",
        CAPTURE,
        "        self._stream.wait_stream(caller)\n        with backend.stream(self._stream):\n"
        "            # On",
        "        with backend.stream(self._stream):\n            # On",
        (f"{RUNNER_TEST}::test_outputs_belong_to_the_caller",),
    ),
    Mutation(
        "return a graph-owned tensor",
        CAPTURE,
        "        return outputs\n\n    def prepare",
        "        return captured.outputs\n\n    def prepare",
        (f"{RUNNER_TEST}::test_outputs_belong_to_the_caller",),
    ),
    Mutation(
        "bake the guidance and the coefficients of the first plan",
        TRAJECTORY,
        'table, step = inputs["table"], inputs["step"]\n        draws',
        'table, step = torch.tensor(self.table.coefficients()), inputs["step"]\n        draws',
        (f"{TRAJECTORY_TEST}::test_new_numbers_are_copies_and_not_new_captures",),
    ),
    Mutation(
        "bake the scale of the start",
        TRAJECTORY,
        '* inputs["init_scale"]',
        "* self.table.init_scale",
        (f"{TRAJECTORY_TEST}::test_new_numbers_are_copies_and_not_new_captures",),
    ),
    Mutation(
        "bake the timestep",
        TRAJECTORY,
        'timestep = inputs["table"][:, _TIMESTEP].index_select(0, step).expand(len(x_in))',
        "timestep = torch.full((len(x_in),), self.table[self.rows.index(row)].timestep)",
        (f"{TRAJECTORY_TEST}::test_new_numbers_are_copies_and_not_new_captures",),
    ),
    Mutation(
        "skip the copy of a field of the conditioning",
        CAPTURE,
        "for name, buffer in captured.inputs.items():\n                    buffer",
        "for name, buffer in captured.inputs.items():\n"
        '                    if name == "cond.pooled":\n                        continue\n'
        "                    buffer",
        (f"{RUNNER_TEST}::test_every_field_of_the_conditioning_is_copied_in[pooled]",),
    ),
    Mutation(
        "do not capture again when a weight is bound anew",
        CAPTURE,
        "if captured is not None and not captured.binding.is_valid(fully=fully):",
        "if False:",
        (f"{RUNNER_TEST}::test_a_weight_that_is_bound_anew_is_captured_anew",),
    ),
    Mutation(
        "do not look at submodules that were replaced",
        BOUND,
        "(m._parameters, m._buffers, m._modules)",
        "(m._parameters, m._buffers)",
        (f"{RUNNER_TEST}::test_a_weight_that_is_bound_anew_is_captured_anew[rebind_module]",),
    ),
    Mutation(
        "leave the state of a network as warm-ups left it",
        CAPTURE,
        "state = [(tensor, tensor.clone()) for tensor in buffers_of(program.networks)]",
        "state = []",
        (f"{RUNNER_TEST}::test_warm_ups_leave_the_state_of_a_network_as_it_was",),
    ),
    Mutation(
        "a pool for every graph",
        CAPTURE,
        "        if self._pool is None:\n",
        "        if True:\n",
        (f"{RUNNER_TEST}::test_one_pool_one_stream_and_thread_local_captures",),
    ),
    Mutation(
        "drop the newest graph instead of the oldest",
        CAPTURE,
        "self._drop([next(iter(self._graphs))])",
        "self._drop([next(reversed(self._graphs))])",
        (f"{RUNNER_TEST}::test_the_graph_used_longest_ago_makes_room",),
    ),
    Mutation(
        "swap the halves of a guided pair",
        TRAJECTORY,
        "f_uncond, f_cond = f.split",
        "f_cond, f_uncond = f.split",
        (f"{TRAJECTORY_TEST}::test_every_prediction_guided_or_not",),
    ),
    Mutation(
        "read a number of the run on the host",
        TRAJECTORY,
        "            step.add_(1)\n",
        "            step.add_(1 + 0 * int(step))\n",
        (f"{SDXL_TEST}::test_a_whole_run_may_be_captured_and_no_number_of_a_plan_is_in_it",),
    ),
    Mutation(
        "copy seeds to the device at every row",
        "src/headstart/noise.py",
        "if device not in self._keys_on:",
        "if True:",
        ("tests/test_noise.py::test_rows_share_one_copy_of_the_seeds_on_a_device",),
    ),
    Mutation(
        "look at strengths while capturing",
        "src/headstart/adapters/hooks.py",
        'if strengths.device.type != "cpu" or is_capturing() or is_compiled():',
        'if strengths.device.type != "cpu" or is_compiled():',
        (f"{ADAPTER_TEST}::test_a_strength_is_a_copy_also_one_for_each_sample",),
    ),
    Mutation(
        "forget which column is whose",
        "src/headstart/runner/graph.py",
        "key = setting(), None if adapters is None else adapters.columns\n",
        "key = setting()\n",
        (f"{ADAPTER_TEST}::test_a_column_that_became_another_adapters_is_captured_anew",),
    ),
    Mutation(
        "know a weight by its address alone",
        BOUND,
        "return value.data_ptr(), value.dtype, value.shape, value.stride()",
        "return value.data_ptr()",
        (f"{BOUND_TEST}::test_the_rest_is_noticed_late[launches-flipped]",),
    ),
    Mutation(
        "know a module by its address",
        BOUND,
        "None if value is None else weakref.ref(value)",
        "None if value is None else id(value)",
        (f"{BOUND_TEST}::test_a_module_made_where_another_was_is_not_taken_for_it",),
    ),
    Mutation(
        "do not look at hooks",
        BOUND,
        "return [*state, *_numbers(self._hooks), *map(tuple, _EVERYWHERE)]",
        "return [*state, *map(tuple, _EVERYWHERE)]",
        (f"{ADAPTER_TEST}::test_what_a_graph_cannot_see_makes_another[hooked]",),
    ),
    Mutation(
        "do not look at the mode of training",
        BOUND,
        'getattr(network, "graph_state", None), getattr(network, "training", False)',
        '(getattr(network, "graph_state", None),)',
        (f"{ADAPTER_TEST}::test_what_a_graph_cannot_see_makes_another[trained]",),
    ),
    Mutation(
        "do not build in the switch of the kernels",
        "src/headstart/runner/graph.py",
        "key = setting(), None if adapters is None else adapters.columns\n",
        "key = None if adapters is None else adapters.columns\n",
        (f"{EMULATED_TEST}::test_layers_that_are_kernels_replay_to_their_own_bits",),
    ),
    Mutation(
        "draw the noise of a row that adds none",
        TRAJECTORY,
        'seeds=inputs.get("seeds") if row.draws else None',
        "seeds=None",
        (f"{EMULATED_TEST}::test_noise_is_drawn_inside_the_step_that_adds_it",),
    ),
    Mutation(
        "look back at this row's x0",
        TRAJECTORY,
        "before, x_in = x0, x if following is None else following",
        "x_in = x if following is None else following",
        (f"{TRAJECTORY_TEST}::test_rows_that_draw_noise_and_rows_that_look_back",),
    ),
    Mutation(
        "show the first row's picture in every row",
        TRAJECTORY,
        "rgb=previews[number] if",
        "rgb=previews[0] if",
        (f"{TRAJECTORY_TEST}::test_every_hand_off_point[1-2]",),
    ),
    Mutation(
        "one warm-up",
        CAPTURE,
        "for _ in range(self.warmups):",
        "for _ in range(1):",
        (f"{RUNNER_TEST}::test_a_capture_comes_after_two_warm_ups_that_the_device_has_finished",),
    ),
    Mutation(
        "do not wait before the capture",
        CAPTURE,
        "        backend.synchronize(self.device)\n        backend.empty",
        "        backend.empty",
        (f"{RUNNER_TEST}::test_a_capture_comes_after_two_warm_ups_that_the_device_has_finished",),
    ),
    Mutation(
        "capture for all threads",
        CAPTURE,
        'graph.capture_begin(self._pool, capture_error_mode="thread_local")',
        'graph.capture_begin(self._pool, capture_error_mode="global")',
        (f"{RUNNER_TEST}::test_one_pool_one_stream_and_thread_local_captures",),
    ),
    Mutation(
        "capture the smallest first",
        CAPTURE,
        "key=lambda request: -_size_bytes",
        "key=lambda request: _size_bytes",
        (f"{RUNNER_TEST}::test_the_largest_is_prepared_first",),
    ),
    Mutation(
        "let threads in at once",
        CAPTURE,
        "with self._lock, torch.inference_mode(False), torch.no_grad():\n            caller",
        "with torch.inference_mode(False), torch.no_grad():\n            caller",
        (f"{RUNNER_TEST}::test_threads_take_turns",),
    ),
    Mutation(
        "look at no address",
        BOUND,
        "list(map(_address, self._weights)) == self._addresses",
        "True",
        (f"{BOUND_TEST}::test_what_users_do_to_a_module_is_noticed_at_once[data_replaced]",),
    ),
    Mutation(
        "take no notice of what is registered",
        BOUND,
        "or now != self._generation",
        "",
        (f"{BOUND_TEST}::test_what_users_do_to_a_module_is_noticed_at_once[replaced]",),
    ),
    Mutation(
        "look at everything once and never again",
        BOUND,
        "or self._launches >= EVERY",
        "",
        (f"{BOUND_TEST}::test_the_rest_is_noticed_late[launches-deleted]",),
    ),
    Mutation(
        "leave a failed capture as it is",
        CAPTURE,
        "                self._give_up(graph)\n",
        "",
        (f"{FAILED_TEST}::test_the_stream_the_pool_and_the_site_are_usable_after_it",),
    ),
    Mutation(
        "leave the pool of a failed capture open",
        CAPTURE,
        "            self.backend.close_pool(self.device, pool)\n",
        "",
        (f"{FAILED_TEST}::test_the_stream_the_pool_and_the_site_are_usable_after_it",),
    ),
    Mutation(
        "believe that every device ends its captures",
        CAPTURE,
        "if self.backend.is_current_stream_capturing():",
        "if False:",
        (f"{FAILED_TEST}::test_a_device_that_does_not_end_the_capture_makes_the_site_dead",),
    ),
    Mutation(
        "use a pool that every graph has left",
        CAPTURE,
        "if all(other.pool is not self._pool for other in self._graphs.values()):",
        "if False:",
        (f"{FAILED_TEST}::test_a_pool_that_every_graph_has_left_is_not_used_again",),
    ),
    Mutation(
        "choose no algorithms in warm-ups",
        CAPTURE,
        "with _capturing(), CUDNN_BENCHMARK:",
        "with _capturing():",
        (f"{RUNNER_TEST}::test_algorithms_are_chosen_in_warm_ups_and_not_in_the_capture",),
    ),
    Mutation(
        "fall back without being asked",
        "src/headstart/runner/graph.py",
        "                if not self.fallback:\n                    raise\n",
        "",
        (f"{RUNNER_TEST}::test_what_cannot_be_captured_is_an_error_that_says_why",),
    ),
    Mutation(
        "try a refused shape again and again",
        "src/headstart/runner/graph.py",
        "                self._refused.add(form)\n",
        "",
        (f"{RUNNER_TEST}::test_eager_is_a_fallback_only_when_asked_for",),
    ),
)

if __name__ == "__main__":
    out = ROOT / "bench/results/mutation_runner.json"
    sys.exit(main("which mistakes in the graph runner turn a test red", MUTATIONS, out))
