"""Do the tests of the graph runner notice a mistake in it? One mistake at a time must turn one red.

python bench/mutation_runner.py [--minutes 10] [--out bench/results/mutation_runner.json]

A run that is ended goes on where it was; see `mutations.py`.
"""

from __future__ import annotations

import sys

from mutations import Mutation, main

CAPTURE, TRAJECTORY = "src/headstart/runner/capture.py", "src/headstart/runner/trajectory_body.py"
BOUND, GRAPH = "src/headstart/runner/binding.py", "src/headstart/runner/graph.py"
NOISE, HOOKS = "src/headstart/noise.py", "src/headstart/adapters/hooks.py"
IN_RUNNER, IN_FAILED = "tests/graph/test_graph_runner.py", "tests/graph/test_failed_capture.py"
IN_TRAJECTORY, IN_ADAPTERS = (
    "tests/graph/test_trajectory_graph.py", "tests/graph/test_adapter_graphs.py",
)  # fmt: skip
IN_EMULATED, IN_SDXL = "tests/graph/test_emulated_graph.py", "tests/capture/test_sdxl.py"
IN_BINDING, IN_NOISE = "tests/test_binding.py", "tests/test_noise.py"

ROWS = (
    ("forget the step bump", TRAJECTORY, IN_TRAJECTORY, "every_hand_off_point[1-2]",
     "            step.add_(1)\n", ""),
    ("do not wait for the caller's stream", CAPTURE, IN_RUNNER, "results_follow_the_callers_stream",
     "            self._stream.wait_stream(caller)\n            with backend.stream",
     "            with backend.stream"),
    ("do not make the caller wait for the result", CAPTURE,
     IN_RUNNER, "results_follow_the_callers_stream",
     "            caller.wait_stream(self._stream)\n        return outputs",
     "        return outputs"),
    ("do not wait before warming up", CAPTURE, IN_RUNNER, "outputs_belong_to_the_caller",
     "        self._stream.wait_stream(caller)\n        with backend.stream(self._stream):\n"
     "            # On",
     "        with backend.stream(self._stream):\n            # On"),
    ("return a graph-owned tensor", CAPTURE, IN_RUNNER, "outputs_belong_to_the_caller",
     "        return outputs\n\n    def prepare",
     "        return captured.outputs\n\n    def prepare"),
    ("bake the guidance and the coefficients of the first plan", TRAJECTORY,
     IN_TRAJECTORY, "new_numbers_are_copies_and_not_new_captures",
     'table, step = inputs["table"], inputs["step"]\n        draws',
     'table, step = torch.tensor(self.table.coefficients()), inputs["step"]\n        draws'),
    ("bake the scale of the start", TRAJECTORY,
     IN_TRAJECTORY, "new_numbers_are_copies_and_not_new_captures",
     '* inputs["init_scale"]', "* self.table.init_scale"),
    ("bake the timestep", TRAJECTORY, IN_TRAJECTORY, "new_numbers_are_copies_and_not_new_captures",
     'timestep = inputs["table"][:, _TIMESTEP].index_select(0, step).expand(len(x_in))',
     "timestep = torch.full((len(x_in),), self.table[self.rows.index(row)].timestep)"),
    ("skip the copy of a field of the conditioning", CAPTURE,
     IN_RUNNER, "every_field_of_the_conditioning_is_copied_in[pooled]",
     "for name, buffer in captured.inputs.items():\n                    buffer",
     "for name, buffer in captured.inputs.items():\n"
     '                    if name == "cond.pooled":\n                        continue\n'
     "                    buffer"),
    ("do not capture again when a weight is bound anew", CAPTURE,
     IN_RUNNER, "a_weight_that_is_bound_anew_is_captured_anew",
     "if captured is not None and not captured.binding.is_valid(fully=fully):", "if False:"),
    ("do not look at submodules that were replaced", BOUND,
     IN_RUNNER, "a_weight_that_is_bound_anew_is_captured_anew[rebind_module]",
     "(m._parameters, m._buffers, m._modules)", "(m._parameters, m._buffers)"),
    ("leave the state of a network as warm-ups left it", CAPTURE,
     IN_RUNNER, "warm_ups_leave_the_state_of_a_network_as_it_was",
     "state = [(tensor, tensor.clone()) for tensor in buffers_of(program.networks)]", "state = []"),
    ("a pool for every graph", CAPTURE, IN_RUNNER, "one_pool_one_stream_and_thread_local_captures",
     "        if self._pool is None:\n", "        if True:\n"),
    ("drop the newest graph instead of the oldest", CAPTURE,
     IN_RUNNER, "the_graph_used_longest_ago_makes_room",
     "self._drop([next(iter(self._graphs))])", "self._drop([next(reversed(self._graphs))])"),
    ("swap the halves of a guided pair", TRAJECTORY,
     IN_TRAJECTORY, "every_prediction_guided_or_not",
     "f_uncond, f_cond = f.split", "f_cond, f_uncond = f.split"),
    ("read a number of the run on the host", TRAJECTORY,
     IN_SDXL, "a_whole_run_may_be_captured_and_no_number_of_a_plan_is_in_it",
     "            step.add_(1)\n", "            step.add_(1 + 0 * int(step))\n"),
    ("copy seeds to the device at every row", NOISE,
     IN_NOISE, "rows_share_one_copy_of_the_seeds_on_a_device",
     "if device not in self._keys_on:", "if True:"),
    ("look at strengths while capturing", HOOKS,
     IN_ADAPTERS, "a_strength_is_a_copy_also_one_for_each_sample",
     'if strengths.device.type != "cpu" or is_capturing() or is_compiled():',
     'if strengths.device.type != "cpu" or is_compiled():'),
    ("forget which column is whose", GRAPH,
     IN_ADAPTERS, "a_column_that_became_another_adapters_is_captured_anew",
     "key = setting(), None if adapters is None else adapters.columns\n", "key = setting()\n"),
    ("know a weight by its address alone", BOUND,
     IN_BINDING, "the_rest_is_noticed_late[launches-flipped]",
     "return value.data_ptr(), value.dtype, value.shape, value.stride()",
     "return value.data_ptr()"),
    ("know a module by its address", BOUND,
     IN_BINDING, "a_module_made_where_another_was_is_not_taken_for_it",
     "None if value is None else weakref.ref(value)", "None if value is None else id(value)"),
    ("do not look at hooks", BOUND, IN_ADAPTERS, "what_a_graph_cannot_see_makes_another[hooked]",
     "return [*state, *_numbers(self._hooks), *map(tuple, _GLOBAL_HOOKS)]",
     "return [*state, *map(tuple, _GLOBAL_HOOKS)]"),
    ("do not look at the mode of training", BOUND,
     IN_ADAPTERS, "what_a_graph_cannot_see_makes_another[trained]",
     'getattr(network, "graph_state", None), getattr(network, "training", False)',
     '(getattr(network, "graph_state", None),)'),
    ("do not build in the switch of the kernels", GRAPH,
     IN_EMULATED, "layers_that_are_kernels_replay_to_their_own_bits",
     "key = setting(), None if adapters is None else adapters.columns\n",
     "key = None if adapters is None else adapters.columns\n"),
    ("draw the noise of a row that adds none", TRAJECTORY,
     IN_EMULATED, "noise_is_drawn_inside_the_step_that_adds_it",
     'seeds=inputs.get("seeds") if row.draws else None', "seeds=None"),
    ("look back at this row's x0", TRAJECTORY,
     IN_TRAJECTORY, "rows_that_draw_noise_and_rows_that_look_back",
     "before, x_in = x0, x if following is None else following",
     "x_in = x if following is None else following"),
    ("show the first row's picture in every row", TRAJECTORY,
     IN_TRAJECTORY, "every_hand_off_point[1-2]",
     "rgb=previews[number] if", "rgb=previews[0] if"),
    ("one warm-up", CAPTURE,
     IN_RUNNER, "a_capture_comes_after_two_warm_ups_that_the_device_has_finished",
     "for _ in range(self.warmups):", "for _ in range(1):"),
    ("do not wait before the capture", CAPTURE,
     IN_RUNNER, "a_capture_comes_after_two_warm_ups_that_the_device_has_finished",
     "        backend.synchronize(self.device)\n        backend.empty", "        backend.empty"),
    ("capture for all threads", CAPTURE, IN_RUNNER, "one_pool_one_stream_and_thread_local_captures",
     'graph.capture_begin(self._pool, capture_error_mode="thread_local")',
     'graph.capture_begin(self._pool, capture_error_mode="global")'),
    ("capture the smallest first", CAPTURE, IN_RUNNER, "the_largest_is_prepared_first",
     "key=lambda request: -_size_bytes", "key=lambda request: _size_bytes"),
    ("let threads in at once", CAPTURE, IN_RUNNER, "threads_take_turns",
     "with self._lock, torch.inference_mode(False), torch.no_grad():\n            caller",
     "with torch.inference_mode(False), torch.no_grad():\n            caller"),
    ("look at no address", BOUND,
     IN_BINDING, "what_users_do_to_a_module_is_noticed_at_once[data_replaced]",
     "list(map(_address, self._weights)) == self._addresses", "True"),
    ("take no notice of what is registered", BOUND,
     IN_BINDING, "what_users_do_to_a_module_is_noticed_at_once[replaced]",
     "or now != self._generation", ""),
    ("look at everything once and never again", BOUND,
     IN_BINDING, "the_rest_is_noticed_late[launches-deleted]",
     "or self._launches >= FULL_CHECK", ""),
    ("leave a failed capture as it is", CAPTURE,
     IN_FAILED, "the_stream_the_pool_and_the_site_are_usable_after_it",
     "                self._give_up(graph)\n", ""),
    ("leave the pool of a failed capture open", CAPTURE,
     IN_FAILED, "the_stream_the_pool_and_the_site_are_usable_after_it",
     "            self.backend.close_pool(self.device, pool)\n", ""),
    ("believe that every device ends its captures", CAPTURE,
     IN_FAILED, "a_device_that_does_not_end_the_capture_makes_the_site_dead",
     "if self.backend.is_current_stream_capturing():", "if False:"),
    ("use a pool that every graph has left", CAPTURE,
     IN_FAILED, "a_pool_that_every_graph_has_left_is_not_used_again",
     "if all(other.pool is not self._pool for other in self._graphs.values()):", "if False:"),
    ("choose no algorithms in warm-ups", CAPTURE,
     IN_RUNNER, "algorithms_are_chosen_in_warm_ups_and_not_in_the_capture",
     "with _capturing(), CUDNN_BENCHMARK:", "with _capturing():"),
    ("fall back without being asked", GRAPH,
     IN_RUNNER, "what_cannot_be_captured_is_an_error_that_says_why",
     "                if not self.fallback:\n                    raise\n", ""),
    ("try a refused shape again and again", GRAPH,
     IN_RUNNER, "eager_is_a_fallback_only_when_asked_for",
     "                self._refused.add(form)\n", ""),
)  # fmt: skip
"""Name, the file it is in, the file and name of the test that notices it; what becomes what."""
MUTATIONS = tuple(
    Mutation(name, file, old, new, (f"{tests}::test_{test}",))
    for name, file, tests, test, old, new in ROWS
)

if __name__ == "__main__":
    sys.exit(
        main(
            "which mistakes in the graph runner turn a test red", MUTATIONS, "mutation_runner.json"
        )
    )
