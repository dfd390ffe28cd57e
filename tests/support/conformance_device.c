/* SPDX-License-Identifier: Apache-2.0
 *
 * conformance_device.c - the device of a rank in the conformance suite: copies, streams, captures, and a log into which
 * layers are copied in the order of a stream, where a kernel would read them, to be compared later.
 *
 * The driver is loaded as the library loads it; where it is the stub of the tests, its work is made to run late. Knows
 * nothing of what a test is about.
 */
#include "conformance.h"
#include "stub_cuda/stub_cuda.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#define LOG_BYTES    (8u << 20)
#define LOG_ENOUGH   (256u << 10) /* it is time to compare */
#define MOST_ENTRIES 1024

enum { CUDA_CAPTURE_GLOBAL = 0, CUDA_CAPTURE_THREAD = 1 };
enum { PASSES = 2, PRIVATE = 2, STREAMS = 3 }; /* streams for passes, the one for copies of the test's own */

/* A tensor that was looked at, and what it should be. */
struct entry {
	size_t offset;
	size_t bytes;
	uint64_t generation;
	uint32_t layer;
	uint32_t tensor;
};

struct device {
	const struct member *member;
	struct cuda_driver driver;
#define CUDA_MEMBER(member, symbol, parameters) cuda_result(*member) parameters;
	CUDA_TEST_FUNCTIONS(CUDA_MEMBER)
#undef CUDA_MEMBER
	int devices;
	cuda_device number;
	cuda_context context;
	cuda_stream streams[STREAMS];
	cuda_event point;
	cuda_address log;
	unsigned char *seen; /* the log on the host */
	size_t used;
	size_t count;
	size_t kept; /* entries that replays make again and again */
	struct entry entries[MOST_ENTRIES];
};

#define DRIVER(device, call) EXPECT((device)->member, (call) == CUDA_OK, "the driver refuses")

/* ---- opening --------------------------------------------------------------------------------------------------- */

static bool find_calls(struct device *device)
{
	void *found;

#define CUDA_FIND(member, symbol, parameters)                                                                          \
	found = dlsym(device->driver.library, #symbol);                                                                \
	if (!found)                                                                                                    \
		return false;                                                                                          \
	memcpy(&device->member, &found, sizeof found);
	CUDA_TEST_FUNCTIONS(CUDA_FIND)
#undef CUDA_FIND
	return true;
}

static void steer_stub(struct device *device)
{
	void (*set)(enum stub_setting, int64_t);
	void *found = dlsym(device->driver.library, "stub_cuda_set");

	if (!found)
		return;
	memcpy(&set, &found, sizeof set);
	set(STUB_LATE, subject.late ? subject.late + device->member->rank : 0);
}

static bool open_driver(struct device *device)
{
	lshard_error error = {""};

	EXPECT(device->member, cuda_driver_open(&device->driver, getenv(CUDA_LIBRARY_VARIABLE), &error) == LSHARD_OK,
	       "%s", error.text);
	EXPECT(device->member, cuda_driver_start(&device->driver, &device->devices, &error) == LSHARD_OK, "%s",
	       error.text);
	EXPECT(device->member, device->devices > 0, "the driver shows no device");
	EXPECT(device->member, find_calls(device), "the driver lacks a function");
	steer_stub(device);
	return true;
failed:
	return false;
}

int device_number(const struct device *device, int32_t rank)
{
	return rank < subject.neighbours ? 0 : rank % device->devices;
}

struct device *device_open(const struct member *member)
{
	struct device *device = calloc(1, sizeof *device);

	if (!device)
		return NULL;
	device->member = member;
	device->seen = malloc(LOG_BYTES);
	if (!device->seen || !open_driver(device))
		goto failed;
	DRIVER(device, device->driver.device_get(&device->number, device_number(device, member->rank)));
	DRIVER(device, device->driver.context_retain(&device->context, device->number));
	DRIVER(device, device->context_set(device->context));
	for (int i = 0; i < STREAMS; i++)
		DRIVER(device, device->driver.stream_create(&device->streams[i], CUDA_STREAM_NON_BLOCKING, 0));
	DRIVER(device, device->driver.event_create(&device->point, CUDA_EVENT_WITHOUT_TIME));
	DRIVER(device, device->driver.allocate(&device->log, LOG_BYTES));
	return device;
failed:
	device_close(device);
	return NULL;
}

/* The context stays current: the next device of this thread sets its own. */
void device_close(struct device *device)
{
	if (!device)
		return;
	if (device->log)
		device->driver.free(device->log);
	if (device->point)
		device->driver.event_destroy(device->point);
	for (int i = STREAMS - 1; i >= 0; i--)
		if (device->streams[i])
			device->driver.stream_destroy(device->streams[i]);
	if (device->context)
		device->driver.context_release(device->number);
	cuda_driver_close(&device->driver);
	free(device->seen);
	free(device);
}

void *device_stream(const struct device *device, unsigned number)
{
	return device->streams[number];
}

bool device_copy(struct device *device, uintptr_t to, uintptr_t from, size_t bytes)
{
	DRIVER(device, device->driver.copy(to, from, bytes, device->streams[PRIVATE]));
	DRIVER(device, device->stream_synchronize(device->streams[PRIVATE]));
	return true;
failed:
	return false;
}

void *device_allocate(struct device *device, size_t bytes)
{
	cuda_address address = 0;

	return device->driver.allocate(&address, bytes) == CUDA_OK ? (void *)(uintptr_t)address : NULL;
}

void device_release(struct device *device, void *memory)
{
	device->driver.free((uintptr_t)memory);
}

bool device_free_bytes(struct device *device, uint64_t *bytes)
{
	size_t available = 0, total = 0;

	DRIVER(device, device->memory_info(&available, &total));
	*bytes = available;
	return true;
failed:
	return false;
}

/* ---- looking --------------------------------------------------------------------------------------------------- */

bool device_look(struct rank *rank, const void *address, size_t bytes, uint32_t layer, uint32_t tensor)
{
	struct device *device = rank->device;

	if ((device->used + bytes > LOG_BYTES || device->used > LOG_ENOUGH || device->count == MOST_ENTRIES) &&
	    !device_looked(rank))
		return false;
	EXPECT(device->member, device->used + bytes <= LOG_BYTES, "a tensor of %zu bytes", bytes);
	DRIVER(device, device->driver.copy(device->log + device->used, (uintptr_t)address, bytes, rank->stream));
	device->entries[device->count++] = (struct entry){device->used, bytes, rank->generation, layer, tensor};
	device->used += (bytes + 15) & ~(size_t)15;
	return true;
failed:
	return false;
}

/* The log begins again after what replays write. */
static void drop_entries(struct device *device)
{
	device->count = device->kept;
	device->used = 0;
	if (device->kept)
		device->used = device->entries[device->kept - 1].offset +
			       ((device->entries[device->kept - 1].bytes + 15) & ~(size_t)15);
}

bool device_looked(struct rank *rank)
{
	struct device *device = rank->device;
	const size_t used = device->used, count = device->count;

	drop_entries(device);
	for (unsigned i = 0; i < PASSES; i++)
		DRIVER(device, device->stream_synchronize(device->streams[i]));
	if (count && !device_copy(device, (uintptr_t)device->seen, device->log, used))
		return false;
	for (size_t i = 0; i < count; i++) {
		const struct entry *entry = &device->entries[i];

		EXPECT(device->member,
		       is_foretold(device->seen + entry->offset, entry->bytes, entry->generation, entry->layer,
				   entry->tensor),
		       "layer %u tensor %u had wrong bytes (k %u, layers %u, first %u, placement %d, generation %llu)",
		       entry->layer, entry->tensor, rank->setting->prefetch, rank->setting->layers,
		       rank->setting->first_layer, (int)rank->setting->placement,
		       (unsigned long long)entry->generation);
	}
	return true;
failed:
	return false;
}

/* ---- captures -------------------------------------------------------------------------------------------------- */

/* What one thread captures must not stop the other ranks; where ranks are processes, the strictest way. */
static int capture_mode(void)
{
	return strcmp(subject.kind, "threads") == 0 ? CUDA_CAPTURE_THREAD : CUDA_CAPTURE_GLOBAL;
}

bool device_capture_begin(struct rank *rank)
{
	struct device *device = rank->device;

	if (!device_looked(rank))
		return false;
	OK_SERIES(rank, lshard_series_prepare(rank->series, device->streams[0]));
	DRIVER(device, device->capture_begin(device->streams[0], capture_mode()));
	DRIVER(device, device->driver.event_record(device->point, device->streams[0]));
	DRIVER(device, device->driver.stream_wait(device->streams[1], device->point, 0));
	rank->stream = device->streams[0];
	return true;
failed:
	return false;
}

bool device_capture_end(struct rank *rank, void **exec)
{
	struct device *device = rank->device;
	cuda_graph graph = NULL;
	cuda_graph_exec made = NULL;

	DRIVER(device, device->driver.event_record(device->point, device->streams[1]));
	DRIVER(device, device->driver.stream_wait(device->streams[0], device->point, 0));
	OK_SERIES(rank, lshard_series_join(rank->series, device->streams[0]));
	DRIVER(device, device->capture_end(device->streams[0], &graph));
	DRIVER(device, device->graph_instantiate(&made, graph, 0));
	DRIVER(device, device->graph_destroy(graph));
	device->kept = device->count;
	*exec = made;
	return true;
failed:
	return false;
}

bool device_capture_drop(struct rank *rank)
{
	struct device *device = rank->device;
	cuda_graph graph = NULL;
	cuda_result result = device->capture_end(device->streams[0], &graph);

	drop_entries(device);
	if (subject.poison && result == CUDA_OK) /* the copies may have been led back by a wait */
		return device->graph_destroy(graph) == CUDA_OK;
	EXPECT(device->member, result != CUDA_OK && !graph, "a capture with streams left unjoined became a graph");
	return true;
failed:
	return false;
}

bool device_replay(struct rank *rank, void *exec)
{
	struct device *device = rank->device;

	OK_SERIES(rank, lshard_series_prepare(rank->series, device->streams[0]));
	DRIVER(device, device->graph_launch(exec, device->streams[0]));
	for (size_t i = 0; i < device->kept; i++)
		if (device->entries[i].generation != POISON)
			device->entries[i].generation = rank->generation;
	return true;
failed:
	return false;
}

void device_forget(struct rank *rank, void *exec)
{
	struct device *device = rank->device;

	device->kept = 0;
	drop_entries(device);
	if (exec)
		device->graph_exec_destroy(exec);
}
