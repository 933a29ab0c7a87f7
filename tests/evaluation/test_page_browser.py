"""The report page in a real browser: opened from disk, without network, every control used.

Needs Chromium and its driver on the path (Debian: `apt-get install chromium chromium-driver`);
without them these tests are skipped and say so.
"""

import http.server
import io
import json
import shutil
import threading
import time

import made_up
import numpy as np
import pytest
from PIL import Image

from rg_jax.evaluation import gallery, page, viewer
from rg_jax.evaluation.score import score_results

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no browser: chromium and chromedriver are not on the path, the page was not opened",
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SHOWN = (
    "return [...document.querySelectorAll('.card')].filter(c => !c.hidden)"
    ".map(c => c.querySelector('.id').textContent)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page with boxes and masks, CT and MR, two languages and tasks: its path, results, record
    of an id."""
    results, pictures = made_up.results(16)
    results = [made_up.with_masks(r) if k % 3 == 0 else r for k, r in enumerate(results)]
    results.sort(key=gallery.badness)
    record_of = made_up.record_of(results, pictures)
    directory = tmp_path_factory.mktemp("page")
    metrics = score_results(results, data="made up", split="val", resamples=100)
    overlays = gallery.write_overlays(directory, results, record_of)
    held = viewer.gather([r.sample.record_id for r in results], record_of)
    facts = {"name": "made up", "Step": "1"}
    return (
        page.write_page(directory, metrics, results, overlays, facts, (), held),
        results,
        record_of,
    )


@pytest.fixture
def opened(browser, made):
    """The page freshly opened, at 1280 pixels, once its first picture is painted."""
    resize(browser, 1280)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(made[0].as_uri())
    browser.execute_script("document.querySelector('.cards').scrollIntoView()")
    until(browser, "return document.querySelectorAll('.card.live').length")
    return browser


def resize(browser, width, height=1000):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def until(browser, script, *arguments):
    deadline = time.monotonic() + 60
    while not (value := browser.execute_script(script, *arguments)):
        assert time.monotonic() < deadline, f"never true: {script}"
        time.sleep(0.05)
    return value


def choose(browser, name, value):
    browser.execute_script(
        "let s = document.getElementById(arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event('change'))",
        name,
        value,
    )


def ids(results):
    return [r.sample.id for r in results]


def shown(browser):
    return browser.execute_script(SHOWN)


def card_of(browser, sample_id):
    """The card of a sample, scrolled to and painted."""
    card = browser.execute_script(
        "let c = [...document.querySelectorAll('.card')].find("
        "c => c.querySelector('.id').textContent === arguments[0]); c.scrollIntoView(); return c",
        sample_id,
    )
    until(browser, "return arguments[0].classList.contains('live')", card)
    return card


def pixels(browser, card):
    """The grey values on a card's canvas."""
    found = browser.execute_script(
        "let c = arguments[0].querySelector('canvas'), d = c.getContext('2d').getImageData(0, 0,"
        "c.width, c.height).data; return [c.height, c.width, Array.from(d).filter((_, k) => k % 4"
        "== 0)]",
        card,
    )
    return np.array(found[2]).reshape(found[:2])


def through(record, width, level):
    slope, intercept = record["rescale"]
    values = record["image"][..., 0] * slope + intercept
    return np.clip((values - (level - width / 2)) * 255 / width, 0, 255)


def test_it_loads_without_errors_or_network(opened, made):
    count = len(made[1])
    for k in range(count):  # every picture is unpacked, every drawn one lies beside the page
        card_of(opened, made[1][k].sample.id)
    time.sleep(0.3)
    assert opened.get_log("browser") == []
    requests = []
    for entry in opened.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requests.append(message["params"]["request"]["url"])
    assert made[0].as_uri() in requests
    folder = made[0].parent.as_uri()
    assert [r for r in requests if not r.startswith((folder, "data:", "blob:"))] == []
    assert len(shown(opened)) == count


def test_its_policy_lets_nothing_out(opened):
    hits = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/"
        refused = opened.execute_async_script(
            "let [url, done] = arguments, image = new Image(), told = [];"
            "document.addEventListener('securitypolicyviolation', e => told.push(e.blockedURI));"
            "image.src = url; fetch(url).then(() => done('let out'), () => setTimeout("
            "() => done(told.length), 300))",
            address,
        )
        assert refused == 2 and hits == []
    finally:
        server.shutdown()
        server.server_close()
    opened.get_log("browser")  # the two refusals


@pytest.mark.parametrize("name", ["task", "modality", "language"])
def test_a_filter_shows_what_fits_and_no_other(opened, made, name):
    values = sorted({getattr(r.sample, name) for r in made[1]})
    assert len(values) > 1
    for value in values:
        choose(opened, f"f-{name}", value)
        wanted = [r for r in made[1] if getattr(r.sample, name) == value]
        assert shown(opened) == ids(wanted)
        text = opened.execute_script("return document.getElementById('f-shown').textContent")
        assert text == f"{len(wanted)} of {len(made[1])} shown"


def test_classes_filter_by_reference_and_prediction_and_filters_combine(opened, made):
    choose(opened, "f-class", "liver")
    fits = [r for r in made[1] if any(e.class_id == 5 for e in (*r.sample.entities, *r.entities))]
    assert shown(opened) == ids(fits) and 0 < len(fits) < len(made[1])
    choose(opened, "f-language", "de")
    assert shown(opened) == ids(r for r in fits if r.sample.language == "de")
    choose(opened, "f-task", "vqa")
    none = "return document.getElementById('f-none').checkVisibility()"
    assert shown(opened) == [] and opened.execute_script(none)
    opened.execute_script("document.getElementById('f-reset').click()")
    assert len(shown(opened)) == len(made[1]) and not opened.execute_script(none)


def test_the_order_can_be_turned(opened, made):
    assert shown(opened) == ids(made[1])
    choose(opened, "f-order", "best")
    assert shown(opened) == ids(made[1])[::-1]
    choose(opened, "f-order", "worst")
    assert shown(opened) == ids(made[1])


def visible(browser, card, selector):
    return browser.execute_script(
        "return [...arguments[0].querySelectorAll(arguments[1])].map("
        "e => getComputedStyle(e).display !== 'none')",
        card,
        selector,
    )


SWITCHES = {
    "reference": ".layers .r",
    "prediction": ".layers .p",
    "boxes": ".layers .box",
    "masks": ".layers .mask",
    "labels": ".layers .label",
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_hides_its_layers_and_only_those(opened, made, name):
    result = next(r for r in made[1] if r.masks and r.reference_masks)
    card = card_of(opened, result.sample.id)
    everything = visible(opened, card, ".layers *")
    assert all(everything)
    switch = f"document.querySelector('input[data-layer={name}]').click()"
    opened.execute_script(switch)
    assert not any(visible(opened, card, SWITCHES[name])) and visible(opened, card, SWITCHES[name])
    others = [s for s in SWITCHES.values() if s != SWITCHES[name]]
    left = f":not({SWITCHES[name].removeprefix('.layers ')})"
    assert all(any(visible(opened, card, other + left)) for other in others)
    opened.execute_script(switch)
    assert visible(opened, card, ".layers *") == everything


def test_a_class_can_be_hidden_on_one_picture(opened, made):
    results = [r for r in made[1] if any(e.class_id == 5 for e in r.sample.entities)][:2]
    card, other = (card_of(opened, r.sample.id) for r in results)
    chip = "arguments[0].querySelector('.chip[data-class=liver]')"
    assert opened.execute_script(f"return {chip}.textContent", card) == "liver"
    opened.execute_script(f"{chip}.click()", card)
    assert opened.execute_script(f"return {chip}.getAttribute('aria-pressed')", card) == "false"
    assert set(visible(opened, card, "[data-class=liver].box")) == {False}
    rest = visible(opened, card, ".box:not([data-class=liver])")
    assert all(rest) and all(visible(opened, other, "[data-class=liver].box"))
    opened.execute_script(f"{chip}.click()", card)
    assert all(visible(opened, card, "[data-class=liver].box"))


def test_ct_is_seen_through_the_window_that_is_set(opened, made):
    result = next(r for r in made[1] if r.sample.modality == "CT")
    record = made[2](result.sample.record_id)
    card = card_of(opened, result.sample.id)

    def is_seen(width, level):
        return np.abs(pixels(opened, card) - through(record, width, level)).max() <= 0.51

    assert is_seen(350, 40)
    change = "let f = arguments[0].querySelector(arguments[1]); f.value = arguments[2];"
    change += "f.dispatchEvent(new Event(f.type === 'range' ? 'input' : 'change'))"
    for name, window in (("wide", (2250, -100)), ("brain", (80, 40))):
        opened.execute_script(change, card, ".controls select", name)
        assert is_seen(*window)
    for number, (slider, value) in enumerate([(1, 500), (2, 120)]):
        opened.execute_script(change, card, f".slider:nth-last-of-type({3 - slider}) input", value)
        assert is_seen(500, 120 if number else 40)
    told = opened.execute_script(
        "return [...arguments[0].querySelectorAll('output, select')].map(e => e.value)", card
    )
    assert told == ["own", "500", "120"]
    opened.execute_script("arguments[0].querySelector('.controls button').click()", card)
    assert is_seen(350, 40)


def test_other_pictures_have_contrast_and_brightness(opened, made):
    result = next(r for r in made[1] if r.sample.modality == "MR")
    record = made[2](result.sample.record_id)
    card = card_of(opened, result.sample.id)
    low, high = np.percentile(record["image"].astype(np.float32), (0.5, 99.5))
    width, level = high - low, (low + high) / 2
    assert np.abs(pixels(opened, card) - through(record, width, level)).max() <= 0.6
    change = "let f = arguments[0].querySelectorAll('input[type=range]')[arguments[1]];"
    change += "f.value = arguments[2]; f.dispatchEvent(new Event('input'))"
    opened.execute_script(change, card, 0, 200)
    assert np.abs(pixels(opened, card) - through(record, width / 2, level)).max() <= 0.6
    opened.execute_script(change, card, 1, 25)
    # Brighter by a quarter of what is shown at first.
    seen = through(record, width / 2, level - 0.25 * width)
    assert np.abs(pixels(opened, card) - seen).max() <= 0.6


def test_dragging_sets_the_window_and_the_pointer_tells_the_value(opened, made):
    from selenium.webdriver import ActionChains

    result = next(r for r in made[1] if r.sample.modality == "CT")
    record = made[2](result.sample.record_id)
    card = card_of(opened, result.sample.id)
    stage = opened.execute_script("return arguments[0].querySelector('.stage')", card)
    before = pixels(opened, card)
    ActionChains(opened).move_to_element(stage).perform()
    side = record["image"].shape[0]
    value = opened.execute_script("return arguments[0].querySelector('.readout').textContent", card)
    near = record["image"][side // 2 - 1 : side // 2 + 2, side // 2 - 1 : side // 2 + 2, 0] - 1024
    assert value.endswith(" HU") and int(value.removesuffix(" HU")) in near
    ActionChains(opened).click_and_hold(stage).move_by_offset(60, 30).release().perform()
    assert np.abs(pixels(opened, card) - before).max() > 10
    ActionChains(opened).double_click(stage).perform()
    assert (pixels(opened, card) == before).all()


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_runs_over_the_side(opened, width):
    resize(opened, width)
    scroll = "return document.documentElement.scrollWidth"
    assert opened.execute_script(scroll) <= width
    opened.execute_script("document.querySelector('.cards').scrollIntoView()")
    until(opened, "return document.querySelectorAll('.card.live').length")
    over = (
        "return [...document.querySelectorAll('.card *')].filter(e => {"
        "let c = e.closest('.card').getBoundingClientRect(), r = e.getBoundingClientRect();"
        "return !e.closest('svg') && r.width && (r.right > c.right + 1 || r.left < c.left - 1)})"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert opened.execute_script(over) == []
    wide = "let b = [...document.querySelectorAll('.controls button')].find("
    wide += "b => b.textContent === 'Enlarge'); b.click(); return b.closest('.card')"
    card = opened.execute_script(wide)
    sizes = "let r = arguments[0].querySelector('.stage').getBoundingClientRect();"
    sizes += "return [r.width, r.height, arguments[0].clientWidth]"
    across, down, room = opened.execute_script(sizes, card)
    assert across <= room + 1 and down <= 1000 and opened.execute_script(scroll) <= width
    shot = Image.open(io.BytesIO(opened.get_screenshot_as_png())).convert("L")
    assert np.asarray(shot).std() > 20


def test_without_scripts_all_is_there_as_drawn(browser, made):
    resize(browser, 1280)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(made[0].as_uri())
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert shown(browser) == ids(made[1])
    state = browser.execute_script(
        "return [document.querySelector('.filters').checkVisibility(),"
        "[...document.querySelectorAll('.stage')].some(e => e.checkVisibility()),"
        "[...document.querySelectorAll('.card img')].every(e => e.checkVisibility())]"
    )
    assert state == [False, False, True]


def test_an_old_browser_shows_the_drawn_pictures_and_says_why(browser, made):
    hide = {"source": "delete window.DecompressionStream"}
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", hide)
    try:
        browser.get(made[0].as_uri())
        state = browser.execute_script(
            "return [document.getElementById('f-old').checkVisibility(),"
            "document.querySelectorAll('.live').length]"
        )
        assert state == [True, 0]
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
