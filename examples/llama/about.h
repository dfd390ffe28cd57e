/* SPDX-License-Identifier: Apache-2.0
 *
 * about.h - what layershard-llama tells of itself, on stdout.
 */
#ifndef ABOUT_H
#define ABOUT_H

/** How it is used. Returns a cli_exit. */
int about_print_help(void);
/** Its version, and those of the libraries that it computes and splits text with. Returns a cli_exit. */
int about_print_version(void);

#endif
