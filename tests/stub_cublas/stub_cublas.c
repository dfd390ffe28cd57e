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
 */
#include "stub_cuda.h"

#include <stdlib.h>
#include <string.h>

enum { DONE = 0, INVALID = 7, PLAIN = 0, TRANSPOSED = 1, BFLOAT16 = 14 };

struct product {
	struct product *next;
	const uint16_t *weight;
	const uint16_t *in;
	uint16_t *out;
	int outs, tokens, ins;
	int spoiled;
};

struct handle {
	cuda_stream stream;
	void *workspace;
	struct product *products; /* graphs may run them again: kept until the handle goes */
	long count;
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

int cublasDestroy_v2(void *handle)
{
	struct handle *self = handle;

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

static void multiply(void *argument)
{
	const struct product *product = argument;
	const int ins = product->ins;

	for (int token = 0; token < product->tokens; token++)
		for (int out = 0; out < product->outs; out++) {
			float sum = 0;

			for (int in = 0; in < ins; in++)
				sum += widened(product->in[token * ins + in]) *
				       widened(product->weight[out * ins + in]);
			product->out[token * product->outs + out] = narrowed(sum);
		}
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
	*product = (struct product){self->products, a, b, c, rows, columns, inner, spoil && self->count >= spoil};
	self->products = product;
	return cuLaunchHostFunc(self->stream, multiply, product) == CUDA_OK ? DONE : INVALID;
}
