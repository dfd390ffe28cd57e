/* SPDX-License-Identifier: Apache-2.0
 *
 * run_report.h - what a run has cost: a table for people, or one JSON object.
 */
#ifndef RUN_REPORT_H
#define RUN_REPORT_H

#include "launcher.h"

/** The table and a line of plain words, on stdout. Returns a cli_exit. */
int run_report_table(const struct launcher *launcher);
/** The object, on stdout. Returns a cli_exit. */
int run_report_json(const struct launcher *launcher);
/** "config" of the JSON output: what the ranks were given. NULL: no memory. */
json_t *run_report_config(const struct launcher *launcher);
/** "model" of the JSON output. NULL: no memory. */
json_t *run_report_model(const struct launcher *launcher);

#endif
