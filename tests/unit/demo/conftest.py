"""Demo servers of small models, on free ports."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.demo.model import DemoModel
from raptr_ds.demo.server import DemoServer
from raptr_ds.depth.network import open_network
from raptr_ds.depth.source import open_model
from raptr_ds.parallel.groups import lone_process_groups
from tests.depth_runs import depth_run

Serve = Callable[..., DemoServer]


@pytest.fixture
def serve(tmp_path: Path, tokenizer: Tokenizer, data_folder: Path) -> Iterator[Serve]:
    """Serves a run of a kind of model; its server has the model that answers."""
    with ExitStack() as stack:

        def start(kind: str, **settings: Any) -> DemoServer:
            with lone_process_groups() as groups:
                depth_run(tmp_path / "of" / "run", groups, tokenizer, data_folder, kind, **settings)
            source = open_model(tmp_path / "of" / "run")
            network = stack.enter_context(open_network(source.trained, "cpu"))
            server = DemoServer(0)
            thread = threading.Thread(target=server.serve, args=(DemoModel(source, network),))
            thread.start()
            stack.callback(thread.join, 30)
            stack.callback(server.shutdown)
            return server

        yield start
