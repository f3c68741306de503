"""The disturbed run under tools/supervise.py and torchrun, two ranks on this machine."""

import random
import signal
import subprocess
import sys
from pathlib import Path

from tests.integration.conftest import ENV, REPOSITORY, torchrun_command
from tests.integration.test_kills import _tree
from tests.processes import is_rank, send, words_of
from tests.soak.faults import Fault, fill_disk


class Supervised:
    """A supervised run, started again by us when a request to stop has ended the supervision too."""

    longest_pause = 45.0

    def __init__(self, run: Path, save: Path, log: Path) -> None:
        self.run, self.save, self.log = run, save, log
        self.process, self._was_asked_to_stop = self._start(), False

    def is_done(self) -> bool:
        """Return whether the run is trained. Raises: RuntimeError if its supervision has given up."""
        code = self.process.poll()
        if code and self._was_asked_to_stop:  # whatever the launcher made of it
            self._was_asked_to_stop = False
            self.process = self._start()
        elif code is not None and code != 0:
            raise RuntimeError(f"the supervision ended with {code}: see {self.log}")
        return code == 0

    def faults(self, has_disk: bool) -> dict[str, Fault]:
        """Return what may strike."""
        faults: dict[str, Fault] = {
            "kill -9 a rank": lambda draw: send(self._ranks(), signal.SIGKILL, draw),
            "kill -9 the launcher": lambda draw: send(self._launcher(), signal.SIGKILL, draw),
            "stop a rank for ever": lambda draw: send(self._ranks(), signal.SIGSTOP, draw),
            "ask to stop (SIGUSR1)": lambda _: self._ask_to_stop(signal.SIGUSR1),
            "ask to stop (SIGTERM)": lambda _: self._ask_to_stop(signal.SIGTERM),
        }
        return faults | ({"fill the disk": lambda draw: fill_disk(self.save, draw)} if has_disk else {})

    def close(self) -> None:
        """End what is left of it."""
        for process in list(_tree(self.process.pid)):
            send([process], signal.SIGKILL, random.Random(0))
        self.process.wait()

    def _ask_to_stop(self, number: signal.Signals) -> bool:
        """Send the supervision a signal, which it passes on."""
        if self.process.poll() is not None:
            return False
        self._was_asked_to_stop = True
        self.process.send_signal(number)
        return True

    def _start(self) -> subprocess.Popen[bytes]:
        words = [sys.executable, "tools/supervise.py", "--", *torchrun_command(self.run)]
        env = {**ENV, "RAPTR_RETRY_DELAY": "1", "RAPTR_MAX_RETRIES": "6"}
        with self.log.open("ab") as log:
            return subprocess.Popen(words, cwd=REPOSITORY, env=env, stdout=log, stderr=log, start_new_session=True)

    def _ranks(self) -> list[int]:
        return [process for process in _tree(self.process.pid) if is_rank(process)]

    def _launcher(self) -> list[int]:
        return [process for process in _tree(self.process.pid) if any("torchrun" in w for w in words_of(process)[:2])]
