"""A start with a lead that is too short, a folder open to all, and a secret in its environment."""

import json
import os
from pathlib import Path

from raptr_ds.parallel.launch import Launch
from tests.integration.conftest import forked, tiny_run

SECRET = "s3cr3t-of-the-environment"


def _environment(launch: Launch) -> None:
    os.environ.update(TOKEN=SECRET, RAPTR_SIGNAL_LEAD="0")
    object.__setattr__(launch, "signal_lead", 0.0)  # as detect_launch reads it


def test_a_short_lead_and_an_open_folder_are_named_and_no_secret(data_folder: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    save.mkdir()
    save.chmod(0o777)
    run = tmp_path / "run.json"
    run.write_text(json.dumps(tiny_run(data_folder, save, checkpoint={"interval": 3})))
    done = forked(run, processes=2, spoil=_environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the signal to stop comes 0 s before the time limit") == 1
    assert done.stdout.count(f"every user may write to {save} (mode 777)") == 1
    events = [json.loads(line) for line in (save / "events.jsonl").read_text().splitlines()]
    (short,) = [event for event in events if event["event"] == "signal_lead"]
    assert (short["lead"], short["write"]) == (0.0, 30)
    assert 0 < short["needed"] < 20
    files = [path.read_bytes() for path in save.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [text for text in (done.stdout.encode(), done.stderr.encode(), *files) if SECRET.encode() in text]
