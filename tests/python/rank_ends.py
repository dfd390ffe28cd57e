# SPDX-License-Identifier: Apache-2.0
"""How the process of a rank has ended, where that tells of a defect.

Knows processes; nothing of what ran in them.
"""

import signal

# SIGKILL is what tests kill ranks by; with 0 some leave early.
_MEANT = (0, -signal.SIGKILL)


def crash_of(rank, process, timeout_s):
    """A text where @process does not end or was ended by what no test asks for (SIGSEGV, abort()); else None. A rank's
    pipe alone does not tell: it closes in the same way when a test has killed it."""
    process.join(timeout_s)
    if process.is_alive():
        process.kill()
        return f"rank {rank} does not end"
    if process.exitcode not in _MEANT:
        return f"rank {rank} died: exit code {process.exitcode}"
    return None
