# The service as a CPU image without torch.
#
#   docker build -t detector .                  the shipped encoder and model: a demonstration, and it says so
#   docker run --rm -p 8000:8000 --read-only detector
#
#   docker build -t detector --build-arg CLIP_MODEL=ViT-L/14 .      that encoder, prepared; the model is yours:
#   docker run --rm -p 8000:8000 --read-only -v "$PWD/model.joblib:/models/model.joblib:ro" detector
#
#   docker build -t detector --target serve .   neither: mount an encoder prepared elsewhere as well, with
#                                               -v "$HOME/.cache/clip:/cache:ro"
#
# Add --build-arg CODE_COMMIT="$(git rev-parse HEAD)": there is no git in the image to ask. BuildKit (the default
# since Docker 23) builds only the stages that are needed, so the demonstration never installs torch.

ARG CLIP_MODEL
# the last stage: `prepared` where CLIP_MODEL is given, else `demo`
ARG KIND=${CLIP_MODEL:+prepared}


FROM python:3.11-slim AS serve
# MODEL_PATH and CLIP_CACHE: where a model and prepared encoders are mounted
ENV PYTHONDONTWRITEBYTECODE=1 \
    HOST=0.0.0.0 \
    PORT=8000 \
    MODEL_PATH=/models/model.joblib \
    CLIP_CACHE=/cache
WORKDIR /app
COPY requirements-serve.txt ./
RUN python -m pip install --no-cache-dir -r requirements-serve.txt
COPY app.py classify.py common.py dataset.py encoders.py engine.py golden.py gunicorn.conf.py imaging.py layers.py metrics.py model.py \
    prepare_clip.py provenance.py quantize.py settings.py signing.py telemetry.py together.py ./
COPY static static
COPY templates templates
ARG CODE_COMMIT=unknown
ENV CODE_COMMIT=${CODE_COMMIT}
# a number, so that Kubernetes can tell that it is not root
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/healthz')"]
CMD ["python", "app.py"]


# torch and OpenAI's weights: gigabytes that end here
FROM python:3.11-slim AS encoder
ENV CLIP_CACHE=/cache
WORKDIR /app
COPY requirements.txt requirements-serve.txt ./
RUN python -m pip install --no-cache-dir -r requirements.txt
COPY common.py dataset.py encoders.py imaging.py layers.py prepare_clip.py quantize.py ./
ARG CLIP_MODEL
# vision.safetensors is CUDA's form of the same weights
RUN python prepare_clip.py --clip_model "${CLIP_MODEL}" && rm /cache/encoders/*/vision.safetensors


FROM serve AS prepared
COPY --from=encoder /cache/encoders /cache/encoders


FROM serve AS demo
COPY models/tiny models/tiny
COPY models/baseline.joblib models/baseline.joblib
ENV MODEL_PATH=models/baseline.joblib \
    ALLOW_DEMO_MODEL=1


FROM ${KIND:-demo}
