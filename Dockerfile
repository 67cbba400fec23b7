# The API with its int8 model inside and no torch. First write that model, then build and start:
#   python inference/export.py --to int8
#   docker build -t distrinews . && docker run -p 7860:7860 distrinews
# A Hugging Face Space builds the same file: inference/deploy_space.py sends what is copied here.
#
# Settings, each with docker run -e NAME=VALUE:
#   PORT             the port to listen on (7860)
#   THREADS          threads of the model (default: the container's CPUs, shared by the workers);
#                    OMP_NUM_THREADS is taken, too
#   WEB_CONCURRENCY  server processes (1); give them PROMETHEUS_MULTIPROC_DIR for a common /metrics,
#                    and docker run --init, else a failed start has exit status 0
#   ALLOW_ORIGINS    sites whose pages may ask, "*" or separated by commas (none)
#   UVICORN_...      other flags of uvicorn, such as UVICORN_TIMEOUT_KEEP_ALIVE=30
FROM python:3.12-slim

# a Space runs its container as uid 1000
RUN useradd --create-home --uid 1000 user
USER user
ENV HOME=/home/user
# where pip puts commands for a user who may not write to the system's folders
ENV PATH=$HOME/.local/bin:$PATH
# logs come out at once; all that is served lies in the image, so nothing asks the Hub
ENV PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 ENGINE=int8 PORT=7860
WORKDIR $HOME/app

# what rarely changes comes first: a new model or page reuses the packages' layer
COPY --chown=user inference/requirements.txt inference/
RUN pip install --no-cache-dir -r inference/requirements.txt
COPY --chown=user checkpoints/tokenizer/tokenizer.json checkpoints/tokenizer/
COPY --chown=user checkpoints/distilbert_agnews.int8.xml checkpoints/distilbert_agnews.int8.bin \
    checkpoints/distilbert_agnews.int8.json checkpoints/
COPY --chown=user training/machine.py training/
COPY --chown=user inference/app.py inference/batcher.py inference/index.html \
    inference/model_loader.py inference/

EXPOSE 7860
# slim has no curl; and a proxy that the container was given must not be asked for 127.0.0.1
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s CMD ["python", "-c", \
    "from os import environ; from urllib.request import *; \
    build_opener(ProxyHandler({})).open(f'http://127.0.0.1:{environ[\"PORT\"]}/health')"]
# exec: SIGTERM reaches uvicorn itself, which then finishes the requests it has. h11 bounds headers
# and URLs, and takes the requests with an upgrade header that Java's HttpClient sends
CMD ["sh", "-c", "exec uvicorn inference.app:app --host 0.0.0.0 --port $PORT --http h11"]
