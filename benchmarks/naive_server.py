"""What one would write first: a pipeline in a `def` endpoint. bench_inference.py compares with it.

MODEL=FOLDER uvicorn benchmarks.naive_server:app
"""

import os

from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

app = FastAPI()
classify = pipeline("text-classification", os.environ["MODEL"])


class Text(BaseModel):
    text: str


@app.post("/predict")
def predict(body: Text):
    return classify(body.text, truncation=True)[0]
