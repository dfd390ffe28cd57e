/* SPDX-License-Identifier: Apache-2.0
 *
 * fixture.c - see fixture.h.
 */
#include "fixture.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int fixture_open(struct fixture *fixture, int argc, char **argv)
{
	json_error_t error;

	fixture->model = getenv("LAYERSHARD_TEST_MODEL");
	if (!fixture->model || access(fixture->model, R_OK) != 0) {
		(void)printf("skipped: LAYERSHARD_TEST_MODEL (%s) names no readable model; scripts/fetch_model.sh "
			     "fetches it\n",
			     fixture->model ? fixture->model : "not set");
		return 77;
	}
	fixture->root = json_load_file(argc > 1 ? argv[1] : "tests/examples/llama/fixtures/smollm2.json", 0, &error);
	fixture->cases = json_object_get(fixture->root, "cases");
	if (json_array_size(fixture->cases) == 0) {
		(void)fprintf(stderr, "no cases in the fixture (first argument): %s\n", error.text);
		fixture_close(fixture);
		return 1;
	}
	return 0;
}

void fixture_close(struct fixture *fixture)
{
	json_decref(fixture->root);
}

int32_t fixture_id(const json_t *one, const char *array, size_t number)
{
	return (int32_t)json_integer_value(json_array_get(json_object_get(one, array), number));
}

size_t fixture_count(const json_t *one, const char *array)
{
	return json_array_size(json_object_get(one, array));
}

const char *fixture_prompt(const json_t *one)
{
	return json_string_value(json_object_get(one, "prompt"));
}
