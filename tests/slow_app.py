"""The app with a model that takes half a second for a batch: uvicorn tests.slow_app:app"""

import time

import inference.app


class Slow(inference.app.Classifier):
    def scores(self, rows):
        time.sleep(0.5)
        return super().scores(rows)


inference.app.Classifier, app = Slow, inference.app.app
