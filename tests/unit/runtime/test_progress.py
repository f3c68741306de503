"""Progress lines: when plain ones are printed, what a terminal shows, and streams that go away."""

import errno
import io
import os
import pty
import re
import threading

from raptr_ds.runtime.progress import (
    PlainProgress,
    Progress,
    RichProgress,
    build_progress,
    short_number,
    short_time,
)


def test_plain_lines_come_at_the_first_step_every_ten_seconds_at_a_phase_and_at_the_end():
    output, now = io.StringIO(), [0.0]
    progress = PlainProgress(output, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += 1.0
        progress.show(step, 100, step // 56, "loss 5.25")
    shown = [int(number) for number in re.findall(r"step (\d+)/100  loss 5.25\n", output.getvalue())]
    assert shown == [1, 11, 21, 31, 41, 51, 56, 66, 76, 86, 96, 100]


def test_short_forms():
    numbers = [0.5, 999, 999.7, 12345, 2.5e6, 3e9]
    assert [short_number(number) for number in numbers] == ["0.5", "999", "1k", "12.3k", "2.5M", "3G"]
    assert [short_time(s) for s in (0, 59.6, 61, 3725, 90061)] == ["0:00", "1:00", "1:01", "1:02:05", "1-01:01:01"]


def test_a_reader_that_went_away_does_not_stop_training():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as stream:
        progress = PlainProgress(stream)
        progress.show(1, 100, 0, "loss 5.25")
        progress.show(100, 100, 0, "loss 4.75")
        progress.say("still here")


def test_lines_come_back_when_a_full_disk_has_room_again(monkeypatch):
    stream, room = io.StringIO(), False

    def write(text, write=stream.write):
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(text)

    monkeypatch.setattr(stream, "write", write)
    progress = PlainProgress(stream)
    progress.say("lost")
    room = True
    progress.say("written")
    assert stream.getvalue() == "written\n"


def test_a_terminal_that_is_closed_does_not_stop_training(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        progress = RichProgress(stream)
        progress.show(1, 100, 0, "loss 5.25")
        os.close(controller)
        for step in range(2, 6):
            progress.show(step, 100, 0, "loss 5.25")
            progress.say("still here")
        progress.close()


def test_kinds():
    assert type(build_progress("none")) is Progress
    assert isinstance(build_progress("auto", io.StringIO()), PlainProgress)
    assert isinstance(build_progress("rich", io.StringIO()), RichProgress)


def test_the_pseudo_terminal_of_a_rank_under_mpirun_is_no_terminal(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    assert isinstance(build_progress("auto", terminal, launcher="torchrun"), RichProgress)
    assert isinstance(build_progress("auto", terminal, launcher="mpirun"), PlainProgress)
    assert isinstance(build_progress("rich", terminal, launcher="mpirun"), RichProgress)


def test_a_terminal_gets_a_live_line_and_messages_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    controller, terminal = pty.openpty()
    received = bytearray()

    def drain():
        while True:
            try:
                received.extend(os.read(controller, 4096))
            except OSError:
                return

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    with os.fdopen(terminal, "w") as stream:
        progress = build_progress("auto", stream)
        assert isinstance(progress, RichProgress)
        progress.show(1, 100, 0, "loss 5.2500")
        progress.say("step 1/100  eval loss 5.1 [full] in runs/a:x:")
        progress.show(2, 100, 0, "loss 4.7500  phase 0  path 9/12")
        progress.close()
    reader.join(timeout=5)
    os.close(controller)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", received.decode())
    assert "eval loss 5.1 [full] in runs/a:x:" in text
    assert "2/100" in text
    assert "loss 4.7500  phase 0  path 9/12" in text
