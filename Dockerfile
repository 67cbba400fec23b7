# The API with its int8 model inside and no torch. First write that model, then build and start:
#   python inference/export.py --to onnx
#   docker build -t distrinews . && docker run -p 7860:7860 distrinews
# A Hugging Face Space builds the same file: inference/deploy_space.py sends what is copied here.
FROM python:3.12-slim

# a Space runs its container as uid 1000
RUN useradd --create-home --uid 1000 user
USER user
ENV HOME=/home/user
# where pip puts commands for a user who may not write to the system's folders
ENV PATH=$HOME/.local/bin:$PATH
# logs come out at once; all that is served lies in the image, so nothing asks the Hub
ENV PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 ENGINE=onnx
WORKDIR $HOME/app

# from what seldom changes to what often does: a new model or page reuses the layer of packages
COPY --chown=user inference/requirements.txt inference/
RUN pip install --no-cache-dir -r inference/requirements.txt
COPY --chown=user checkpoints/tokenizer/tokenizer.json checkpoints/tokenizer/
COPY --chown=user checkpoints/distilbert_agnews.int8.onnx checkpoints/distilbert_agnews.int8.json \
    checkpoints/
COPY --chown=user inference/app.py inference/batcher.py inference/index.html \
    inference/model_loader.py inference/

EXPOSE 7860
# slim has no curl; and a proxy that the container was given must not be asked for 127.0.0.1
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s CMD ["python", "-c", \
    "from urllib.request import *; \
    build_opener(ProxyHandler({})).open('http://127.0.0.1:7860/health')"]
# exec form: SIGTERM reaches uvicorn itself, which then finishes the requests it has
CMD ["uvicorn", "inference.app:app", "--host", "0.0.0.0", "--port", "7860"]
