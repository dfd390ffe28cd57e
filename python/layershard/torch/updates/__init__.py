# SPDX-License-Identifier: Apache-2.0
"""handle.update(): new weights in place, written in any way on every rank, and refused where they cannot be right.

update begins and ends it; written takes what lies under the names then; origins and what it is made of (operators,
storages, collective_operators) follow which memory was computed from weights that other ranks store. They may know
series, plans and torch's operators; nothing of hooks, guards or the handle. Of this package the handle knows update
alone.
"""
