# Predicts without network: docker run --network none -v images:/in -v out:/out IMAGE
# with a checkpoint in /in/checkpoint and the images in /in/images; writes /out/sub.csv.
FROM python:3.11-slim-bookworm AS build
ARG SOURCE_DATE_EPOCH
RUN python -m venv /venv
COPY requirements.txt pyproject.toml README.md LICENSE /app/
RUN sed '/^-e /d' /app/requirements.txt > /tmp/pins.txt \
    && /venv/bin/pip install --no-cache-dir --requirement /tmp/pins.txt
WORKDIR /app
COPY cli cli
COPY data data
COPY models models
COPY attacks attacks
COPY training training
COPY inference inference
COPY submission submission
RUN /venv/bin/pip install --no-cache-dir --no-deps --editable .

FROM python:3.11-slim-bookworm
COPY --from=build /venv /venv
COPY --from=build /app /app
WORKDIR /app
USER 10001:10001
ENTRYPOINT ["/venv/bin/python", "inference/predict.py"]
CMD ["--checkpoint", "/in/checkpoint", "--images", "/in/images", "--out", "/out/sub.csv"]
