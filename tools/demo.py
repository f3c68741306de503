"""Try a trained model in the browser: python tools/demo.py MODEL [--port N].

MODEL: a run, one checkpoint, or a folder of tools/export_hf.py. Serves one page on this machine alone: BERT fills in
the words that you hide, UL2 completes your text by mode; a slider removes layers, by MODEL's depth table where
tools/depth.py has written one, and the loss of your text is drawn by depth. Ctrl-C ends it.
"""

import argparse
from pathlib import Path

import _command_line

from raptr_ds.demo.server import PORT, DemoServer


def main() -> None:
    """Parse the command line, load the model and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a run, a checkpoint, or an exported folder")
    parser.add_argument(
        "--port", type=int, default=PORT, metavar="N", help=f"default {PORT}; 0: any free one, which is printed"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="of a checkpoint that lies outside of its run")
    arguments = parser.parse_args()
    with DemoServer(arguments.port) as server:
        from raptr_ds.demo.model import DemoModel  # transformers takes seconds to import: open the port before
        from raptr_ds.depth.network import open_network
        from raptr_ds.depth.source import open_model
        from raptr_ds.depth.table import TABLE, read_table

        _command_line.quiet_transformers()
        source = open_model(arguments.model, arguments.tokenizer)
        table = read_table(source.folder / TABLE, source)
        with open_network(source.trained) as network:
            model = DemoModel(source, network, table)
            server.serve(model, lambda: print(f"{source.label}: {server.url}   (Ctrl-C ends it)", flush=True))
    print("\nended")


if __name__ == "__main__":
    _command_line.run(main)
