"""The demo's server: what it answers, and whom it refuses."""

import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raptr_ds.data.batch import Sample, collate
from raptr_ds.data.tokenizer import WORD_BOUNDARY
from raptr_ds.demo.server import DemoServer
from raptr_ds.depth.guesses import Blank, Guess
from raptr_ds.errors import ConfigError
from raptr_ds.hf.generation import Prompt, generate
from raptr_ds.hf.load import prefix_model_of
from raptr_ds.hf.shallower import shallower
from raptr_ds.hf.text import prompt_tokens
from tests.exported_runs import is_refused, tool_runner

Serve = Callable[..., DemoServer]
ROOT = Path(__file__).parents[3]
JSON = {"Content-Type": "application/json"}


def asked(
    server: DemoServer, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """Return status, body and headers of an answer."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=30)  # type: ignore[misc]
    sent = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = JSON if sent is not None else {}
    connection.request("GET" if body is None else "POST", path, sent, {**kind, **(headers or {})})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content, dict(answer.getheaders())


def test_bert_fills_in_what_the_model_predicts(serve: Serve) -> None:
    server = serve("bert")
    model = server.model
    assert model is not None
    tokenizer, text = model.source.tokenizer, "of names and [MASK] here"
    status, content, _ = asked(server, "/api/fill", {"text": text, "hidden": [1], "depth": 3})
    assert status == 200, content
    words = json.loads(content)["words"]
    assert [word["text"] for word in words] == ["of", "names", "and", "[MASK]", "here"]
    assert [bool(word["blanks"]) for word in words] == [False, True, False, True, False]
    pieces = [tokenizer.encode(word).tolist() for word in ("of", "names", "and", "here")]
    names = len(pieces[1])
    tokens = [
        tokenizer.cls_id, *pieces[0], *[tokenizer.mask_id] * names, *pieces[2], tokenizer.mask_id, *pieces[3],
        tokenizer.sep_id,
    ]  # fmt: skip
    places = np.flatnonzero(np.array(tokens) == tokenizer.mask_id)
    every = np.arange(tokenizer.vocab_size)
    stage = model.network.stage
    shown = [blank for word in words for blank in word["blanks"]]
    assert len(shown) == len(places) == names + 1
    for place, blank in zip(places, shown, strict=True):
        batch = collate([Sample(np.array(tokens), np.full(len(every), place), every, len(tokens))], [0], len(tokens), 0)
        with torch.no_grad():
            wanted = torch.exp(-stage(batch.tokens, batch, model.path(3), None))
        found = [guess["probability"] for guess in blank["guesses"]]
        assert found == pytest.approx(wanted.topk(5).values.tolist(), rel=1e-4)
    assert shown[-1]["right"] is None
    assert shown[0]["right"] is not None
    assert not any(guess["is_right"] for guess in shown[-1]["guesses"])


def test_a_guess_is_right_by_its_token_not_by_what_that_looks_like(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece within a word and one that begins a word have the same text."""
    server = serve("bert")
    model = server.model
    assert model is not None
    tokenizer = model.source.tokenizer
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    begins, within = next(
        (place, pieces.index(one[1:]))
        for place, one in enumerate(pieces)
        if one.startswith(WORD_BOUNDARY) and one[1:].isalpha() and one[1:] in pieces
    )

    def fill_masks(network: Any, path: Any, tokens: Any, places: Any, right: Any, number: int) -> list[Blank]:
        return [Blank((Guess((within,), 0.5), Guess((begins,), 0.25)), Guess((begins,), 0.25)) for _ in places]

    monkeypatch.setattr("raptr_ds.demo.model.fill_masks", fill_masks)
    content = asked(server, "/api/fill", {"text": "of names", "hidden": [1], "depth": 3})[1]
    (*_, word) = json.loads(content)["words"]
    assert [guess["is_right"] for guess in word["blanks"][0]["guesses"]] == [False, True]
    assert len({guess["text"] for guess in word["blanks"][0]["guesses"]}) == 1


def test_losses_are_those_of_the_paths(serve: Serve) -> None:
    server = serve("ul2")
    model = server.model
    assert model is not None
    text = "of names and here"
    status, content, _ = asked(server, "/api/losses", {"text": text})
    assert status == 200, content
    answer = json.loads(content)
    tokens = np.array([model.source.tokenizer.mode_ids["[S2S]"], *model.source.tokenizer.encode(text).tolist()])
    known = (len(tokens) + 1) // 2
    sample = Sample(tokens, np.arange(known - 1, len(tokens) - 1), tokens[known:], known)
    batch = collate([sample], [0], len(tokens), 0)
    with torch.no_grad():
        wanted = [
            float(model.network.stage(batch.tokens, batch, model.path(depth), None).mean()) for depth in range(1, 6)
        ]
    assert answer["removed"] == pytest.approx(wanted, abs=1e-5)
    assert answer["exits"][-1] == pytest.approx(answer["removed"][-1], abs=1e-6)
    assert answer["tokens"] == len(tokens) - known


def test_a_berts_losses_mask_each_token_once(serve: Serve) -> None:
    server = serve("bert")
    assert server.model is not None
    text = "of names and here and of names"
    answer = json.loads(asked(server, "/api/losses", {"text": text})[1])
    assert answer["tokens"] == len(server.model.source.tokenizer.encode(text))
    assert all(map(math.isfinite, [*answer["removed"], *answer["exits"]]))


def test_ul2_completes_as_generate_does(serve: Serve) -> None:
    server = serve("ul2")
    model = server.model
    assert model is not None
    about = json.loads(asked(server, "/api/model")[1])
    assert about["layers"] == [[0], [0, 4], [0, 2, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]
    assert {"name": "S2S", "kind": "prefix"} in about["modes"]
    question = {"text": "of names and", "mode": "S2S", "depth": 3, "max_new_tokens": 6}
    status, content, headers = asked(server, "/api/complete", question)
    assert status == 200, content
    assert "Content-Length" not in headers  # it comes as it is made
    *pieces, last = map(json.loads, content.decode().splitlines())
    loaded = prefix_model_of(shallower(model.source.trained, model.path(3)), model.source.tokenizer)
    tokens = prompt_tokens(loaded.tokenizer, "of names and", "[S2S]")
    (wanted,) = generate(loaded.model, [Prompt(tokens)], 6, model.source.tokenizer.eos_id)
    text = loaded.tokenizer.decode([*tokens[1:], *wanted.tokens])
    assert "of names and" + "".join(piece["text"] for piece in pieces) == text
    assert last == {"end": wanted.end}
    holes = {"text": "of ___ and ___ here", "mode": "NLU", "depth": 5, "max_new_tokens": 6}
    status, content, _ = asked(server, "/api/complete", holes)
    assert status == 200, content
    assert json.loads(content.decode().splitlines()[0])["text"].startswith("of")


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ({"text": "of", "mode": "S2S", "depth": 6}, "1 to 5"),
        ({"text": "of", "mode": "XYZ", "depth": 5}, "'XYZ'"),
        ({"text": "of", "mode": "NLU", "depth": 5}, "___"),
        ({"text": "of " * 200, "mode": "S2S", "depth": 5}, "longest sequence"),
        ({"text": 3, "mode": "S2S", "depth": 5}, "text"),
        ({"text": "of", "mode": "S2S", "depth": 1.5}, "depth"),
        ({"text": "of", "mode": "S2S", "depth": True}, "depth"),
        ({"text": "of", "mode": "S2S", "depth": 5, "temperature": -1}, "temperature"),
        ({"text": "of", "mode": "S2S", "depth": 5, "max_new_tokens": 0}, "max_new_tokens"),
        (b'{"text": "of", "mode": "S2S", "depth": 5, "temperature": Infinity}', "temperature"),
        *[
            (b'{"text": "of", "mode": "S2S", "depth": 5, "%s": 1%0400d}' % (name, 0), name.decode())
            for name in (b"depth", b"temperature", b"seed", b"max_new_tokens")
        ],
        (b"[" * 50_000, "JSON"),
        (b"[]", "object"),
        (b"\xff", "JSON"),
    ],
)
def test_questions_that_are_wrong(serve: Serve, question: Any, word: str) -> None:
    server = serve("ul2")
    status, content, _ = asked(server, "/api/complete", question)
    assert status == 400, content
    assert word in json.loads(content)["error"]


def test_other_sites_and_large_questions_are_refused(serve: Serve) -> None:
    server = serve("bert")
    port = server.server_address[1]
    question = {"text": "of names", "hidden": [], "depth": 5}
    assert server.server_address[0] == "127.0.0.1"
    for host in ("example.org", f"example.org:{port}", "127.0.0.1.example.org", "", f"[::1]:{port}"):
        assert asked(server, "/", headers={"Host": host})[0] == 403, host
        assert asked(server, "/api/fill", question, {"Host": host})[0] == 403, host
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", "localhost:9"):  # the last: a tunnel
        assert asked(server, "/", headers={"Host": host})[0] == 200, host
    assert asked(server, "/api/fill", question, {"Origin": "http://example.org"})[0] == 403
    assert asked(server, "/api/fill", question, {"Origin": "null"})[0] == 403
    assert asked(server, "/api/fill", question, {"Origin": f"http://127.0.0.1:{port}"})[0] == 200
    assert asked(server, "/api/fill", question, {"Content-Type": "text/plain"})[0] == 415
    assert asked(server, "/api/fill", {**question, "text": "x" * (1 << 16)})[0] == 413
    assert asked(server, "/api/fill", question, {"Content-Length": "-1"})[0] == 411
    assert asked(server, "/api/fill", {**question, "hidden": ["a"]})[0] == 400
    for path in ("/page.html", "/../server.py", "/%2e%2e/server.py", "/api/model/../fill", "/etc/passwd"):
        assert asked(server, path)[0] == 404, path
    assert asked(server, "/api/fill")[0] == 404  # by GET


def test_the_page_may_load_nothing_from_elsewhere(serve: Serve) -> None:
    server = serve("bert")
    status, content, headers = asked(server, "/")
    page = content.decode()
    policy = headers["Content-Security-Policy"]
    assert status == 200
    assert "default-src 'none'" in policy
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)
    assert nonce is not None
    assert page.count(f'nonce="{nonce[1]}"') == 2
    assert "{nonce}" not in page
    assert asked(server, "/")[2]["Content-Security-Policy"] != policy
    addresses = set(re.findall(r"https?://[^\s\"'`)]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "innerHTML" not in page


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = tool_runner(monkeypatch, capsys)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run("demo.py", tmp_path, "--port", port)
    assert is_refused(done, f"port {port}", "in use", "--port 0")
    assert is_refused(run("demo.py", tmp_path, "--port", 70000), "70000", "65535")
    assert is_refused(run("demo.py", tmp_path / "none", "--port", 0), "no such folder")
    with pytest.raises(ConfigError, match="in use"), DemoServer(0) as first:
        DemoServer(first.server_address[1])


def test_ctrl_c_ends_the_tool(serve: Serve, tmp_path: Path) -> None:
    serve("ul2")
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), str(tmp_path / "of" / "run"), "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        # A shell that started the tests in the background has them ignore it, and what they start too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
    assert found is not None, line
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
    body = json.dumps({"text": "of", "mode": "S2S", "depth": 5, "max_new_tokens": 500})
    connection.request("POST", "/api/complete", body, JSON)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "ended" in printed
    assert "Traceback" not in errors
