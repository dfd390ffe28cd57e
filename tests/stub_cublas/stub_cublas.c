/* SPDX-License-Identifier: Apache-2.0
 *
 * stub_cublas.c - a stand-in for cuBLAS on the stub driver: the one product that the program asks for, computed by the
 * processor in stream order, also in captures.
 *
 * Steered by the environment, for programs that cannot be linked to it:
 *   STUB_CUBLAS_SPOIL=N   the N-th product of a process and all after it have a wrong bit
 *   STUB_CUBLAS_GARBLE=N  from the N-th product on, copies between devices change their first byte
 *   STUB_CUBLAS_LATE=SEED streams run their work late
 *   STUB_CUBLAS_VOID=1    the time between two events grows with every product, so that no two arms agree
 *   STUB_CUBLAS_TALLY=F   when a handle goes, a line of JSON is added to the file F: products asked for and carried out
 *                         (of graphs at each launch), those at whose start copies asked for before were not finished;
 *                         bytes that this process' copies have moved
 */
#include "stub_cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DONE = 0, INVALID = 7, PLAIN = 0, TRANSPOSED = 1, BFLOAT16 = 14 };

struct handle;

struct product {
	struct product *next;
	struct handle *owner;
	const uint16_t *weight;
	const uint16_t *in;
	uint16_t *out;
	int outs, tokens, ins;
	int spoiled;
	uint64_t number; /* of what streams were asked for before */
};

struct handle {
	cuda_stream stream;
	void *workspace;
	struct product *products; /* graphs may run them again: kept until the handle goes */
	long count;               /* products asked for */
	long done;
	long beside_copies;
};

int cublasCreate_v2(void **handle);
int cublasDestroy_v2(void *handle);
int cublasGetVersion_v2(void *handle, int *version);
int cublasSetStream_v2(void *handle, cuda_stream stream);
int cublasSetWorkspace_v2(void *handle, void *workspace, size_t bytes);
int cublasGemmEx(void *handle, int transpose_a, int transpose_b, int rows, int columns, int inner, const void *alpha,
		 const void *a, int a_type, int a_pitch, const void *b, int b_type, int b_pitch, const void *beta,
		 void *c, int c_type, int c_pitch, int compute, int algorithm);

static long steered(const char *name)
{
	const char *text = getenv(name);

	return text ? strtol(text, NULL, 10) : 0;
}

int cublasCreate_v2(void **handle)
{
	*handle = calloc(1, sizeof(struct handle));
	if (steered("STUB_CUBLAS_LATE"))
		stub_cuda_set(STUB_LATE, steered("STUB_CUBLAS_LATE"));
	return *handle ? DONE : INVALID;
}

static void tell(const struct handle *self)
{
	const char *path = getenv("STUB_CUBLAS_TALLY");
	FILE *file = path ? fopen(path, "a") : NULL;

	if (!file)
		return;
	fprintf(file, "{\"asked\": %ld, \"done\": %ld, \"beside_copies\": %ld, \"copied\": %llu}\n", self->count,
		self->done, self->beside_copies, (unsigned long long)stub_cuda_copied());
	fclose(file);
}

int cublasDestroy_v2(void *handle)
{
	struct handle *self = handle;

	tell(self);
	while (self->products) {
		struct product *product = self->products;

		self->products = product->next;
		free(product);
	}
	free(self);
	return DONE;
}

int cublasGetVersion_v2(void *handle, int *version)
{
	(void)handle;
	*version = 130100;
	return DONE;
}

/* As the real one: the workspace belongs to the stream before. */
int cublasSetStream_v2(void *handle, cuda_stream stream)
{
	((struct handle *)handle)->stream = stream;
	((struct handle *)handle)->workspace = NULL;
	return DONE;
}

int cublasSetWorkspace_v2(void *handle, void *workspace, size_t bytes)
{
	((struct handle *)handle)->workspace = workspace;
	return workspace && bytes ? DONE : INVALID;
}

static float widened(uint16_t number)
{
	const uint32_t bits = (uint32_t)number << 16;
	float value;

	memcpy(&value, &bits, sizeof value);
	return value;
}

static uint16_t narrowed(float value)
{
	uint32_t bits;

	memcpy(&bits, &value, sizeof bits);
	return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Four sums at once, which a processor can keep going beside each other; always the same ones, for the same bits. */
static float dot(const uint16_t *a, const uint16_t *b, int count)
{
	float sums[4] = {0, 0, 0, 0};

	for (int i = 0; i < count; i += 4) /* a multiple of 8 */
		for (int lane = 0; lane < 4; lane++)
			sums[lane] += widened(a[i + lane]) * widened(b[i + lane]);
	return sums[0] + sums[1] + (sums[2] + sums[3]);
}

static void multiply(void *argument)
{
	const struct product *product = argument;
	const int ins = product->ins, outs = product->outs;

	product->owner->done++;
	product->owner->beside_copies += stub_cuda_unfinished_copies(product->number) > 0;
	for (int token = 0; token < product->tokens; token++)
		for (int out = 0; out < outs; out++)
			product->out[token * outs + out] =
				narrowed(dot(product->in + token * ins, product->weight + out * ins, ins));
	product->out[0] ^= (uint16_t)product->spoiled;
}

static void steer(const struct handle *self)
{
	const long garble = steered("STUB_CUBLAS_GARBLE");

	if (garble && self->count >= garble)
		stub_cuda_set(STUB_GARBLE, 1);
	if (steered("STUB_CUBLAS_VOID"))
		stub_cuda_set(STUB_PULL_NS, 50000 + self->count * 100);
}

int cublasGemmEx(void *handle, int transpose_a, int transpose_b, int rows, int columns, int inner, const void *alpha,
		 const void *a, int a_type, int a_pitch, const void *b, int b_type, int b_pitch, const void *beta,
		 void *c, int c_type, int c_pitch, int compute, int algorithm)
{
	struct handle *self = handle;
	struct product *product;
	const long spoil = steered("STUB_CUBLAS_SPOIL");

	(void)compute;
	(void)algorithm;
	if (transpose_a != TRANSPOSED || transpose_b != PLAIN || a_type != BFLOAT16 || b_type != BFLOAT16 ||
	    c_type != BFLOAT16 || a_pitch != inner || b_pitch != inner || c_pitch != rows || !self->workspace ||
	    *(const float *)alpha < 1 || *(const float *)beta > 0)
		return INVALID;
	product = calloc(1, sizeof *product);
	if (!product)
		return INVALID;
	self->count++;
	steer(self);
	*product = (struct product){.next = self->products,
				    .owner = self,
				    .weight = a,
				    .in = b,
				    .out = c,
				    .outs = rows,
				    .tokens = columns,
				    .ins = inner,
				    .spoiled = spoil && self->count >= spoil,
				    .number = stub_cuda_asked()};
	self->products = product;
	return cuLaunchHostFunc(self->stream, multiply, product) == CUDA_OK ? DONE : INVALID;
}
