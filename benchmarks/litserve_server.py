"""The pipeline behind LitServe with batching on. bench_inference.py compares with it.

MODEL=FOLDER PORT=8000 WORKERS=2 python -m benchmarks.litserve_server
"""

import os

import litserve
from transformers import pipeline


class Api(litserve.LitAPI):
    def setup(self, device):
        self.classify = pipeline("text-classification", os.environ["MODEL"])

    def predict(self, requests):
        texts = [request["text"] for request in requests]
        return self.classify(texts, truncation=True, batch_size=len(texts))


if __name__ == "__main__":
    api = Api(max_batch_size=16, batch_timeout=0.005)
    workers = int(os.environ["WORKERS"])
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers)
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False)
