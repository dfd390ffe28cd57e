# SPDX-License-Identifier: Apache-2.0
"""Scripts of bench/torch/ as processes that need not import anything: forks of the test's, which has imported it all.

A run of such a script is three processes, each of which would import torch for seconds, on a busy machine for half a
minute. Knows processes and torch_launch.launch, by which the scripts start their ranks; nothing of what they do.
"""

import os
import signal
import subprocess
import sys
import time
import traceback
import types

from patience import LONG_S


def _become(main, arguments):
    """What a process does that was started with these @arguments; does not return."""
    sys.argv = [str(each) for each in arguments]
    try:
        status = main()
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


class _Fork:
    """As much of subprocess.Popen as a launcher needs."""

    def __init__(self, run, *arguments):
        self._status = None
        self.pid = os.fork()
        if self.pid == 0:
            run(*arguments)

    def poll(self):
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)
        return self._status


def _script(main, arguments, out, err, torch_launch):
    os.setsid()
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)

    def rank(environment):
        os.environ.clear()
        os.environ.update(environment)
        _become(main, arguments)

    torch_launch.subprocess = types.SimpleNamespace(Popen=lambda _command, env: _Fork(rank, env))
    _become(main, arguments)


def run(main, arguments, folder, torch_launch):
    """@main of a script with @arguments, its name among them: as subprocess.run says it. Its output goes by @folder."""
    paths = folder / "script.out", folder / "script.err"
    with open(paths[0], "w") as out, open(paths[1], "w") as err:
        script = _Fork(_script, main, arguments, out, err, torch_launch)
    end = time.monotonic() + LONG_S
    while script.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    if script.poll() is None:
        os.killpg(script.pid, signal.SIGKILL)
        script.wait()
    done = subprocess.CompletedProcess(arguments, script.wait(), *(path.read_text() for path in paths))
    assert time.monotonic() < end, (done, "hangs")
    return done
