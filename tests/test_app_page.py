"""The app in a real browser."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from networks import tiny_network

from diffusers_gm import AnnealedLangevinScheduler, NCSNv2Pipeline

pytest.importorskip("gradio", reason="the page needs gradio: pip install diffusers-gm[app]")
webdriver = pytest.importorskip("selenium.webdriver", reason="a browser is driven by selenium: pip install selenium")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver"),
    # Other packages of the app's.
    pytest.mark.filterwarnings("ignore"),
]
# Seconds, on a machine that does a lot besides.
PATIENCE = 180


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where a page with an untrained model is served."""
    folder = tmp_path_factory.mktemp("app") / "outputs" / "demo"
    NCSNv2Pipeline(tiny_network(), AnnealedLangevinScheduler(sigma_max=10.0)).save_pretrained(folder)
    (folder / "training_args.json").write_text(json.dumps({"dataset_name": "digits", "resolution": 8}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diffusers_gm.app", "--port", str(port)]
    server = subprocess.Popen(command, cwd=folder.parent.parent, stderr=subprocess.PIPE, text=True)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    while True:
        try:
            urllib.request.urlopen(url).close()
            break
        except OSError:
            assert server.poll() is None, server.communicate()[1]
            assert time.monotonic() < deadline, "no page"
            time.sleep(0.2)
    yield url
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield opened
    opened.quit()


class Page:
    """The page in a browser, in a window of this size."""

    def __init__(self, driver, address, width=1280, height=900):
        self.driver = driver
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(address)
        self.wait("#status .gm-note")

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def wait(self, selector, count=1):
        """The elements, once there are so many to be seen."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                found = [element for element in self.all(selector) if element.is_displayed()]
            except webdriver.support.expected_conditions.StaleElementReferenceException:
                found = []
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline, f"no {selector} in {self.text()}"
            time.sleep(0.05)

    def click(self, selector):
        self.wait(selector)[0].click()

    def text(self, selector="body"):
        return self.driver.find_element("css selector", selector).text

    def type(self, selector, text):
        from selenium.webdriver.common.keys import Keys

        field = self.wait(selector)[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text, Keys.TAB)

    def compare(self, calls):
        self.type("#calls textarea, #calls input", calls)
        self.click("#compare")

    def sideways(self):
        """By how many pixels the page is wider than the window."""
        return self.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")


@pytest.fixture
def page(driver, address):
    yield Page(driver, address)
    assert not [entry["message"] for entry in driver.get_log("browser") if "Uncaught" in entry["message"]]


@pytest.mark.parametrize("size", [(1280, 900), (420, 800)], ids=["desk", "phone"])
def test_samplers_are_compared(driver, address, size):
    page = Page(driver, address, *size)
    assert "NCSNv2Pipeline" in page.text("#status")
    assert "Left out: Euler, flow: it reads those of flow noise" in page.text("#status")
    began = time.monotonic()
    page.compare("4 6")
    page.wait("#result .gm-finished")
    # Under 3 s on two cores that have nothing else to do.
    assert time.monotonic() - began < 20
    page.wait("#export")
    assert len(page.all("#result .gm-finished")) == 6, "as saved, GM ode and UniPC, at two numbers of calls"
    assert [title.text for title in page.all("#result h3")] == [
        "as saved, AnnealedLangevinScheduler",
        "GM, ode",
        "UniPC",
    ]
    assert page.text("#result").count("x floor (") == 6
    assert all(int(image.get_property("naturalWidth")) > 64 for image in page.all("#result img"))
    page.wait("#code .cm-line", 7)
    assert 'NCSNv2Pipeline.from_pretrained("outputs/demo")' in page.text("#code")
    page.wait("#config .cm-line", 7)
    assert "AnnealedLangevinScheduler" in page.text("#config")
    assert page.sideways() <= 0


def test_errors_are_sentences_on_the_page(page):
    page.compare("ten")
    (alert,) = page.wait('#message [role="alert"]')
    assert alert.text == "Network calls must be whole numbers from 1 to 1000, such as 5 10 20, got 'ten'."
    page.type("#model input", "nowhere/at-all")
    (alert,) = page.wait('#status [role="alert"]')
    assert alert.text.startswith("nowhere/at-all is neither a folder nor a pipeline on the Hub")
    page.type("#model input", "outputs/demo")
    page.wait("#status .gm-note")
    page.compare("4")
    page.wait("#export")
    assert not page.all('#message [role="alert"]')
    assert page.sideways() <= 0


def test_a_comparison_is_stopped(page):
    page.compare("1000")
    page.wait("#result .gm-cell img")
    page.click("#stop")
    page.compare("4")
    page.wait("#export")
    assert len(page.all("#result .gm-finished")) == 3


def test_calibrating_shows_levels_and_adds_a_sampler(page):
    page.type("#calls textarea, #calls input", "4 6")
    page.click("#calibration button")
    page.click("#calibrate")
    page.wait("#levels img")
    assert "6 calls: 10, " in page.wait("#found textarea")[0].get_property("value")
    page.compare("4")
    page.wait("#export")
    assert page.all("#result h3")[-1].text == "calibrated"
    assert page.sideways() <= 0
