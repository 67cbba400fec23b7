"""Draws docs/page.png, the README's picture of the page, from a trained checkpoint (make demo).

python -m tests.screenshot [--checkpoint-dir checkpoints]

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
    args = parser.parse_args()
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless", "--no-sandbox", "--window-size=1180,1400", "--hide-scrollbars"):
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    with server(args.checkpoint_dir) as address:
        browser = webdriver.Chrome(options=options, service=service)
        browser.get(address)
        browser.find_element(By.CSS_SELECTOR, "form li button").click()
        wait = WebDriverWait(browser, 10)
        wait.until(lambda driver: driver.find_elements(By.CSS_SELECTOR, "#scores li"))
        wait.until(lambda driver: driver.find_elements(By.CSS_SELECTOR, "#model dl"))
        browser.find_element(By.TAG_NAME, "body").screenshot(str(ROOT / "docs" / "page.png"))
        browser.quit()


if __name__ == "__main__":
    main()
