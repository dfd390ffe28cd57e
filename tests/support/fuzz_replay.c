/* SPDX-License-Identifier: Apache-2.0
 *
 * fuzz_replay.c - gives a fuzz target each file named on the command line, and each file in directories named there: a
 * corpus becomes an ordinary test, without a fuzz engine. Fails when there was nothing to give.
 */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Returns 1 if the file could be given. The buffer is as long as the file, so that a sanitizer sees a read beyond it.
 */
static int replay_file(const char *path)
{
	FILE *const file = fopen(path, "rb");
	uint8_t *data = NULL;
	long size = -1;
	int done = 0;

	if (file && fseek(file, 0, SEEK_END) == 0)
		size = ftell(file);
	if (size >= 0 && fseek(file, 0, SEEK_SET) == 0)
		data = malloc(size > 0 ? (size_t)size : 1);
	if (data && fread(data, 1, (size_t)size, file) == (size_t)size) {
		(void)LLVMFuzzerTestOneInput(data, (size_t)size);
		done = 1;
	}
	if (!done)
		(void)fprintf(stderr, "cannot read %s\n", path);
	free(data);
	if (file)
		(void)fclose(file);
	return done;
}

/* Returns how many were given, -1 after a failure. */
static int replay_directory(const char *path, DIR *directory)
{
	const struct dirent *entry;
	char name[4096];
	int count = 0;

	while (count >= 0 && (entry = readdir(directory)) != NULL) {
		if (entry->d_name[0] == '.')
			continue;
		(void)snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
		count = replay_file(name) ? count + 1 : -1;
	}
	return count;
}

int main(int argc, char **argv)
{
	int total = 0;
	int i;

	for (i = 1; i < argc; i++) {
		DIR *const directory = opendir(argv[i]);
		const int count = directory ? replay_directory(argv[i], directory) : replay_file(argv[i]) ? 1 : -1;

		if (directory)
			(void)closedir(directory);
		if (count < 0)
			return 1;
		total += count;
	}
	(void)printf("%d inputs\n", total);
	return total > 0 ? 0 : 1;
}
