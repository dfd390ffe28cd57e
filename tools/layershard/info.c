/* SPDX-License-Identifier: Apache-2.0
 *
 * info.c - `layershard info`: what this build is, what it can do here, and what it reads from the environment.
 */
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli.h"
#include "commands.h"

#include <layershard/plan.h>

static const char help[] = "Usage: layershard info [-h | --help | --json]\n\n"
			   "Shows version, build, transports (with the reason where one is missing),\n"
			   "NUMA nodes, and every environment variable with its value, and those\n"
			   "named LAYERSHARD_... that nothing reads.\n\n" CLI_EXIT_HELP;

/* ---- The build --------------------------------------------------------------------------------------------------- */

#if defined(__SANITIZE_ADDRESS__)
#define SANITIZER "address sanitizer"
#elif defined(__SANITIZE_THREAD__)
#define SANITIZER "thread sanitizer"
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SANITIZER "address sanitizer"
#elif __has_feature(thread_sanitizer)
#define SANITIZER "thread sanitizer"
#endif
#endif
#ifndef SANITIZER
#define SANITIZER "no sanitizer"
#endif

#ifdef __clang__
#define COMPILER "clang " __clang_version__
#else
#define COMPILER "gcc " __VERSION__
#endif

#ifdef __OPTIMIZE__
#define OPTIMIZED "optimised"
#else
#define OPTIMIZED "not optimised"
#endif

#ifdef NDEBUG
#define ASSERTIONS "no assertions"
#else
#define ASSERTIONS "assertions"
#endif

static json_t *json_of_build(void)
{
	return json_pack("{s:s,s:s,s:s}", "compiler", COMPILER, "flags", OPTIMIZED ", " ASSERTIONS ", " SANITIZER,
			 "jansson", jansson_version_str());
}

/* ---- Transports -------------------------------------------------------------------------------------------------- */

/* The library's word for `callback` is that of the two that needs nothing of the caller's device. */
static const char *memory_word(const lshard_transport_information *found)
{
	if (strcmp(found->name, "callback") == 0)
		return "host or device";
	return found->memory == LSHARD_MEMORY_HOST ? "host" : "device";
}

static json_t *json_of_transports(void)
{
	json_t *array = json_array();
	lshard_transport_information found = LSHARD_TRANSPORT_INFORMATION_INIT;

	for (uint32_t i = 0; array && lshard_transport_info(i, &found) == LSHARD_OK; i++) {
		json_t *item =
			json_pack("{s:s,s:s,s:b,s:s,s:b,s:b,s:s}", "name", found.name, "summary", found.summary,
				  "available", found.available, "reason", found.reason, "collective", found.collective,
				  "caller_memory", found.caller_memory, "memory", memory_word(&found));

		if (json_array_append_new(array, item) != 0) {
			json_decref(array);
			array = NULL;
		}
	}
	return array;
}

/* ---- NUMA nodes -------------------------------------------------------------------------------------------------- */

static json_t *json_of_nodes(void)
{
	json_t *array = json_array();
	lshard_node node = LSHARD_NODE_INIT;

	for (uint32_t i = 0; array && lshard_node_info(i, &node) == LSHARD_OK; i++) {
		json_t *item = json_pack("{s:i,s:s,s:I,s:I,s:b,s:b}", "number", (int)node.number, "processors",
					 node.processors, "memory_bytes", (json_int_t)node.memory_bytes, "free_bytes",
					 (json_int_t)node.free_bytes, "usable", node.usable, "here", node.here);

		if (json_array_append_new(array, item) != 0) {
			json_decref(array);
			array = NULL;
		}
	}
	return array;
}

/* ---- Environment ------------------------------------------------------------------------------------------------- */

static bool add_variable(json_t *array, const char *name, const char *value, const char *default_value,
			 const char *text)
{
	return json_array_append_new(array,
				     json_pack("{s:s,s:o,s:o,s:s}", "name", name, "value",
					       cli_json_text(value, strlen(value)), "default",
					       cli_json_text(default_value, strlen(default_value)), "help", text)) == 0;
}

/* What programs read themselves; the library knows nothing of these. */
static bool add_own_variable(json_t *array, const char *name, const char *default_value, const char *text)
{
	const char *value = getenv(name);

	return add_variable(array, name, value && *value ? value : default_value, default_value, text);
}

static json_t *json_of_variables(void)
{
	json_t *array = json_array();
	lshard_variable variable = LSHARD_VARIABLE_INIT;
	bool added = array != NULL;

	for (uint32_t i = 0; added && lshard_variable_info(i, &variable) == LSHARD_OK; i++)
		added = add_variable(array, variable.name, variable.value, variable.default_value, variable.help);
	added = added &&
		add_own_variable(array, "LAYERSHARD_LOG", "",
				 "the library's log on stderr of this tree's programs: error, warn, info or debug") &&
		add_own_variable(
			array, "LAYERSHARD_LIBRARY", "",
			"the file liblayershard.so that the Python package takes; not set: it looks for one") &&
		add_own_variable(array, "LAYERSHARD_MODEL", "",
				 "the model of layershard-llama, where --model names none") &&
		add_own_variable(array, "LAYERSHARD_CACHE", "",
				 "folder of what this tree's scripts fetch and layershard-llama finds there") &&
		add_own_variable(array, "CUDA_VISIBLE_DEVICES", "",
				 "the GPUs that NVIDIA's driver shows, by their numbers; not set: all");
	if (added)
		return array;
	json_decref(array);
	return NULL;
}

static bool is_listed(const json_t *variables, const char *name, size_t length)
{
	const json_t *item;
	size_t i;

	json_array_foreach(variables, i, item)
	{
		const char *listed = json_string_value(json_object_get(item, "name"));

		if (strlen(listed) == length && strncmp(listed, name, length) == 0)
			return true;
	}
	return false;
}

/* Names like ours that are none of @p variables: misspelt, most likely, and so without effect. */
static json_t *json_of_unknown(const json_t *variables)
{
	static const char ours[] = "LAYERSHARD_";
	json_t *array = json_array();

	for (char **entry = environ; array && entry && *entry; entry++) {
		const size_t length = strcspn(*entry, "=");

		if (strncmp(*entry, ours, strlen(ours)) != 0 || is_listed(variables, *entry, length))
			continue;
		if (json_array_append_new(array, cli_json_text(*entry, length)) != 0) {
			json_decref(array);
			array = NULL;
		}
	}
	return array;
}

/* ---- Output ------------------------------------------------------------------------------------------------------ */

static const char *member(const json_t *object, const char *key)
{
	return json_string_value(json_object_get(object, key));
}

static void print_build(json_t *build)
{
	const char *key;
	json_t *value;

	printf("Build\n");
	json_object_foreach(build, key, value)
	{
		cli_paragraph(stdout, 12, "  %-9s %s", key, json_string_value(value));
	}
}

static void print_transports(const json_t *transports)
{
	const json_t *item;
	size_t i;

	printf("\nTransports, in the order in which 'auto' prefers them\n");
	json_array_foreach(transports, i, item)
	{
		const bool available = json_is_true(json_object_get(item, "available"));

		cli_paragraph(stdout, 12, "  %-9s %s%s%s", member(item, "name"), member(item, "summary"),
			      available ? "" : "; not available here: ", available ? "" : member(item, "reason"));
	}
}

static double gib(const json_t *item, const char *key)
{
	return (double)json_integer_value(json_object_get(item, key)) / (1024.0 * 1024.0 * 1024.0);
}

/* What LAYERSHARD_NUMA chooses for groups whose options leave it alone. */
static const char *numa_value(const json_t *variables)
{
	const json_t *item;
	size_t i;

	json_array_foreach(variables, i, item)
	{
		if (strcmp(member(item, "name"), "LAYERSHARD_NUMA") == 0)
			return member(item, "value");
	}
	return "";
}

static void print_nodes(const json_t *nodes, const char *numa)
{
	const json_t *item;
	size_t i;

	printf("\nNUMA nodes (shards: LAYERSHARD_NUMA=%s%s)\n", numa,
	       json_array_size(nodes) < 2 ? ", of which one node makes nothing" : "");
	json_array_foreach(nodes, i, item)
	{
		const char *processors = member(item, "processors");

		cli_paragraph(stdout, 12, "  %-9d processors %s; %.1f of %.1f GiB free%s%s",
			      (int)json_integer_value(json_object_get(item, "number")),
			      *processors ? processors : "none", gib(item, "free_bytes"), gib(item, "memory_bytes"),
			      json_is_true(json_object_get(item, "here")) ? "; this process runs here" : "",
			      json_is_true(json_object_get(item, "usable")) ? "" : "; not for this process's shards");
	}
}

static void print_variables(const json_t *variables)
{
	const json_t *item;
	size_t i;

	printf("\nEnvironment variables\n");
	json_array_foreach(variables, i, item)
	{
		const char *value = member(item, "value");
		const char *default_value = member(item, "default");

		printf("  %s=%s\n", member(item, "name"), value);
		if (*default_value && strcmp(value, default_value) != 0)
			cli_paragraph(stdout, 6, "      %s (default: %s)", member(item, "help"), default_value);
		else
			cli_paragraph(stdout, 6, "      %s", member(item, "help"));
	}
}

static void print_unknown(const json_t *unknown)
{
	const json_t *item;
	size_t i;

	if (json_array_size(unknown) > 0)
		printf("\nSet, but nothing here reads them: are they misspelt?\n");
	json_array_foreach(unknown, i, item)
	{
		printf("  %s\n", json_string_value(item));
	}
}

static int print_text(json_t *root)
{
	if (!root) {
		cli_message("out of memory");
		return CLI_FAILED;
	}
	printf("layershard %s\n\n", member(root, "version"));
	print_build(json_object_get(root, "build"));
	print_transports(json_object_get(root, "transports"));
	print_nodes(json_object_get(root, "numa_nodes"), numa_value(json_object_get(root, "variables")));
	print_variables(json_object_get(root, "variables"));
	print_unknown(json_object_get(root, "unknown_variables"));
	json_decref(root);
	return cli_flush_output() ? CLI_DONE : CLI_FAILED;
}

static json_t *json_of_all(void)
{
	json_t *variables = json_of_variables();
	json_t *unknown = variables ? json_of_unknown(variables) : NULL;

	return json_pack("{s:s,s:s,s:o,s:o,s:o,s:o,s:o}", "schema", "layershard-info/1", "version", lshard_version(),
			 "build", json_of_build(), "transports", json_of_transports(), "numa_nodes", json_of_nodes(),
			 "variables", variables, "unknown_variables", unknown);
}

enum { OPTION_JSON = 256 };

int command_info(int argc, char **argv)
{
	static const struct option long_options[] = {
		{"json", no_argument, NULL, OPTION_JSON},
		{"help", no_argument, NULL, 'h'},
		{NULL, 0, NULL, 0},
	};
	bool json = false;
	int option;

	while ((option = getopt_long(argc, argv, CLI_OPTSTRING, long_options, NULL)) != -1) {
		if (option == 'h') {
			fputs(help, stdout);
			return cli_flush_output() ? CLI_DONE : CLI_FAILED;
		}
		if (option != OPTION_JSON)
			return cli_bad_option("info", option, argv);
		json = true;
	}
	if (optind < argc)
		return cli_usage("info", "'%s' is no option", argv[optind]);
	return json ? cli_json_print(json_of_all()) : print_text(json_of_all());
}
