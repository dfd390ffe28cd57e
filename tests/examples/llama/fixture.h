/* SPDX-License-Identifier: Apache-2.0
 *
 * fixture.h - what Hugging Face transformers makes of the real model: fixtures/smollm2.json, by
 * scripts/make_fixture.py.
 */
#ifndef FIXTURE_H
#define FIXTURE_H

#include <jansson.h>

struct fixture {
	json_t *root;
	json_t *cases;
	const char *model; /* path of the real model */
};

/* The fixture's path is argv[1], the model's is in LAYERSHARD_TEST_MODEL. Returns 0, or what main returns: 77 where
 * there is no model (and the reason is printed), 1 where the fixture cannot be read. */
int fixture_open(struct fixture *fixture, int argc, char **argv);
void fixture_close(struct fixture *fixture);

/* Member @p number of the case's array of ids. */
int32_t fixture_id(const json_t *one, const char *array, size_t number);
size_t fixture_count(const json_t *one, const char *array);
const char *fixture_prompt(const json_t *one);

#endif
