/* SPDX-License-Identifier: Apache-2.0
 *
 * A stranger's program in C++ against the installed CMake package: plans 80 layers over 8 ranks.
 */
#include <layershard/plan.h>

#include <cstdint>
#include <iostream>

int main()
{
	const lshard_tensor block = {"block", 1000 * 1000, 0, LSHARD_STRIPE_BYTES, 0, 0};
	lshard_series_options series = LSHARD_SERIES_OPTIONS_INIT;
	lshard_plan_input input = LSHARD_PLAN_INPUT_INIT;
	lshard_plan_result plan = LSHARD_PLAN_RESULT_INIT;

	series.name = "blocks";
	series.layer_count = 80;
	series.tensors = &block;
	series.tensor_count = 1;
	input.size = 8;
	const lshard_status status = lshard_plan(&series, &input, &plan);
	std::cout << "layershard " << lshard_version() << " from C++: " << lshard_status_text(status) << ", share "
		  << plan.shard_bytes << " of " << plan.replicated_bytes << " bytes\n";
	return status == LSHARD_OK && plan.shard_bytes * 8 == plan.replicated_bytes ? 0 : 1;
}
