"""The page at / in a real browser, Debian's chromium: pytest tests/test_page.py"""

import json
import re
import shutil
import subprocess
from contextlib import contextmanager

import httpx
import pytest
from fake_hub import fake_server
from ranks import ROOT
from server import server as api
from starlette.responses import HTMLResponse, JSONResponse, Response

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("needs chromium and chromedriver on the PATH", allow_module_level=True)

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

ATTACK = "<script>hit = 1</script><img src=x onerror='hit = 1'><b id=bold>match</b>"
MODEL = {
    "backbone": ATTACK,
    "data": "sample",
    "engine": "int8",
    "device": "cpu",
    "test_accuracy": 0.876,
    "checkpoint": "0123456789ab",
}
UNSURE = {
    "label": "Sports",
    "confidence": 0.5,
    "truncated": True,
    "out_of_vocabulary": False,
    "scores": {"World": 0.1, "Sports": 0.5, "Business": 0.35, "Sci/Tech": 0.05},
}


@pytest.fixture
def answers():
    """path -> [answer, ...], used up to the last one; those that the real server gives rarely."""
    page = (ROOT / "inference" / "index.html").read_text(encoding="utf-8")
    return {
        "/some/prefix/": [HTMLResponse(page)],
        "/some/prefix/health": [JSONResponse({"status": "healthy", "model": MODEL})],
        "/some/prefix/predict": [JSONResponse(UNSURE)],
    }


@pytest.fixture
def fake_api(answers):
    """The page below /some/prefix/."""

    def answer(request, body):
        found = answers.get(request.scope["path"], [Response(status_code=404)])
        return found.pop(0) if len(found) > 1 else found[0]

    with fake_server(answer) as url:
        yield f"{url}/some/prefix/"


@pytest.fixture(scope="module")
def server(trained):
    with api(trained, ENGINE="torch") as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-proxy-server",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a person does with the page and sees of it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, address, width=1280, height=800, scheme="light"):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get("about:blank")  # another hash alone would not load the page again
        self.driver.get(address)
        return self

    def one(self, css):
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css):
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def wait(self, condition, seconds=20):
        return WebDriverWait(self.driver, seconds, 0.02).until(lambda _: condition())

    def says(self, css, words):
        """Waits until an element says the words -> all that the first one says. In one script: an
        element can be replaced between being found and being read."""
        script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText)"
        found = []

        def said():
            found[:] = self.driver.execute_script(script, css)
            return any(words in text for text in found)

        self.wait(said)
        return found[0]

    def ask(self, text):
        # a key for each of thousands of letters would take minutes
        self.driver.execute_script("arguments[0].value = arguments[1]", self.one("#text"), text)
        self.one("[type=submit]").click()

    def bars(self):
        """name -> (what is written beside the bar, the bar's share of its track), in percent"""
        self.wait(lambda: self.all("#scores li"))
        found = {}
        for row in self.all("#scores li"):
            name, percent = row.text.split("\n")
            track, bar = (row.find_element(By.CSS_SELECTOR, css) for css in (".track", ".track i"))
            drawn = 100 * bar.rect["width"] / track.rect["width"]
            found[name] = float(re.fullmatch(r"([\d.]+) %", percent)[1]), drawn
        return found


@pytest.fixture
def page(browser):
    for log in ("performance", "browser"):
        browser.get_log(log)  # what an earlier test left
    return Page(browser)


def test_a_headline_is_asked_and_answered_by_keyboard_alone(server, page):
    page.open(server)
    assert page.one("#text").get_property("placeholder") and page.one("label[for=text]").text
    keys = webdriver.ActionChains(page.driver).send_keys(Keys.TAB, "striker scores")
    keys.key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).send_keys("a goal").perform()
    assert page.one("#text").get_property("value") == "striker scores\na goal"
    assert not page.all("#scores")
    webdriver.ActionChains(page.driver).send_keys(Keys.ENTER).perform()
    bars = page.bars()
    # four numbers that were each rounded to 0.1 are off by 0.2 at most
    assert sum(written for written, _ in bars.values()) == pytest.approx(100, abs=0.21)
    for written, drawn in bars.values():
        assert drawn == pytest.approx(written, abs=1)  # a bar's end falls on a fraction of a pixel
    label = page.one("#answer .label").text
    assert label == "Sports" == max(bars, key=bars.get)
    assert page.one("#scores .best").text.startswith(label)
    # nothing left the origin, and the policy had to stop nothing
    events = [json.loads(line["message"])["message"] for line in page.driver.get_log("performance")]
    urls = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    urls = {url for url in urls if url.startswith("http")}  # the browser has pages of its own
    assert urls == {f"{server}/", f"{server}/health", f"{server}/predict"}
    log = [line["message"] for line in page.driver.get_log("browser")]
    assert not [line for line in log if "favicon.ico" not in line], log


def test_examples_links_and_the_curl_line_hold_a_text(server, page):
    page.open(server)
    examples = page.all("#examples button")
    assert len({example.text for example in examples}) == 4  # one for each class
    examples[1].click()
    asked = page.says("blockquote", examples[1].text)
    assert page.one("#text").get_property("value") == asked
    page.ask("it's a goal & 100% + more")
    page.says("blockquote", "it's")
    link = page.one("#answer a").get_property("href")
    page.open(link)
    assert page.says("blockquote", "it's") == "it's a goal & 100% + more"
    page.one("#copy").click()
    page.says("#copy", "Copied")
    command = page.one("code").text
    done = subprocess.run(
        ["bash", "-c", f"{command} -sS --noproxy '*'"], capture_output=True, text=True, timeout=20
    )
    assert json.loads(done.stdout)["label"] == page.one("#answer .label").text
    for path in page.all("footer a"):
        assert httpx.get(path.get_property("href")).status_code == 200


@pytest.mark.parametrize("space", [" ", " " * 6000])
def test_why_this_label_colours_the_words_that_carry_it(server, page, space):
    text = f"the striker{space}of a bank"
    page.open(server).ask(text)
    page.bars()
    label = page.one("#answer .label").text
    page.one("#answer .row button").click()
    page.wait(lambda: page.all("#words span"))
    words = text.split()
    without = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    answer = httpx.post(f"{server}/predict/batch", json={"texts": [text, *without]})
    scores = [prediction["scores"][label] for prediction in answer.json()["predictions"]]
    falls = {word: scores[0] - score for word, score in zip(words, scores[1:], strict=True)}
    coloured = [word.text for word in page.all("#words span") if word.get_attribute("style")]
    assert coloured == [word for word in words if falls[word] >= 0.01] and coloured
    said = page.one("#why .quiet").text
    assert f"Without “\u2068{max(falls, key=falls.get)}\u2069” it falls" in said


def test_what_cannot_be_answered_is_said_in_words(server, page):
    page.open(server)
    for text, says in (
        ("", "The box holds no word yet"),
        (" \n\u200b ?", "The box holds no word yet"),
        ("a" * 20_001, "at most 20000 characters"),
        ("a" * 300_000, "(413)"),
    ):
        page.ask(text)
        page.says("#answer", says)
        assert not page.all("#scores")
    page.ask("xyzzy")
    page.says("#answer", "knows no word of this text")
    page.ask("bank " * 31 + "bank\U0001f600 " + "shares " * 800)  # an emoji at the cut
    page.says("blockquote", "bank…")
    page.one("#answer .row button").click()
    page.says("#why", "Only the first 64 words were tried")
    page.ask(ATTACK)
    page.says("blockquote", ATTACK)
    assert not page.all("#bold, img") and page.driver.execute_script("return window.hit") is None


def test_rare_answers_are_said_in_words_behind_a_path_prefix(fake_api, answers, page):
    answers["/some/prefix/predict"][:0] = [
        JSONResponse({"detail": "the queue is full"}, 429, {"Retry-After": "7"}),
        JSONResponse({"detail": "odd"}, 500),
        JSONResponse({"detail": ATTACK}, 422),
        JSONResponse({"detail": "draining"}, 503, {"Retry-After": "1"}),
        HTMLResponse("<h1>Bad gateway</h1>", 502),
    ]
    page.open(fake_api)
    page.says("#model", "87.6 %")
    assert "answers are a demonstration" in page.one("#model").text  # a model of the sample
    for says in (
        "Try again in 7 s.",
        "server failed (odd)",
        ATTACK,
        "not sure: no section reaches 60 %",
    ):
        page.ask("anything")  # what is refused with 502 or 503 is asked again
        page.says("#answer", says)
    assert {name: written for name, (written, _) in page.bars().items()} == {
        name: 100 * score for name, score in UNSURE["scores"].items()
    }
    assert "only its beginning counted" in page.one("#answer").text
    page.one("#answer .row button").click()
    page.says("#why", "no two words")
    answers["/some/prefix/predict/batch"] = [Response("cut sh"), JSONResponse({"a": 1})]
    for text in ("two words", "two more"):  # a new one, so that its answer is waited for
        page.ask(text)
        page.says("blockquote", text)
        page.one("#answer .row button").click()
        page.says("#why", "The server did not answer this")
    assert not page.all("#bold, img") and page.driver.execute_script("return window.hit") is None


@contextmanager
def network(driver, **conditions):
    usual = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", usual | conditions)
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", usual)


def test_without_a_network_the_page_says_so_and_recovers(fake_api, page):
    page.open(fake_api).says("#model", "87.6 %")
    with network(page.driver, offline=True):
        page.ask("anything")
        page.says("#answer", "cannot be reached")
        page.says("#model", "cannot be reached")
    page.says("#model", "87.6 %")
    assert page.one("#text").get_property("value") == "anything"


def test_while_an_answer_takes_long_the_page_says_so(fake_api, page):
    page.open(fake_api).says("#model", "87.6 %")
    with network(page.driver, latency=4500):
        page.ask("anything")
        page.says("#answer", "No answer yet")
        page.says("#answer", "not sure")


def test_the_policy_lets_the_space_frame_the_page_and_nobody_else(server, fake_api, answers, page):
    headers = httpx.get(f"{server}/").headers
    policy = dict(
        part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";")
    )
    assert policy["frame-ancestors"] == "'self' https://huggingface.co https://*.hf.space"
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    # it cannot name two sites: where it is obeyed, any value would forbid the Space's frame
    assert "x-frame-options" not in headers
    frame = f"<!doctype html><iframe src={server}/></iframe>"
    answers["/some/prefix/"] = [HTMLResponse(frame)]
    for site, shown in ((fake_api, False), (f"{server}/metrics", True)):
        page.open(site)
        if shown:  # a page of the same origin, without a policy of its own
            page.driver.execute_script(
                "document.body.append(Object.assign(document.createElement('iframe'), {src: '/'}))"
            )
        page.driver.switch_to.frame(page.one("iframe"))
        if shown:
            page.wait(lambda: page.all("form"))
        assert bool(page.all("form")) == shown


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width, height", [(360, 740), (1280, 800)])
def test_both_widths_and_schemes_can_be_read(fake_api, answers, page, width, height, scheme):
    words = [f"word{n}" for n in range(3)] + ["a" * 150]  # not a space to break it at
    falls = [UNSURE | {"scores": UNSURE["scores"] | {"Sports": 0.1 * n}} for n in range(4)]
    answers["/some/prefix/predict/batch"] = [JSONResponse({"predictions": falls})]
    page.open(fake_api, width, height, scheme).ask(" ".join(words))
    page.bars()
    below = (
        page.one("#answer").rect["y"] - page.one("form").rect["y"] - page.one("form").rect["height"]
    )
    assert below < 60 if width < 600 else page.one("#answer").rect["x"] > width / 2
    place = "const at = arguments[0].getBoundingClientRect(); return [at.top, at.bottom]"
    top, bottom = page.driver.execute_script(place, page.one("#answer"))
    assert 0 <= top < bottom <= height
    page.one("#answer .row button").click()
    page.wait(lambda: page.all("#words span"))
    # a phone would zoom out to show what is wider, and a window grow a scroll bar
    assert page.driver.execute_script("return innerWidth") == width
    script = (
        "const inside = document.documentElement.clientWidth;"
        "return [...document.querySelectorAll('html, body *')].filter((one) =>"
        " one.scrollWidth > inside || one.getBoundingClientRect().right > inside + 0.1)"
        ".map((one) => one.outerHTML)"
    )
    assert page.driver.execute_script(script) == []
    # WCAG 2.2, 1.4.3: a contrast of 4.5 at least. A canvas mixes what lies behind each text
    pairs = page.driver.execute_script("""
        const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
        const layers = (one) => one ? [...layers(one.parentElement), getComputedStyle(one).backgroundColor] : [];
        const mix = (colors) => {
            for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        };
        const text = (node) => node.nodeType === Node.TEXT_NODE && node.data.trim();
        return [...document.querySelectorAll("body *")]
            .filter((one) => one.checkVisibility() && [...one.childNodes].some(text))
            .map((one) => [one.innerText, mix([getComputedStyle(one).color]), mix(layers(one))]);
    """)  # noqa: E501
    assert len(pairs) > 30

    def luminance(color):
        channels = [part / 255 for part in color]
        lines = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * lines[0] + 0.7152 * lines[1] + 0.0722 * lines[2]

    for text, color, ground in pairs:
        dark, light = sorted([luminance(color), luminance(ground)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, color, ground)
    assert pairs[0][0] == "DistriNews"  # the title's ground is the page's
    assert (luminance(pairs[0][2]) < 0.5) == (scheme == "dark")
