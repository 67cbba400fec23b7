"""The page at / in a real browser, Debian's chromium: pytest tests/test_page.py"""

import json
import re
import shutil
import ssl
import subprocess
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from ranks import ROOT
from server import server as api

import checkpoint

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("needs chromium and chromedriver on the PATH", allow_module_level=True)

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

LABELS = {"World", "Sports", "Business", "Sci/Tech"}
CUT_NOTE = "only its beginning counted"
MODEL = {
    "backbone": "a-backbone", "data": "some-news", "engine": "torch", "device": "cpu",
    "test_accuracy": 0.876, "checkpoint": "0123456789ab",
}  # fmt: skip
PREDICTION = {
    "label": "Sports", "confidence": 0.7, "truncated": False,
    "scores": {"World": 0.1, "Sports": 0.7, "Business": 0.15, "Sci/Tech": 0.05},
}  # fmt: skip

# Servers


@pytest.fixture(scope="module")
def server(trained):
    with api(trained, ENGINE="torch") as address:
        yield address


class Answers(BaseHTTPRequestHandler):
    """Says what its server's `answers[path]` says: a list is used up to its last item."""

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answers = self.server.answers.get(self.path, [(404, {}, "")])
        status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

    do_POST = do_GET

    def log_message(self, *args):
        pass


def serve(answers, certificate=None):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.answers = answers
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        # the handshake in the connection's own thread: one that never speaks holds up nobody
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    return server


HTML = {"Content-Type": "text/html; charset=utf-8"}


@pytest.fixture
def stand_in():
    """Serves the page under a path prefix, with answers that the real server gives rarely."""
    page = (ROOT / "inference" / "index.html").read_text()
    server = serve({
        "/some/prefix/": [(200, HTML, page)],
        "/some/prefix/health": [(200, {}, {"status": "healthy", "model": dict(MODEL)})],
        "/some/prefix/predict": [(200, {}, PREDICTION)],
    })  # fmt: skip
    server.address = f"http://127.0.0.1:{server.server_port}/some/prefix/"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def elsewhere(server, tmp_path_factory):
    """Another site, whose page holds ours in a frame; under http, and under https."""
    pem = tmp_path_factory.mktemp("tls") / "both.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    make += ["-subj", "/CN=huggingface.co", "-keyout", pem, "-out", pem.with_suffix(".crt")]
    subprocess.run([*map(str, make)], check=True, capture_output=True)
    pem.write_text(pem.read_text() + pem.with_suffix(".crt").read_text())
    parent = {"/": [(200, HTML, f"<!doctype html><title>parent</title><iframe src={server}/>")]}
    both = serve(dict(parent)), serve(dict(parent), pem)
    yield both
    for one in both:
        one.shutdown()
        one.server_close()


# The browser


@pytest.fixture(scope="module")
def browser(elsewhere, tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-dev-shm-usage", "--no-proxy-server", "--ignore-certificate-errors",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
        # no name is looked up; these two stand for the site that shows Spaces, and for any other
        f"--host-resolver-rules=MAP huggingface.co:443 127.0.0.1:{elsewhere[1].server_port}, "
        f"MAP example.org:443 127.0.0.1:{elsewhere[1].server_port}, "
        "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class Page:
    """What a person does with the page and sees of it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, address, width=1280, height=800):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(address)
        return self

    def one(self, css):
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css):
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def keys(self, *keys):
        """To whatever has the focus, as from a keyboard."""
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def wait(self, promise, seconds=10):
        return WebDriverWait(self.driver, seconds, 0.02).until(lambda _: promise())

    def wait_for(self, css, words):
        """Until the element says `words`; all that it says."""
        self.wait(lambda: any(words in one.text for one in self.all(css)))
        return self.one(css).text

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

    def facts(self):
        self.wait(lambda: self.all("#model dd"))
        names, values = self.all("#model dt"), self.all("#model dd")
        return {name.text: value.text for name, value in zip(names, values, strict=True)}


@pytest.fixture
def page(browser):
    browser.get("about:blank")
    for log in ("performance", "browser"):
        browser.get_log(log)  # what an earlier test left
    return Page(browser)


# Asking


@pytest.mark.parametrize("submit", ["the button", "Ctrl+Enter", "Cmd+Enter"])
def test_a_headline_is_asked_and_answered_by_keyboard_alone(server, page, submit):
    page.open(server)
    page.keys(Keys.TAB, "Shares rose after the bank raised its profit")
    assert page.one("label[for=text]").text and page.one("#text").get_property("value")
    if submit == "the button":
        page.keys(Keys.TAB)
        focused = page.driver.switch_to.active_element
        assert focused.get_property("type") == "submit"
        outline = [focused.value_of_css_property(f"outline-{what}") for what in ("style", "width")]
        assert outline == ["solid", "3px"]  # the focus can be seen
        page.keys(Keys.ENTER)
    else:
        key = Keys.CONTROL if submit == "Ctrl+Enter" else Keys.META
        chain = webdriver.ActionChains(page.driver)
        chain.key_down(key).send_keys(Keys.ENTER).key_up(key).perform()
    bars = page.bars()
    assert bars.keys() == LABELS
    # four numbers that were each rounded to 0.1 are off by 0.2 at most
    assert sum(written for written, _ in bars.values()) == pytest.approx(100, abs=0.21)
    for written, drawn in bars.values():
        assert drawn == pytest.approx(written, abs=1)  # a bar's end falls on a fraction of a pixel
    label = page.one("#answer .label").text
    assert bars[label][0] == max(written for written, _ in bars.values())
    assert float(page.one("#answer .label").value_of_css_property("font-size")[:-2]) >= 40
    assert re.search(r"Round trip: \d+ ms", page.one("#answer").text)
    assert page.one("#answer").get_attribute("aria-live") == "polite"
    assert page.one("#answer").get_attribute("aria-busy") == "false"


def test_an_example_fills_the_box_and_asks_at_once(server, page):
    page.open(server)
    examples = [button.text for button in page.all("form li button")]
    assert len(set(examples)) == 3
    # Tab: the box, the button, the first example, the second
    page.keys(Keys.TAB, Keys.TAB, Keys.TAB, Keys.TAB, Keys.SPACE)
    page.bars()
    assert page.one("#text").get_property("value") == examples[1]
    assert page.one("#answer blockquote").text == examples[1]


def test_a_text_that_the_model_cuts_is_told_to_be_cut(server, page):
    page.open(server).ask("goal " * 126)  # with [CLS] and [SEP] the 128 tokens of --max-length
    page.bars()
    assert CUT_NOTE not in page.one("#answer").text
    page.ask("goal " * 127)
    page.wait_for("#answer", CUT_NOTE)
    assert page.bars().keys() == LABELS


def test_the_bars_are_those_of_the_answer(stand_in, page):
    page.open(stand_in.address).ask("anything")
    expected = {"World": 10, "Sports": 70, "Business": 15, "Sci/Tech": 5}
    assert {name: written for name, (written, _) in page.bars().items()} == expected
    assert page.one("#answer .label").text == "Sports"
    # told apart by more than their colour: its name in large type, and bold in the list
    weights = {row.text.split("\n")[0]: row.value_of_css_property("font-weight")
               for row in page.all("#scores li")}  # fmt: skip
    assert [name for name, weight in weights.items() if weight == "700"] == ["Sports"]


def test_only_the_newest_question_is_answered(stand_in, page):
    page.open(stand_in.address)
    page.facts()
    # the first answer comes late: fetch is held back until the second is there
    page.driver.execute_script(
        "const real = fetch; let first = true;"
        "window.fetch = async (...all) => { const wait = first; first = false;"
        "  const answer = await real(all[0], { ...all[1], signal: undefined });"
        "  if (wait) { await new Promise((done) => setTimeout(done, 300)); window.late = true; }"
        "  return answer; }"
    )
    page.ask("the first")
    page.ask("the second")
    page.wait(lambda: page.driver.execute_script("return window.late"))
    page.driver.execute_async_script("setTimeout(arguments[0], 100)")
    assert page.one("#answer blockquote").text == "the second"


# What it says of the model


def test_the_page_says_of_the_model_what_health_says(server, page):
    with urllib.request.urlopen(f"{server}/health") as answer:
        model = json.load(answer)["model"]
    assert page.open(server).facts() == {
        "Backbone": model["backbone"], "Trained on": model["data"], "Engine": model["engine"],
        "Device": model["device"], "Checkpoint": model["checkpoint"],
        "Test accuracy": f"{100 * model['test_accuracy']:.1f} %",
    }  # fmt: skip
    assert "demonstration" not in page.one("body").text


def test_a_model_of_the_sample_is_called_a_demonstration(trained, page, tmp_path):
    shutil.copytree(trained, tmp_path / "c")
    path = tmp_path / "c" / "distilbert_agnews.pt"
    state = torch.load(path)
    state["provenance"]["data"] = "sample"
    checkpoint.save_checkpoint(state, path)
    with api(tmp_path / "c", ENGINE="torch") as server:
        assert page.open(server).facts()["Trained on"] == "sample"
        said = page.one("#model").text
    items = len((ROOT / "training" / "sample_data" / "train.csv").read_text().splitlines()) - 1
    assert f"trained only on {items} short items written for this project" in said
    assert "answers are a demonstration" in said and "not an AG News figure" in said


# What goes wrong


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "(422): text: "),
        (" \n\t ", "(422): text: "),
        ("a" * 20_001, "at most 20000 characters"),
        ("\ud800", "(422): "),
        ("a" * 70_000, "(413): "),
    ],
    ids=["empty", "blank", "long", "no Unicode", "huge"],
)
def test_a_refusal_is_shown_in_the_servers_words(server, page, text, says):
    page.open(server)
    if text == "\ud800":  # the driver's own JSON cannot carry it
        page.driver.execute_script("document.getElementById('text').value = '\\ud800'")
        page.one("[type=submit]").click()
    else:
        page.ask(text)
    said = page.wait_for("#answer", says)
    assert "no reason given" not in said and not page.all("#scores")
    page.ask("goal")  # and goes on
    assert page.bars().keys() == LABELS


ATTACK = "<script>hit = 1</script><img src=x onerror='hit = 1'><b id=bold>match</b>"


def test_a_script_in_the_text_is_shown_and_not_run(server, page):
    page.open(server).ask(ATTACK)
    page.bars()
    assert page.one("#answer blockquote").text == ATTACK
    assert not page.all("#bold") and not page.all("img")
    assert page.driver.execute_script("return window.hit") is None


def test_a_script_in_what_the_server_says_is_shown_and_not_run(stand_in, page):
    stand_in.answers["/some/prefix/health"][0][2]["model"]["data"] = ATTACK
    stand_in.answers["/some/prefix/predict"] = [
        (422, {}, {"detail": ATTACK}),
        (200, {}, PREDICTION | {"label": ATTACK, "scores": {ATTACK: 1.0}}),
    ]
    page.open(stand_in.address)
    assert page.facts()["Trained on"] == ATTACK
    page.ask("anything")
    page.wait_for("#answer", ATTACK)
    page.ask("anything")
    assert page.bars().keys() == {ATTACK}
    assert not page.all("#bold") and not page.all("img")
    assert page.driver.execute_script("return window.hit") is None


def test_while_the_server_starts_the_page_says_so_and_waits(stand_in, page):
    starting = (503, {"Retry-After": "1"}, {"detail": "starting: loading the model"})
    stand_in.answers["/some/prefix/health"][:0] = [starting] * 2
    stand_in.answers["/some/prefix/predict"][:0] = [starting]
    began = time.monotonic()
    page.open(stand_in.address).ask("anything")
    assert "every second" in page.wait_for("#model", "starting: loading the model")
    assert "starting: loading the model" in page.one("#answer").text
    assert page.facts()["Backbone"] == "a-backbone"
    assert page.bars().keys() == LABELS  # the question was kept, and asked again
    assert 1.8 < time.monotonic() - began < 8  # two refusals, a second's pause after each


def test_a_busy_server_names_the_seconds_to_wait(stand_in, page):
    busy = (429, {"Retry-After": "7"}, {"detail": "the queue is full"})
    stand_in.answers["/some/prefix/predict"][:0] = [busy]
    page.open(stand_in.address).ask("anything")
    assert "Try again in 7 seconds" in page.wait_for("#answer", "busy")
    page.ask("anything")
    assert page.bars().keys() == LABELS


def test_without_a_network_the_page_says_so_and_recovers(stand_in, page):
    page.open(stand_in.address).facts()
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        page.ask("anything")
        page.wait_for("#answer", "cannot be reached")
        page.wait_for("#model", "cannot be reached")
    finally:
        online = offline | {"offline": False}
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", online)
    assert page.facts()["Backbone"] == "a-backbone"
    assert page.one("#text").get_property("value") == "anything"


def test_an_answer_that_is_not_the_apis_is_an_error_in_words(stand_in, page):
    stand_in.answers["/some/prefix/predict"][:0] = [(502, HTML, "<h1>Bad gateway</h1>")]
    page.open(stand_in.address).ask("anything")
    assert "(502)" in page.wait_for("#answer", "did not take")


# Where it is shown


def test_no_request_leaves_the_origin(server, page):
    page.open(server).ask("goal")
    page.bars()
    page.facts()
    events = [json.loads(line["message"])["message"] for line in page.driver.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in events
            if event["method"] == "Network.requestWillBeSent"}  # fmt: skip
    assert urls - {"about:blank"} == {f"{server}/", f"{server}/health", f"{server}/predict"}
    # nor did the policy have to stop one, which would stand in the console
    log = [line["message"] for line in page.driver.get_log("browser")]
    assert not [line for line in log if "favicon.ico" not in line], log


def test_the_page_works_behind_a_path_prefix(stand_in, page):
    page.open(stand_in.address).ask("anything")
    assert page.bars().keys() == LABELS
    assert page.one("footer a").get_property("href") == f"{stand_in.address}docs"
    assert page.one("code").text.startswith(f"curl {stand_in.address}predict ")


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_curl_line_works(server, page):
    command = page.open(server).one("code").text
    done = subprocess.run(["bash", "-c", f"{command} -sS --noproxy '*'"], capture_output=True,
                          text=True, timeout=20)  # fmt: skip
    assert json.loads(done.stdout)["scores"].keys() == LABELS


def test_the_policy_lets_the_space_frame_the_page_and_nobody_else(server):
    with urllib.request.urlopen(f"{server}/") as answer:
        headers = answer.headers
    policy = dict(part.strip().split(" ", 1) for part in
                  headers["Content-Security-Policy"].split(";"))  # fmt: skip
    assert policy["frame-ancestors"] == "'self' https://huggingface.co https://*.hf.space"
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    # it cannot name two sites: where it is obeyed, any value would forbid the Space's frame
    assert "X-Frame-Options" not in headers


@pytest.mark.parametrize("parent", ["http://127.0.0.1", "https://example.org"])
def test_another_sites_frame_stays_empty(elsewhere, page, parent):
    port = f":{elsewhere[0].server_port}" if parent.startswith("http:") else ""
    page.open(f"{parent}{port}/")
    assert page.driver.title == "parent"
    page.driver.switch_to.frame(page.one("iframe"))
    assert not page.all("form")
    log = " ".join(line["message"] for line in page.driver.get_log("browser"))
    assert "frame-ancestors" in log


def test_the_page_works_in_the_spaces_frame(elsewhere, page):
    page.open("https://huggingface.co/")
    assert page.driver.title == "parent"
    page.driver.switch_to.frame(page.one("iframe"))
    page.wait(lambda: page.all("form"))
    page.ask("goal")
    assert page.bars().keys() == LABELS


def test_the_page_works_in_a_frame_of_its_own_site(server, page):
    page.open(f"{server}/metrics")  # a page of the same origin without a policy of its own
    page.driver.execute_script(
        "const frame = document.createElement('iframe'); frame.src = '/';"
        "document.body.append(frame)"
    )
    page.driver.switch_to.frame(page.one("iframe"))
    page.wait(lambda: page.all("form"))
    page.ask("goal")
    assert page.bars().keys() == LABELS


@pytest.mark.parametrize("width, height", [(360, 740), (1280, 800)])
def test_nothing_is_wider_than_the_window(stand_in, page, width, height):
    stand_in.answers["/some/prefix/health"][0][2]["model"] |= {
        "data": "/a/folder/with/a/very/long/name/" * 3, "test_accuracy": 1.0,
    }  # fmt: skip
    page.open(stand_in.address, width, height).ask("a" * 150)  # not a space to break it at
    page.bars()
    page.facts()
    # a phone would zoom out to show what is wider, and a window grow a scroll bar
    assert page.driver.execute_script("return innerWidth") == width
    script = (
        "const inside = document.documentElement.clientWidth;"
        "return [...document.querySelectorAll('html, body *')].filter((one) =>"
        " one.scrollWidth > inside || one.getBoundingClientRect().right > inside + 0.1)"
        ".map((one) => one.outerHTML)"
    )
    assert page.driver.execute_script(script) == []


def test_on_a_phone_the_answer_comes_into_view(stand_in, page):
    page.open(stand_in.address, 360, 740).all("form li button")[2].click()
    page.bars()
    place = "const at = arguments[0].getBoundingClientRect(); return [at.top, at.bottom]"
    top, bottom = page.driver.execute_script(place, page.one("#answer"))
    assert 0 <= top < bottom <= 740


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground(stand_in, page, scheme):
    """WCAG 2.2, 1.4.3: a contrast of 4.5 at least."""
    stand_in.answers["/some/prefix/health"][0][2]["model"]["data"] = "sample"
    stand_in.answers["/some/prefix/predict"] = [(200, {}, PREDICTION | {"truncated": True})]
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    page.open(stand_in.address).ask("anything")
    page.bars()
    page.facts()
    pairs = page.driver.execute_script("""
        const ground = (one) => {
            const color = getComputedStyle(one).backgroundColor;
            return color === "rgba(0, 0, 0, 0)" ? ground(one.parentElement) : color;
        };
        const text = (node) => node.nodeType === Node.TEXT_NODE && node.data.trim();
        const said = (one) => [...one.childNodes].some(text);
        return [...document.querySelectorAll("body *")]
            .filter((one) => one.checkVisibility() && said(one))
            .map((one) => [one.innerText, getComputedStyle(one).color, ground(one)]);
    """)
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(pairs) > 25

    def luminance(color):
        channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        lines = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * lines[0] + 0.7152 * lines[1] + 0.0722 * lines[2]

    for text, color, ground in pairs:
        dark, light = sorted([luminance(color), luminance(ground)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, color, ground)
    assert pairs[0][0] == "DistriNews"  # the title's ground is the page's
    assert (luminance(pairs[0][2]) < 0.5) == (scheme == "dark")
