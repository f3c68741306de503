"""Stand-ins for the tools that a run starts beside itself: they do what the test's folder of wishes says.

Of the folder that this file is copied to, as export_hf.py or evaluate.py: `NAME.slow` makes the tool stop half way and
write its process into `NAME.process`; `NAME.fails` makes it fail with the text in it. Calls are lines of `NAME.calls`.
"""

import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
NAME = Path(__file__).stem


def wish(kind: str) -> Path:
    """Return the file that says whether to behave in some way."""
    return HERE / f"{NAME}.{kind}"


def main() -> None:
    """Do what was asked, to the end or not."""
    words = sys.argv[1:]
    if "--check" in words:
        return
    with wish("calls").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    if wish("fails").exists():
        print("some output\nerror: " + wish("fails").read_text(), file=sys.stderr)
        sys.exit(2)
    output = Path(words[1] if NAME == "export_hf" else words[words.index("--output") + 1])
    if NAME == "export_hf":
        output.mkdir()
        output.joinpath("half").write_text("")
    if wish("slow").exists():
        wish("process").write_text(str(os.getpid()))
        time.sleep(300)
    if NAME == "export_hf":
        output.joinpath("whole").write_text(words[0])
    else:
        step = int(Path(words[0]).name.removeprefix("step-"))
        scores = {"alias": "boolq", "shots": 0, "acc": step / 100, "acc_stderr": float("nan")}
        output.write_text(json.dumps({"results": {"boolq": scores}}))


if __name__ == "__main__":
    main()
