# The service as a CPU image without torch.
#
# The shipped model and its encoder. It is a demonstration, and says so:
#
#   docker build -t detector .
#   docker run --rm -p 8000:8000 --read-only detector
#
# An encoder of your choice, prepared in the image, and a mounted model:
#
#   docker build -t detector --build-arg CLIP_MODEL=ViT-L/14 .
#   docker run --rm -p 8000:8000 --read-only -v "$PWD/model.joblib:/models/model.joblib:ro" detector
#
# Neither. Also mount an encoder that was prepared elsewhere, with -v "$HOME/.cache/clip:/cache:ro".
# A ResNet needs this, because its preparation needs torch:
#
#   docker build -t detector --target serve .
#
# Add --build-arg LAYERS=multi for a model of other layers than CLIP's embedding.
# Add --build-arg CODE_COMMIT="$(git rev-parse HEAD)", because the image has no git.

ARG CLIP_MODEL
# Another encoder gives its embedding. The shipped encoder gives the layers of the shipped model.
ARG LAYERS=${CLIP_MODEL:+final}
# The last stage: `prepared` with CLIP_MODEL, `demo` without it.
ARG KIND=${CLIP_MODEL:+prepared}


FROM python:3.11-slim AS serve
# MODEL_PATH and CLIP_CACHE: the paths at which a model and prepared encoders are mounted.
ENV PYTHONDONTWRITEBYTECODE=1 \
    HOST=0.0.0.0 \
    PORT=8000 \
    MODEL_PATH=/models/model.joblib \
    CLIP_CACHE=/cache
WORKDIR /app
COPY requirements-serve.txt ./
RUN python -m pip install --no-cache-dir -r requirements-serve.txt
COPY app.py classify.py golden.py gunicorn.conf.py prepare_clip.py ./
COPY detector detector
COPY requirements requirements
ARG CODE_COMMIT=unknown
ENV CODE_COMMIT=${CODE_COMMIT}
# A number, so that Kubernetes can check that it is not root.
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as u; \
         u.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/healthz')"]
CMD ["python", "app.py"]


# The download and the form for CUDA stay in this stage.
FROM serve AS encoder
USER 0
ARG CLIP_MODEL
ARG LAYERS
RUN python prepare_clip.py --clip_model "${CLIP_MODEL:-ViT-B/16-8bit}" --layers "${LAYERS:-10}" \
    && rm /cache/encoders/*/vision.safetensors


FROM serve AS prepared
COPY --from=encoder /cache/encoders /cache/encoders


FROM prepared AS demo
COPY models/baseline.joblib models/baseline.joblib
ENV MODEL_PATH=models/baseline.joblib \
    ALLOW_DEMO_MODEL=1


FROM ${KIND:-demo}
