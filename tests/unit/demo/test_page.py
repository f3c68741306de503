"""The page in a real browser: Debian's chromium, without a screen."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.demo.server import DemoServer
from raptr_ds.hf.generation import GREEDY

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

DRIVER = Path("/usr/bin/chromedriver")
pytestmark = pytest.mark.skipif(not DRIVER.exists(), reason="needs Debian's chromium and chromedriver")
Serve = Callable[..., DemoServer]
SECONDS = 20
LENGTH = 120  # tokens, room for the page's own examples in a vocabulary of another language


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'user'}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield browser
    browser.quit()


def until(browser: Any, holds: Callable[[], Any]) -> Any:
    return WebDriverWait(browser, SECONDS, poll_frequency=0.1).until(lambda _: holds())


def texts(browser: Any, selector: str) -> list[str]:
    """Return the texts of elements, read at once: the page may replace them at any moment."""
    script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)"
    return browser.execute_script(script, selector)


def write(browser: Any, text: str) -> None:
    browser.find_element(By.ID, "text").clear()
    browser.find_element(By.ID, "text").send_keys(text)


def move_to(browser: Any, depth: int) -> None:
    browser.execute_script(
        "const slider = document.getElementById('depth'); slider.value = arguments[0];"
        "slider.dispatchEvent(new Event('input'))",
        depth,
    )


def complaints(browser: Any) -> list[str]:
    """Return what the browser reports: scripts that failed, and all that the page's policy has stopped."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in {"SEVERE", "WARNING"}]


def test_berts_words_are_hidden_by_a_click(serve: Serve, browser: Any) -> None:
    server = serve("bert", seq_length=LENGTH)
    browser.get(server.url)
    until(browser, lambda: texts(browser, "#chart polyline"))
    assert texts(browser, "h1") == ["run"]
    assert texts(browser, "#depth-now") == ["5 of 5"]
    write(browser, "of names and <b>here</b>")
    until(browser, lambda: texts(browser, "#words") == ["of names and <b>here</b>"])
    browser.find_elements(By.CSS_SELECTOR, ".word")[1].click()
    until(browser, lambda: texts(browser, ".word.filled"))
    shown = texts(browser, ".blank")
    assert shown[0].startswith("hidden: ")
    assert server.model is not None
    first = server.model.fill("of names and <b>here</b>", [1], 5)[1]["blanks"]
    assert texts(browser, ".guess span:first-child")[:5] == [guess["text"] for guess in first[0]["guesses"]]
    assert texts(browser, "#words b") == []
    assert "".join(texts(browser, "#words")).endswith("<b>here</b>")

    move_to(browser, 2)
    assert texts(browser, "#stack i.kept") == ["0", "4"]
    second = server.model.fill("of names and <b>here</b>", [1], 2)[1]["blanks"]
    wanted = [guess["text"] for guess in second[0]["guesses"]]
    assert wanted != [guess["text"] for guess in first[0]["guesses"]]
    until(browser, lambda: texts(browser, ".guess span:first-child")[:5] == wanted)
    browser.find_elements(By.CSS_SELECTOR, ".word")[1].click()
    until(browser, lambda: not texts(browser, ".blank"))

    hits = browser.find_elements(By.CSS_SELECTOR, "svg .hit")
    assert len(hits) == 5
    hits[2].click()
    assert texts(browser, "#depth-now") == ["3 of 5"]
    write(browser, "of names " * 40)
    until(browser, lambda: "shorten it" in texts(browser, "#problem")[0])
    assert all("400" in message for message in complaints(browser))  # the text that is too long, and nothing else


def test_masks_may_be_typed(serve: Serve, browser: Any) -> None:
    server = serve("rotary bert", seq_length=LENGTH)
    browser.get(server.url)
    until(browser, lambda: texts(browser, ".word.filled"))
    write(browser, "of [MASK] and")
    until(browser, lambda: len(texts(browser, ".word")) == 3)
    assert len(texts(browser, ".word.filled")) == 1
    assert texts(browser, ".blank h3") == ["[MASK]"]
    assert complaints(browser) == []


def test_ul2_completes_and_fills_in(serve: Serve, browser: Any) -> None:
    server = serve("ul2", seq_length=LENGTH)
    browser.get(server.url)
    until(browser, lambda: texts(browser, "#chart polyline"))
    write(browser, "of names and")
    browser.find_element(By.ID, "most").clear()
    browser.find_element(By.ID, "most").send_keys("6")
    browser.find_element(By.ID, "go").click()
    until(
        browser, lambda: texts(browser, "#answer .new") and browser.find_element(By.ID, "stop").get_property("disabled")
    )
    assert server.model is not None
    pieces: list[str] = []
    server.model.complete("of names and", "S2S", 5, GREEDY, 6, pieces.append)
    assert texts(browser, "#answer")[0] == "of names and" + ("".join(pieces) or "(the text ends here)")

    fills = next(one for one in browser.find_elements(By.CSS_SELECTOR, "#mode option") if one.text.startswith("NLU"))
    fills.click()
    assert "___" in browser.find_element(By.ID, "text").get_property("value")
    browser.find_element(By.ID, "go").click()
    until(browser, lambda: texts(browser, "#answer")[0].startswith("This"))
    write(browser, "of names")
    browser.find_element(By.ID, "go").click()
    until(browser, lambda: "three underscores" in texts(browser, "#problem")[0])
    assert all("400" in message for message in complaints(browser))


def test_a_server_that_has_ended_is_noticed(serve: Serve, browser: Any) -> None:
    server = serve("bert", seq_length=LENGTH)
    browser.get(server.url)
    until(browser, lambda: texts(browser, ".word"))
    server.shutdown()
    server.server_close()
    write(browser, "of")
    until(browser, lambda: "has it ended" in texts(browser, "#problem")[0])
