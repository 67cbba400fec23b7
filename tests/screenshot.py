"""Draws docs/page.png, the README's picture of the page, from a trained checkpoint (make demo).

python -m tests.screenshot [--checkpoint-dir DIR] [--out FILE] [--width PIXELS] [--dark]

Needs chromium and chromedriver.
"""

import argparse
import shutil
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.ranks import ROOT
from tests.server import server


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint-dir", type=Path, default=ROOT / "checkpoints")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "page.png")
    parser.add_argument("--width", type=int, default=1180)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    with server(args.checkpoint_dir) as address, webdriver.Chrome(options, service) as browser:
        size = {"width": args.width, "height": 1800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if args.dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.get(address)
        wait = WebDriverWait(browser, 20)
        for click, until in (
            ("#examples button", "#scores li"),
            ("#answer .row button", "#words"),
            ("#text", "#model dl"),
        ):
            browser.find_element(By.CSS_SELECTOR, click).click()
            wait.until(lambda driver, css=until: driver.find_elements(By.CSS_SELECTOR, css))
        browser.execute_script("document.activeElement.blur()")
        browser.find_element(By.TAG_NAME, "body").screenshot(str(args.out))


if __name__ == "__main__":
    main()
