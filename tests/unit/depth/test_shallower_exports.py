"""tools/export_hf.py --layers: transformers' model of some layers is ours along their path; choices and mistakes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from raptr_ds.depth.held_out import read_held_out
from raptr_ds.depth.network import Network
from raptr_ds.depth.removal import LayerChoice, parse_layers
from raptr_ds.errors import ConfigError
from raptr_ds.hf.model import hugging_face_inputs
from raptr_ds.paths import LayerPath
from tests.depth_runs import MakeRun, along
from tests.exported_runs import KINDS, Tool, is_refused

SCALED = {"path": {"method": "raptr", "residual_scale": "sqrt"}}


@pytest.mark.parametrize("settings", [{}, SCALED], ids=["plain", "sqrt"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_model_is_ours_along_the_path(make_run: MakeRun, tool: Tool, kind: str, settings: dict) -> None:
    source, stage = make_run(kind, **settings)
    out = source.folder.parent / "out"
    done = tool("export_hf.py", source.folder, out, "--layers", "0,2,3", "--tokenizer", "none")
    assert done.code == 0, done.error
    assert "layers 0, 2, 3 of 5" in done.printed
    scale = (5 / 3) ** 0.5 if settings else 1.0
    path = LayerPath((0, 2, 3), 5, residual_scale=scale)
    loader = AutoModelForCausalLM if kind == "ul2" else AutoModelForMaskedLM
    theirs = loader.from_pretrained(out).eval()
    assert theirs.config.num_hidden_layers == 3
    (batch,) = read_held_out(source, num_sequences=6).batches
    with torch.no_grad():
        logits = theirs(**hugging_face_inputs(stage.model, batch)).logits.flatten(0, 1)[batch.positions]
    ours = Network(stage, torch.device("cpu")).logits(batch, path)
    torch.testing.assert_close(logits, ours, atol=1e-4, rtol=1e-5)  # fp32, another order of sums; logits up to 60
    their_loss = torch.nn.functional.cross_entropy(logits, batch.targets).item()
    assert their_loss == pytest.approx(along(stage, [batch], path), abs=1e-5)
    assert abs(their_loss - along(stage, [batch], LayerPath((0, 2, 3), 5, residual_scale=1.1))) > 1e-3
    card = (out / "README.md").read_text()
    assert "0, 2, 3 of the 5 that were trained" in card
    assert ("scaled by 1.291" in card) is bool(settings)


def test_weights_alone_need_no_tokenizer(make_run: MakeRun, tool: Tool) -> None:
    source, _ = make_run("bert")
    (source.folder / "config.json").write_text(json.dumps({"raptr_ds": {"data": {"path": "gone"}}}))
    out = source.folder.parent / "out"
    done = tool("export_hf.py", source.folder, out, "--layers", 3, "--tokenizer", "none")
    assert done.code == 0, done.error
    assert "layers 0, 2, 4 of 5" in done.printed
    done = tool("export_hf.py", source.folder, out / "best", "--layers", "best:3", "--tokenizer", "none")
    assert is_refused(done, "--tokenizer FILE")


def test_best_layers_come_from_the_depth_table(make_run: MakeRun, tool: Tool) -> None:
    source, _ = make_run("bert")
    out = source.folder.parent
    options = ("--tokenizer", source.tokenizer.origin, "--sequences", 8)
    done = tool("export_hf.py", source.folder, out / "two", "--layers", "best:2", *options)
    assert done.code == 0, done.error
    rows = json.loads((source.folder / "depth.json").read_text())["rows"]
    two, three = (next(row for row in rows if row["depth"] == depth) for depth in (2, 3))
    assert f"layers {two['layers'][0]}, {two['layers'][1]} of 5, held-out loss {two['loss']:.4f}" in done.printed
    assert f"{two['loss']:.4f} nats" in (out / "two" / "README.md").read_text()
    changed = [{**row, "layers": [0, 1, 2]} if row is three else row for row in rows]
    table = {**json.loads((source.folder / "depth.json").read_text()), "rows": changed}
    (source.folder / "depth.json").write_text(json.dumps(table))  # which would not be there if it were measured anew
    half = tool("export_hf.py", source.folder, out / "half", "--layers", "best", *options)
    assert "layers 0, 1, 2 of 5" in half.printed
    other_text = tool("export_hf.py", source.folder, out / "other", "--layers", "best:3", *options[:-1], 9)
    (measured,) = (row for row in json.loads((source.folder / "depth.json").read_text())["rows"] if row["depth"] == 3)
    assert measured["loss"] != three["loss"]
    assert f"{measured['loss']:.4f}" in other_text.printed


def test_what_layers_may_say() -> None:
    assert parse_layers("6") == LayerChoice(depth=6)
    assert parse_layers("0, 2,5") == LayerChoice((0, 2, 5))
    assert parse_layers("4,") == LayerChoice((4,))
    assert parse_layers("best") == LayerChoice(is_best=True)
    assert parse_layers("best:3") == LayerChoice(depth=3, is_best=True)


@pytest.mark.parametrize("text", ["", "best:", "best3", "0,,2", "-1", "1.5", "all", "0-3", "2,1", "1,1", "9" * 30])
def test_what_layers_may_not_say(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--layers"):
        parse_layers(text)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("0,5", ["no layer 5", "it has 5, 0 to 4"]),
        ("0", ["0 layers", "Give 1 to 5"]),
        ("6", ["6 layers", "Give 1 to 5"]),
        ("best:9", ["9 layers", "Give 1 to 5"]),
        ("3,1", ["Write 1,3"]),
        ("most", ["'most'", "best:N"]),
    ],
)
def test_layers_that_a_model_does_not_have(make_run: MakeRun, tool: Tool, layers: str, words: list[str]) -> None:
    source, _ = make_run("bert")
    out = source.folder.parent / "out"
    done = tool("export_hf.py", source.folder, out, "--tokenizer", source.tokenizer.origin, "--layers", layers)
    assert is_refused(done, *words), done
    assert not Path(out).exists()


@pytest.mark.parametrize("option", ["--data", "--sequences"])
@pytest.mark.parametrize("layers", [(), ("--layers", 3)], ids=["all", "3"])
def test_held_out_text_that_nothing_measures_is_refused(
    tmp_path: Path, tool: Tool, option: str, layers: tuple[object, ...]
) -> None:
    done = tool("export_hf.py", tmp_path, tmp_path / "out", option, 4, *layers)
    assert done.code == 2
    assert f"{option} is about the held-out text that --layers best measures" in done.error
