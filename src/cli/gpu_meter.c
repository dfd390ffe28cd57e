/* SPDX-License-Identifier: Apache-2.0
 *
 * gpu_meter.c - see gpu_meter.h.
 */
#include "gpu_meter.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LIBRARY      "libnvidia-ml.so.1"
#define INTERVAL_NS  5000000
#define SAMPLES_MOST 65536u

enum { METER_OK = 0, METER_CLOCK_SM = 1, METER_CLOCK_MEMORY = 2, METER_POWER_NOW = 186, METER_UNSIGNED = 1 };

/* nvmlFieldValue_t */
struct meter_field {
	unsigned id;
	unsigned scope;
	long long timestamp;
	long long latency;
	int type;
	int result;
	union {
		double real;
		unsigned whole;
		unsigned long long wide;
	} value;
};

/* X(member, symbol, parameters); every one returns an nvmlReturn_t */
#define METER_FUNCTIONS(X)                                                                                             \
	X(init, nvmlInit_v2, (void))                                                                                   \
	X(shutdown, nvmlShutdown, (void))                                                                              \
	X(find, nvmlDeviceGetHandleByPciBusId_v2, (const char *bus, void **device))                                    \
	X(clock, nvmlDeviceGetClockInfo, (void *device, int kind, unsigned *mhz))                                      \
	X(fields, nvmlDeviceGetFieldValues, (void *device, int count, struct meter_field *fields))                     \
	X(power, nvmlDeviceGetPowerUsage, (void *device, unsigned *milliwatts))                                        \
	X(throttle, nvmlDeviceGetCurrentClocksThrottleReasons, (void *device, unsigned long long *reasons))

enum { METER_SM, METER_MEMORY, METER_WATTS, METER_FIGURES };

struct gpu_meter {
	void *library;
#define METER_MEMBER(member, symbol, parameters) int(*member) parameters;
	METER_FUNCTIONS(METER_MEMBER)
#undef METER_MEMBER
	void *device;
	pthread_t thread;
	bool running;
	atomic_bool stop;
	double *samples[METER_FIGURES]; /* [SAMPLES_MOST], below 0: not told */
	unsigned count;
	unsigned long long throttled;
};

static const struct {
	const char *symbol;
	size_t member;
} entries[] = {
#define METER_ENTRY(member, symbol, parameters) {#symbol, offsetof(struct gpu_meter, member)},
	METER_FUNCTIONS(METER_ENTRY)
#undef METER_ENTRY
};

static bool load(struct gpu_meter *meter)
{
	meter->library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
	for (size_t i = 0; meter->library && i < sizeof entries / sizeof entries[0]; i++) {
		void *found = dlsym(meter->library, entries[i].symbol);

		if (!found)
			return false;
		memcpy((char *)meter + entries[i].member, &found, sizeof found);
	}
	return meter->library != NULL;
}

static bool make_room(struct gpu_meter *meter)
{
	for (int figure = 0; figure < METER_FIGURES; figure++) {
		meter->samples[figure] = calloc(SAMPLES_MOST, sizeof(double));
		if (!meter->samples[figure])
			return false;
	}
	return true;
}

struct gpu_meter *gpu_meter_open(const struct gpu *gpu)
{
	struct gpu_meter *meter = calloc(1, sizeof *meter);

	if (!meter)
		return NULL;
	if (!load(meter) || !make_room(meter) || meter->init() != METER_OK)
		goto close_library;
	if (meter->find(gpu->bus, &meter->device) == METER_OK)
		return meter;
	meter->shutdown();
close_library:
	meter->device = NULL;
	gpu_meter_close(meter);
	return NULL;
}

void gpu_meter_close(struct gpu_meter *meter)
{
	struct gpu_reading unread;

	if (!meter)
		return;
	gpu_meter_end(meter, &unread);
	if (meter->device)
		meter->shutdown();
	for (int figure = 0; figure < METER_FIGURES; figure++)
		free(meter->samples[figure]);
	if (meter->library)
		dlclose(meter->library);
	free(meter);
}

/* ---- Sampling ------------------------------------------------------------------------------------------------ */

/* What is drawn now, where the driver tells that: the other figure is the mean of the last second. */
static double read_watts(struct gpu_meter *meter)
{
	struct meter_field now = {.id = METER_POWER_NOW};
	unsigned milliwatts;

	if (meter->fields(meter->device, 1, &now) == METER_OK && now.result == METER_OK && now.type == METER_UNSIGNED)
		return now.value.whole / 1000.0;
	return meter->power(meter->device, &milliwatts) == METER_OK ? milliwatts / 1000.0 : -1.0;
}

static void take_sample(struct gpu_meter *meter)
{
	unsigned sm, memory;
	unsigned long long reasons;
	const unsigned at = meter->count;

	meter->samples[METER_SM][at] = meter->clock(meter->device, METER_CLOCK_SM, &sm) == METER_OK ? sm : -1.0;
	meter->samples[METER_MEMORY][at] =
		meter->clock(meter->device, METER_CLOCK_MEMORY, &memory) == METER_OK ? memory : -1.0;
	meter->samples[METER_WATTS][at] = read_watts(meter);
	if (meter->throttle(meter->device, &reasons) == METER_OK)
		meter->throttled |= reasons;
	meter->count++;
}

static void *sample(void *argument)
{
	struct gpu_meter *meter = argument;
	const struct timespec interval = {0, INTERVAL_NS};

	do {
		take_sample(meter);
		nanosleep(&interval, NULL);
	} while (!atomic_load(&meter->stop) && meter->count < SAMPLES_MOST);
	return NULL;
}

void gpu_meter_begin(struct gpu_meter *meter)
{
	if (!meter || meter->running)
		return;
	meter->count = 0;
	meter->throttled = 0;
	atomic_store(&meter->stop, false);
	meter->running = pthread_create(&meter->thread, NULL, sample, meter) == 0;
}

static int compare_doubles(const void *left, const void *right)
{
	const double a = *(const double *)left;
	const double b = *(const double *)right;

	return (a > b) - (a < b);
}

static double median_of(double *samples, unsigned count)
{
	if (count == 0)
		return -1;
	qsort(samples, count, sizeof *samples, compare_doubles);
	return samples[count / 2];
}

void gpu_meter_end(struct gpu_meter *meter, struct gpu_reading *reading)
{
	*reading = (struct gpu_reading){-1, -1, -1, 0, 0};
	if (!meter || !meter->running)
		return;
	atomic_store(&meter->stop, true);
	pthread_join(meter->thread, NULL);
	meter->running = false;
	reading->samples = meter->count;
	reading->throttled = meter->throttled;
	reading->sm_mhz = median_of(meter->samples[METER_SM], meter->count);
	reading->memory_mhz = median_of(meter->samples[METER_MEMORY], meter->count);
	reading->watts = median_of(meter->samples[METER_WATTS], meter->count);
}

const char *gpu_throttle_text(const struct gpu_reading *reading, char *text, size_t bytes)
{
	static const struct {
		unsigned long long bit;
		const char *name;
	} reasons[] = {{0x1, "idle"},         {0x2, "set clocks"},  {0x4, "power cap"},
		       {0x8, "hardware"},     {0x20, "thermal"},    {0x40, "thermal"},
		       {0x80, "power brake"}, {0x10, "sync boost"}, {0x100, "display"}};
	size_t used = 0;

	snprintf(text, bytes, "%s", reading->samples ? "none" : "-");
	for (size_t i = 0; i < sizeof reasons / sizeof reasons[0]; i++)
		if (reading->throttled & reasons[i].bit && used < bytes)
			used += (size_t)snprintf(text + used, bytes - used, "%s%s", used ? ", " : "", reasons[i].name);
	return text;
}
