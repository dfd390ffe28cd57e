/* SPDX-License-Identifier: Apache-2.0
 *
 * run_table.c - what a run has cost, for people.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "run_report.h"

#define MIB (1024.0 * 1024.0)
/* Over the ranks that have reported. */
struct sum {
	struct rank_report report; /* total_ns: the longest; the rest: sums */
	uint64_t every_total_ns;
	uint32_t ranks;
	uint32_t with_memory;
	uint64_t least_large; /* bytes of a rank whose memory is known */
	uint64_t most_large;
};

static double mib(uint64_t bytes)
{
	return (double)bytes / MIB;
}

static void add_bytes(struct cli_table *table, uint64_t bytes)
{
	cli_table_cell(table, "%.1f", mib(bytes));
}

static void add(struct sum *sum, const struct rank_report *report)
{
	struct rank_report *all = &sum->report;

	all->shard_bytes += report->shard_bytes;
	all->window_bytes += report->window_bytes;
	all->resident_bytes += report->resident_bytes;
	all->numa_copy_bytes += report->numa_copy_bytes;
	all->private_bytes += report->private_bytes;
	all->pss_bytes += report->pss_bytes;
	all->shared_hugetlb_bytes += report->shared_hugetlb_bytes;
	all->read_bytes += report->read_bytes;
	all->metadata_read_bytes += report->metadata_read_bytes;
	all->wait_ns += report->wait_ns;
	all->generated_tokens += report->generated_tokens;
	all->has_memory |= report->has_memory;
	if (report->total_ns > all->total_ns)
		all->total_ns = report->total_ns;
	if (report->has_memory) {
		if (sum->with_memory == 0 || report->large_bytes < sum->least_large)
			sum->least_large = report->large_bytes;
		if (report->large_bytes > sum->most_large)
			sum->most_large = report->large_bytes;
	}
	sum->every_total_ns += report->total_ns;
	sum->with_memory += report->has_memory;
	sum->ranks++;
}

static struct sum sum_of(const struct launcher *launcher)
{
	struct sum sum;

	memset(&sum, 0, sizeof sum);
	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		if (launcher->ranks[i].phase == RANK_REPORTED)
			add(&sum, &launcher->ranks[i].report);
	}
	return sum;
}

/* All cells but the first. @p waited_of: the time of which wait_ns is a part. */
static void add_cells(struct cli_table *table, const struct rank_report *report, uint64_t waited_of)
{
	add_bytes(table, report->shard_bytes);
	add_bytes(table, report->window_bytes);
	add_bytes(table, report->resident_bytes);
	if (report->has_memory) {
		add_bytes(table, report->private_bytes);
		add_bytes(table, report->pss_bytes);
	} else {
		cli_table_cell(table, "-");
		cli_table_cell(table, "-");
	}
	add_bytes(table, report->read_bytes);
	if (report->generated_tokens > 0 && report->total_ns > 0) {
		cli_table_cell(table, "%.1f %%", 100.0 * (double)report->wait_ns / (double)waited_of);
		cli_table_cell(table, "%.1f", 1e9 * (double)report->generated_tokens / (double)report->total_ns);
	}
	cli_table_end_row(table);
}

static uint64_t series_bytes(const struct launcher *launcher)
{
	return launcher->options->shape.layers * launcher->options->shape.layer_bytes;
}

static uint64_t held_bytes(const struct rank_report *report)
{
	return report->shard_bytes + report->window_bytes + report->resident_bytes + report->numa_copy_bytes;
}

/* The same ranks with every layer in each: what is not sharded stays as measured. */
static void add_replicated(struct cli_table *table, const struct launcher *launcher, const struct sum *sum)
{
	const engine_model *shape = &launcher->options->shape;
	const uint64_t stored = sum->ranks * series_bytes(launcher);
	const uint64_t sharded = held_bytes(&sum->report);

	cli_table_cell(table, "replicated");
	add_bytes(table, stored);
	add_bytes(table, 0);
	add_bytes(table, 0);
	cli_table_cell(table, "-");
	if (sum->report.has_memory && sum->report.shared_hugetlb_bytes == 0 && sum->report.pss_bytes > sharded)
		add_bytes(table, sum->report.pss_bytes - sharded + stored);
	else
		cli_table_cell(table, "-");
	add_bytes(table, sum->report.metadata_read_bytes +
				 sum->ranks * (shape->sharded_file_bytes + shape->unsharded_file_bytes));
	cli_table_end_row(table);
}

static void fill_table(struct cli_table *table, const struct launcher *launcher, const struct sum *sum)
{
	for (uint32_t i = 0; i < launcher->rank_count; i++) {
		const struct own_rank *own = &launcher->ranks[i];

		if (own->phase == RANK_REPORTED) {
			cli_table_cell(table, "%d", own->task.rank);
			add_cells(table, &own->report, own->report.total_ns);
		} else {
			cli_table_cell(table, "%d (failed)", own->task.rank);
			cli_table_end_row(table);
		}
	}
	if (launcher->rank_count > 1) {
		cli_table_cell(table, "all");
		add_cells(table, &sum->report, sum->every_total_ns);
	}
	if (sum->ranks == launcher->options->ranks && sum->ranks > 1 && !launcher->options->replicated)
		add_replicated(table, launcher, sum);
}

/* ---- The line of plain words ------------------------------------------------------------------------------------- */

static void print_words(const struct launcher *launcher, const struct sum *sum)
{
	const struct rank_report *all = &sum->report;
	const uint32_t ranks = launcher->options->ranks;
	const double whole = mib(series_bytes(launcher));
	const double held = mib(held_bytes(all));

	if (sum->ranks != ranks) {
		if (!launcher->options->one_of_job)
			cli_paragraph(stdout, 0,
				      "The sums are of the %" PRIu32 " of %" PRIu32 " ranks that came to the end.",
				      sum->ranks, ranks);
	} else if (ranks == 1) {
		cli_paragraph(stdout, 0,
			      "1 rank holds all layers: %.1f MiB. More ranks (--ranks) would hold them once between "
			      "them.",
			      whole);
	} else if (launcher->options->replicated) {
		cli_paragraph(stdout, 0,
			      "%" PRIu32 " ranks hold all layers %" PRIu32
			      " times: %.1f MiB. Sharded they would be held "
			      "once: %.1f MiB.",
			      ranks, ranks, held, whole);
	} else if (all->numa_copy_bytes > 0) {
		cli_paragraph(stdout, 0,
			      "%" PRIu32
			      " ranks hold the sharded layers once (%.1f MiB), with %.1f MiB of windows, %.1f "
			      "MiB of resident copies and %.1f MiB of copies for other NUMA nodes: %.1f MiB instead of "
			      "%.1f MiB (replicated, computed).",
			      ranks, mib(all->shard_bytes), mib(all->window_bytes), mib(all->resident_bytes),
			      mib(all->numa_copy_bytes), held, ranks * whole);
	} else if (all->window_bytes + all->resident_bytes == 0) {
		cli_paragraph(stdout, 0,
			      "%" PRIu32
			      " ranks hold the sharded layers once: %.1f MiB instead of %.1f MiB (replicated, "
			      "computed).",
			      ranks, held, ranks * whole);
	} else {
		cli_paragraph(stdout, 0,
			      "%" PRIu32 " ranks hold the sharded layers once (%.1f MiB), with %.1f MiB of windows and "
			      "%.1f MiB of resident copies: %.1f MiB instead of %.1f MiB (replicated, computed).",
			      ranks, mib(all->shard_bytes), mib(all->window_bytes), mib(all->resident_bytes), held,
			      ranks * whole);
	}
	if (launcher->options->threads && !launcher->options->one_of_job)
		cli_paragraph(stdout, 0, "The ranks are threads of one process: its memory stands in the first row.");
}

/* What the columns of memory do not show: in which pages it is, and what the kernel leaves out of 'pss'. */
static void print_pages(const struct sum *sum)
{
	char most[32] = "";

	if (sum->with_memory == 0)
		return;
	if (sum->most_large > sum->least_large)
		(void)snprintf(most, sizeof most, " to %.1f", mib(sum->most_large));
	cli_paragraph(stdout, 0, "In large pages: %.1f%s MiB of what each process maps, shared or not.",
		      mib(sum->least_large), most);
	if (sum->report.shared_hugetlb_bytes > 0)
		cli_paragraph(stdout, 0,
			      "Reserved pages (hugetlb) that are mapped more than once are in no 'pss', for the kernel "
			      "tells nobody's part of them: %.1f MiB, if each process counts what it maps.",
			      mib(sum->report.shared_hugetlb_bytes));
}

int run_report_table(const struct launcher *launcher)
{
	struct cli_table *table = cli_table_create("<rank|stored|windows|resident|private|pss|read|waiting|tok/s");
	const struct sum sum = sum_of(launcher);
	bool printed = false;

	if (table) {
		fill_table(table, launcher, &sum);
		cli_paragraph(stdout, 0, "Memory and reads in MiB; transport: %s",
			      *launcher->transport ? launcher->transport : "-");
		printed = cli_table_print(table, stdout);
		print_words(launcher, &sum);
		print_pages(&sum);
		for (uint32_t i = 0; i < launcher->rank_count; i++) {
			if (*launcher->ranks[i].no_memory)
				cli_paragraph(stdout, 0, "Memory was not measured: %s", launcher->ranks[i].no_memory);
		}
	}
	cli_table_destroy(table);
	if (!printed)
		cli_message("out of memory while making the table");
	return printed && cli_flush_output() ? CLI_DONE : CLI_FAILED;
}
