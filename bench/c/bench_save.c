/* SPDX-License-Identifier: Apache-2.0
 *
 * bench_save.c - see bench_save.h.
 */
#include "bench_save.h"
#include "cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

static bool names_directory(const char *path)
{
	const size_t length = strlen(path);
	struct stat found;

	return length == 0 || path[length - 1] == '/' || (stat(path, &found) == 0 && S_ISDIR(found.st_mode));
}

bool bench_save_possible(const char *command, const char *path)
{
	const char *slash = strrchr(path, '/');
	char *directory = slash == path ? strdup("/") : slash ? strndup(path, (size_t)(slash - path)) : strdup(".");
	bool good = false;

	errno = 0;
	if (directory && !names_directory(path))
		good = access(path, F_OK) == 0 ? access(path, W_OK) == 0 : access(directory, W_OK | X_OK) == 0;
	if (!good)
		cli_message("%s: --save '%s': the file cannot be written: %s", command, path,
			    errno ? strerror(errno) : "it must name a file, not a directory");
	free(directory);
	return good;
}

/* ---- Where it is from ---------------------------------------------------------------------------------------- */

/* As a shell would take it again; only what needs quotes has them. */
static void write_word(FILE *stream, const char *word)
{
	static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=+:,./%@";

	if (*word != '\0' && word[strspn(word, plain)] == '\0') {
		fputs(word, stream);
		return;
	}
	fputc('\'', stream);
	for (; *word; word++)
		if (*word == '\'')
			fputs("'\\''", stream);
		else
			fputc(*word, stream);
	fputc('\'', stream);
}

static json_t *command_json(int argc, char **argv)
{
	char *text = NULL;
	size_t bytes = 0;
	FILE *stream = open_memstream(&text, &bytes);
	json_t *command = NULL;

	if (!stream)
		return NULL;
	fputs("layershard-bench", stream);
	for (int i = 0; i < argc; i++) {
		fputc(' ', stream);
		write_word(stream, argv[i]);
	}
	if (fclose(stream) == 0)
		command = cli_json_text(text, bytes);
	free(text);
	return command;
}

/* "model name" of /proc/cpuinfo; not every architecture has it. */
static json_t *cpu_json(const char *machine)
{
	FILE *file = fopen("/proc/cpuinfo", "re");
	char line[512];
	json_t *name = NULL;

	while (file && !name && fgets(line, sizeof line, file)) {
		const char *value = strchr(line, ':');

		if (strncmp(line, "model name", strlen("model name")) == 0 && value)
			name = cli_json_text(value + 2, strcspn(value + 2, "\n"));
	}
	if (file)
		fclose(file);
	return name ? name : json_string(machine);
}

static json_t *machine_json(void)
{
	struct utsname host = {0};
	double load = 0;

	uname(&host);
	if (getloadavg(&load, 1) != 1)
		load = -1;
	return json_pack("{s:o, s:I, s:s+, s:f}", "cpu", cpu_json(host.machine), "cores",
			 (json_int_t)sysconf(_SC_NPROCESSORS_ONLN), "kernel", "Linux ", host.release, "load", load);
}

static json_t *date_json(void)
{
	const time_t now = time(NULL);
	struct tm utc;
	char text[32];

	strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
	return json_string(text);
}

/* ---- The file ------------------------------------------------------------------------------------------------ */

bool bench_save(const char *path, int argc, char **argv, json_t *gpus, json_t *result)
{
	json_t *root = json_pack("{s:s, s:o, s:o, s:s, s:o, s:o, s:O}", "schema", "layershard-bench/2", "command",
				 command_json(argc, argv), "date", date_json(), "version", lshard_version(), "machine",
				 machine_json(), "gpus", gpus ? gpus : json_array(), "result", result);
	FILE *file = root ? fopen(path, "we") : NULL;
	bool good = false;

	if (!root) {
		cli_message("no memory to save the result in '%s'", path);
		return false;
	}
	if (file) {
		good = json_dumpf(root, file, JSON_INDENT(1)) == 0;
		good = fputc('\n', file) != EOF && good;
		good = fclose(file) == 0 && good;
	}
	if (!good)
		cli_message("the result could not be saved in '%s': %s", path, strerror(errno));
	json_decref(root);
	return good;
}
