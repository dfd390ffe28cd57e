/* SPDX-License-Identifier: Apache-2.0
 *
 * test_process_memory.c - what is read of a process's memory is what the kernel has written, each kind of page where it
 * belongs, or it is not known. Reserved pages themselves: tests/transport/reserved_pages.sh, by the name "reserved".
 */
#include "process_memory.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define LARGE ((uint64_t)2 << 20)
#define HALF  (LARGE / 2)
#define KIB   UINT64_C(1024)

/* ---- Recorded text ---------------------------------------------------------------------------------------------- */

#define HEAD "565158ca2000-7ffe40f9f000 ---p 00000000 00:00 0                          [rollup]\n"
#define FIRST                                                                                                          \
	"Rss:              414720 kB\nPss:              208000 kB\nPss_Dirty:           108 kB\n"                      \
	"Pss_Shmem:        207360 kB\nShared_Clean:       1488 kB\nPrivate_Clean:        40 kB\n"                      \
	"Private_Dirty:       600 kB\nAnonHugePages:     4096 kB\nShmemPmdMapped:   204800 kB\n"                       \
	"FilePmdMapped:         0 kB\n"
#define HUGETLB "Shared_Hugetlb:    20480 kB\nPrivate_Hugetlb:   10240 kB\n"
#define LAST    "Swap:                  0 kB\nLocked:                0 kB\n"

static bool parse(const char *text, struct process_memory *memory)
{
	FILE *file = fmemopen((void *)(uintptr_t)text, strlen(text), "r");
	bool understood;

	assert_non_null(file);
	understood = process_memory_parse(file, memory);
	assert_int_equal(fclose(file), 0);
	return understood;
}

static void each_amount_is_counted_where_it_belongs(void **state)
{
	struct process_memory memory;

	(void)state;
	assert_true(parse(HEAD FIRST HUGETLB LAST, &memory));
	assert_int_equal(memory.private_bytes, (40 + 600 + 10240) * KIB);
	assert_int_equal(memory.pss_bytes, (208000 + 10240) * KIB);
	assert_int_equal(memory.shared_hugetlb_bytes, 20480 * KIB);
	assert_int_equal(memory.large_bytes, (4096 + 204800 + 20480 + 10240) * KIB);
}

/* A sum that lacks a part, or has one twice, would look like any other. */
static void what_is_not_understood_is_not_known(void **state)
{
	static const char *const texts[] = {
		HEAD,
		HEAD FIRST LAST,
		HEAD HUGETLB LAST,
		HEAD FIRST "Shared_Hugetlb:        0 kB\n" LAST,
		HEAD FIRST HUGETLB HUGETLB,
		HEAD FIRST "Private_Hugetlb:   10240\nShared_Hugetlb:        0 kB\n",
		HEAD FIRST "Private_Hugetlb:   10240 MB\nShared_Hugetlb:        0 kB\n",
		HEAD FIRST "Private_Hugetlb:      -1 kB\nShared_Hugetlb:        0 kB\n",
		HEAD FIRST "Private_Hugetlb:         kB\nShared_Hugetlb:        0 kB\n",
		HEAD FIRST "Private_Hugetlb: 18014398509481984 kB\nShared_Hugetlb:        0 kB\n",
		HEAD FIRST "Private_Hugetlb: 99999999999999999999999 kB\nShared_Hugetlb:        0 kB\n",
		HEAD FIRST "Shared_Hugetlb:        0 kB\nPrivate_Huge",
	};
	struct process_memory memory = {1, 2, 3, 4};

	(void)state;
	for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
		assert_false(parse(texts[i], &memory));
		assert_int_equal(memory.private_bytes + memory.pss_bytes, 3);
		assert_int_equal(memory.shared_hugetlb_bytes + memory.large_bytes, 7);
	}
}

/* A path may be longer than any room for a line, and may be called what it likes. */
static void the_rest_of_a_long_line_is_no_line(void **state)
{
	char text[2048];
	struct process_memory memory;

	(void)state;
	for (size_t blanks = 0; blanks < 1100; blanks++) {
		(void)snprintf(text, sizeof text, "/%*sPrivate_Hugetlb: 1 kB\n%s", (int)blanks, "",
			       HEAD FIRST HUGETLB LAST);
		assert_true(parse(text, &memory));
		assert_int_equal(memory.private_bytes, (40 + 600 + 10240) * KIB);
	}
}

/* ---- The kernel's own ------------------------------------------------------------------------------------------- */

/* Room for two large pages; the first that begins at one is mapped from @p descriptor. */
static unsigned char *map_at_large_page(int flags, int descriptor)
{
	unsigned char *room = mmap(NULL, 2 * LARGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned char *aligned;

	assert_ptr_not_equal(room, MAP_FAILED);
	aligned = room + (-(uintptr_t)room & (LARGE - 1));
	assert_ptr_equal(mmap(aligned, LARGE, PROT_READ | PROT_WRITE, flags | MAP_FIXED, descriptor, 0), aligned);
	return aligned;
}

/* What @p bytes of memory add in this process. */
static struct process_memory written(unsigned char *memory, uint64_t bytes)
{
	struct process_memory before;
	struct process_memory after;

	assert_true(process_memory_read(&before));
	memset(memory, 1, bytes);
	(void)madvise(memory, bytes, MADV_COLLAPSE);
	assert_true(process_memory_read(&after));
	assert_true(after.large_bytes >= before.large_bytes);
	return (struct process_memory){
		.private_bytes = after.private_bytes - before.private_bytes,
		.pss_bytes = after.pss_bytes - before.pss_bytes,
		.shared_hugetlb_bytes = after.shared_hugetlb_bytes - before.shared_hugetlb_bytes,
		.large_bytes = after.large_bytes - before.large_bytes,
	};
}

static void assert_about(uint64_t found, uint64_t expected)
{
	assert_in_range(found, expected - HALF / 2, expected + HALF / 2);
}

/* Whether the kernel gives large pages is its own affair: read of the mapping and of the process they are the same. */
static void try_mapping(unsigned char *memory)
{
	struct process_memory added;
	struct process_pages pages;

	(void)madvise(memory, LARGE, MADV_HUGEPAGE);
	added = written(memory, LARGE);
	assert_true(process_pages_read(memory, LARGE, &pages));
	print_message("%llu of %llu bytes are in large pages\n", (unsigned long long)pages.large_bytes,
		      (unsigned long long)LARGE);
	assert_about(added.private_bytes, LARGE);
	assert_about(added.pss_bytes, LARGE);
	assert_int_equal(added.shared_hugetlb_bytes, 0);
	assert_int_equal(added.large_bytes, pages.large_bytes);
	assert_int_equal(pages.reserved_bytes, 0);
	assert_true(pages.large_bytes == 0 || pages.large_bytes == LARGE);
}

static void private_memory_is_counted(void **state)
{
	(void)state;
	try_mapping(map_at_large_page(MAP_PRIVATE | MAP_ANONYMOUS, -1));
}

static void shared_memory_is_counted(void **state)
{
	const int descriptor = memfd_create("counted", MFD_CLOEXEC);

	(void)state;
	assert_true(descriptor >= 0 && ftruncate(descriptor, (off_t)LARGE) == 0);
	try_mapping(map_at_large_page(MAP_SHARED, descriptor));
	(void)close(descriptor);
}

static void no_page_of_a_mapping_in_small_pages_is_large(void **state)
{
	unsigned char *memory = map_at_large_page(MAP_PRIVATE | MAP_ANONYMOUS, -1);
	struct process_pages pages = {1, 1};

	(void)state;
	assert_int_equal(madvise(memory, LARGE, MADV_NOHUGEPAGE), 0);
	memset(memory, 1, LARGE);
	assert_true(process_pages_read(memory, LARGE, &pages));
	assert_int_equal(pages.large_bytes + pages.reserved_bytes, 0);
	assert_false(process_pages_read(NULL, 1, &pages));
}

/* ---- Reserved pages --------------------------------------------------------------------------------------------- */

/* The page stays shared until the other end of @p order is closed. */
static void touch_and_wait(volatile unsigned char *memory, int told, int order)
{
	const unsigned char byte = memory[0];
	char end;

	_exit(write(told, (const void *)&byte, 1) == 1 && read(order, &end, 1) == 0 ? 0 : 1);
}

static void reserved_pages_are_private_until_another_process_maps_them(void **state)
{
	const int descriptor = memfd_create("counted", MFD_CLOEXEC | MFD_HUGETLB);
	struct process_memory alone;
	struct process_memory together;
	unsigned char *memory;
	int told[2];
	int order[2];
	int status;
	char byte;
	pid_t child;

	(void)state;
	assert_true(descriptor >= 0 && ftruncate(descriptor, (off_t)LARGE) == 0);
	memory = map_at_large_page(MAP_SHARED, descriptor);
	alone = written(memory, LARGE);
	assert_about(alone.private_bytes, LARGE);
	assert_about(alone.pss_bytes, LARGE);
	assert_int_equal(alone.large_bytes, LARGE);
	assert_int_equal(alone.shared_hugetlb_bytes, 0);
	assert_true(pipe(told) == 0 && pipe(order) == 0);
	child = fork();
	assert_true(child >= 0);
	if (child == 0) {
		(void)close(order[1]);
		touch_and_wait(memory, told[1], order[0]);
	}
	(void)close(told[1]);
	assert_int_equal(read(told[0], &byte, 1), 1);
	assert_true(process_memory_read(&together));
	(void)close(order[1]);
	assert_true(waitpid(child, &status, 0) == child && status == 0);
	assert_int_equal(together.shared_hugetlb_bytes, LARGE);
	assert_true(together.large_bytes >= LARGE);
	(void)close(told[0]);
	(void)close(order[0]);
	(void)munmap(memory, LARGE);
	(void)close(descriptor);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(each_amount_is_counted_where_it_belongs),
		cmocka_unit_test(what_is_not_understood_is_not_known),
		cmocka_unit_test(the_rest_of_a_long_line_is_no_line),
		cmocka_unit_test(private_memory_is_counted),
		cmocka_unit_test(shared_memory_is_counted),
		cmocka_unit_test(no_page_of_a_mapping_in_small_pages_is_large),
	};
	const struct CMUnitTest reserved[] = {
		cmocka_unit_test(reserved_pages_are_private_until_another_process_maps_them),
	};

	if (argc == 2 && !strcmp(argv[1], "reserved"))
		return cmocka_run_group_tests(reserved, NULL, NULL);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
