# Predicts without network, read-only, as nobody in particular:
#   docker build --tag robust-submission .
#   docker run --rm --network none --read-only --tmpfs /tmp --cap-drop ALL \
#       -v "$PWD/runs/quickstart:/checkpoint:ro" -v "$PWD/images:/in:ro" -v "$PWD/out:/out" \
#       robust-submission
# writes out/sub.csv. User 10001 must be able to write out, or give --user "$(id -u)".
# Options of predict.py go after the image's name, and override its own. Trains with:
#   docker run --rm --entrypoint train -v "$PWD/out:/out" robust-submission --output /out/run
#
# The default wheels are PyPI's, made for CUDA; they run on a CPU as well. For the small CPU wheels:
#   make requirements.cpu.lock
#   docker build --build-arg LOCK=requirements.cpu.lock \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# A release pins FROM by digest: --build-arg BASE=python:3.11-slim-bookworm@sha256:...
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# Given, it makes every .pyc the same in each build.
ARG SOURCE_DATE_EPOCH=315532800
ARG LOCK=requirements.lock
ARG TORCH_INDEX=
RUN python -m venv /venv
COPY ${LOCK} /tmp/lock.txt
RUN /venv/bin/pip install --no-cache-dir --no-deps --require-hashes \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --requirement /tmp/lock.txt

FROM ${BASE}
COPY --from=build /venv /venv
WORKDIR /app
COPY LICENSE ./
COPY robust_submission robust_submission
COPY data data
COPY training training
COPY inference inference
COPY submission submission
RUN printf '#!/bin/sh\nexec accelerate launch /app/training/train.py "$@"\n' > /usr/local/bin/train \
    && chmod 755 /usr/local/bin/train
ENV PATH=/venv/bin:$PATH PYTHONPATH=/app HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib \
    HF_HUB_OFFLINE=1 NO_ALBUMENTATIONS_UPDATE=1
USER 10001:10001
ENTRYPOINT ["python", "/app/inference/predict.py", \
    "--checkpoint", "/checkpoint", "--images", "/in", "--out", "/out/sub.csv"]
