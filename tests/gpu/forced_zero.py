"""raptr_ds/pretrain.py with ZeRO 1 and 2 on one process, where a run without this leaves out what would only copy.

So one GPU can run the code that several would; it takes the same command line.
"""

import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from raptr_ds import pretrain
from raptr_ds.parallel.launch import prepare_imports


def main() -> int:
    """Train, and return the exit code."""
    import torch

    prepare_imports(torch.cuda.is_available())
    from raptr_ds.engine import deepspeed_engine

    deepspeed_engine.without_idle_zero = lambda config, data_parallel: config
    return int(pretrain.main(sys.argv[1:]))


if __name__ == "__main__":
    try:
        exit_code = main()
    except BaseException:
        traceback.print_exc()
        exit_code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
