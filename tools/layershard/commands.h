/* SPDX-License-Identifier: Apache-2.0
 *
 * commands.h - the commands of the layershard program: argv[0] is the command's own name. They return a cli_exit.
 */
#ifndef COMMANDS_H
#define COMMANDS_H

int command_info(int argc, char **argv);

#endif
