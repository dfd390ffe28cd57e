/* SPDX-License-Identifier: Apache-2.0
 *
 * test_llama.c - the runner, replicated, against Hugging Face transformers on the real model: 32 greedy tokens id for
 * id, and the logits after each prompt. A different id is accepted only where transformers' two largest logits are
 * within 1e-4; what follows it is then another text, and not compared.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "engine.h"
#include "fixture.h"

#define GAP         1e-4
#define LOGIT_ERROR 1e-3 /* of the largest logit */
#define STEPS       32

static struct fixture fixture;
static engine *runner;

struct answer {
	int32_t tokens[STEPS];
	size_t count;
};

static int collect(void *user, int32_t token, const char *text, size_t bytes)
{
	struct answer *const answer = user;

	(void)text;
	(void)bytes;
	answer->tokens[answer->count++] = token;
	return 0;
}

static struct answer generate(const json_t *one, uint32_t steps)
{
	struct answer answer = {{0}, 0};
	engine_error error = {""};
	int32_t *tokens = NULL;
	size_t count = 0;

	if (engine_encode(runner, fixture_prompt(one), &tokens, &count, &error) < 0 ||
	    engine_generate(runner, tokens, count, steps, collect, &answer, &error) < 0)
		fail_msg("%s", error.text);
	free(tokens);
	return answer;
}

/* Transformers was not told to stop at the end of the text; the runner stops there. */
static size_t wanted_count(const json_t *one)
{
	const int32_t end = (int32_t)json_integer_value(json_object_get(fixture.root, "eos"));
	size_t i;

	for (i = 0; i < STEPS; i++)
		if (fixture_id(one, "tokens", i) == end)
			return i + 1;
	return STEPS;
}

static void greedy_tokens_are_those_of_transformers(void **state)
{
	const json_t *one;
	size_t number;

	(void)state;
	json_array_foreach(fixture.cases, number, one)
	{
		const struct answer answer = generate(one, STEPS);
		size_t i;

		assert_int_equal(fixture_count(one, "tokens"), STEPS);
		for (i = 0; i < answer.count && answer.tokens[i] == fixture_id(one, "tokens", i); i++)
			;
		if (i < wanted_count(one)) {
			const double gap = json_number_value(json_array_get(json_object_get(one, "gaps"), i));

			if (i == answer.count || gap > GAP)
				fail_msg("prompt %zu: token %zu of %zu is %d instead of %d, gap %g", number, i,
					 answer.count, i < answer.count ? answer.tokens[i] : -1,
					 fixture_id(one, "tokens", i), gap);
			(void)printf("prompt %zu: differs from token %zu on, where the gap is %g\n", number, i, gap);
		} else {
			assert_int_equal(answer.count, wanted_count(one));
		}
	}
}

static void logits_are_those_of_transformers(void **state)
{
	const json_t *one, *entry;
	double worst = 0;
	size_t number, i, count;

	(void)state;
	json_array_foreach(fixture.cases, number, one)
	{
		const json_t *const largest = json_object_get(one, "logits");
		const double scale = fabs(json_number_value(json_array_get(json_array_get(largest, 0), 1)));
		const float *const logits = engine_logits(runner, &count);

		(void)generate(one, 1);
		assert_in_range(json_array_size(largest), 20, 1000);
		json_array_foreach(largest, i, entry)
		{
			const double wanted = json_number_value(json_array_get(entry, 1));
			const double off =
				fabs((double)logits[json_integer_value(json_array_get(entry, 0))] - wanted) / scale;

			worst = off > worst ? off : worst;
			if (!(off <= LOGIT_ERROR))
				fail_msg("prompt %zu: logit %zu is off by %g of the largest", number, i, off);
		}
	}
	(void)printf("largest difference of a logit: %.2g of the largest\n", worst);
}

static void everything_is_read_once(void **state)
{
	engine_model model = {0};
	engine_stats stats;

	(void)state;
	assert_int_equal(engine_model_info(fixture.model, &model, NULL), LSHARD_OK);
	engine_get_stats(runner, &stats);
	assert_int_equal(stats.read_bytes,
			 model.sharded_file_bytes + model.unsharded_file_bytes + stats.metadata_read_bytes);
	assert_in_range(stats.read_bytes, model.file_bytes - 4096, model.file_bytes + 4096);
	assert_int_equal(stats.layers, 30);
}

static int open_runner(void **state)
{
	engine_options options = ENGINE_OPTIONS_INIT;
	engine_error error = {""};

	(void)state;
	options.model = fixture.model;
	if (engine_open(&options, &runner, &error) == LSHARD_OK)
		return 0;
	(void)fprintf(stderr, "%s\n", error.text);
	return 1;
}

static int close_runner(void **state)
{
	(void)state;
	engine_close(runner);
	return 0;
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(everything_is_read_once),
		cmocka_unit_test(logits_are_those_of_transformers),
		cmocka_unit_test(greedy_tokens_are_those_of_transformers),
	};
	int status = fixture_open(&fixture, argc, argv);

	if (status != 0)
		return status;
	status = cmocka_run_group_tests(tests, open_runner, close_runner);
	fixture_close(&fixture);
	return status;
}
