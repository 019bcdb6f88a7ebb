# One file, a target per service:  docker build --target rest_facade -t trivium-rest-facade .
# The serving targets share one environment, which has no PyTorch; `export` has it.

ARG PYTHON=python:3.12-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/trivium
# Locked dependencies first, so that changes to the code do not download them again.
COPY requirements.lock ./
RUN /opt/trivium/bin/pip install --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY trivium trivium
COPY rest_facade rest_facade
COPY tokenizer_svc tokenizer_svc
COPY generator_svc generator_svc
RUN /opt/trivium/bin/pip install --no-deps .

# The libraries of CUDA and of the exporter are not locked; they follow the ranges in pyproject.toml.
FROM build AS build-cuda
RUN /opt/trivium/bin/pip install '.[cuda]'

FROM build AS build-export
# PyTorch's own index has CPU-only builds, without several gigabytes of CUDA libraries.
RUN /opt/trivium/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu '.[export]'

FROM ${PYTHON} AS runtime
LABEL org.opencontainers.image.title=trivium \
      org.opencontainers.image.version=0.1.0 \
      org.opencontainers.image.licenses=Apache-2.0
# Caches are written to HOME, which is writable even with a read-only root file system and any user.
# ONNX Runtime's telemetry is off.
ENV PATH=/opt/trivium/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp ORT_DISABLE_TELEMETRY=1
RUN useradd --uid 10001 --no-create-home --home-dir /tmp trivium \
    && install --directory --owner 10001 /models
USER 10001
WORKDIR /tmp
STOPSIGNAL SIGTERM

FROM runtime AS serving
COPY --from=build /opt/trivium /opt/trivium

FROM serving AS rest_facade
ENV TRIVIUM_FACADE_HOST=0.0.0.0
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=10s --start-period=30s \
    CMD ["sh", "-c", "python -m trivium.cli.probe http${TRIVIUM_FACADE_TLS_CERT_FILE:+s}://127.0.0.1:8000/health"]
CMD ["python", "-m", "rest_facade"]

FROM serving AS tokenizer_svc
# The variable's name contains TOKEN, but it is not a secret.
# hadolint ignore=DL3064
ENV TRIVIUM_TOKENIZER_HOST=0.0.0.0
EXPOSE 50051 9051
HEALTHCHECK --interval=5s --timeout=10s --start-period=30s \
    CMD ["python", "-m", "trivium.cli.probe", "http://127.0.0.1:9051/healthz"]
CMD ["python", "-m", "tokenizer_svc"]

FROM serving AS generator_svc
# Huge pages for the weights, as with `trivium up`.
ENV TRIVIUM_GENERATOR_HOST=0.0.0.0 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
EXPOSE 50052 9052
HEALTHCHECK --interval=5s --timeout=10s --start-period=120s \
    CMD ["python", "-m", "trivium.cli.probe", "http://127.0.0.1:9052/healthz"]
CMD ["python", "-m", "generator_svc"]

FROM generator_svc AS generator_svc-cuda
COPY --from=build-cuda /opt/trivium /opt/trivium
ENV TRIVIUM_GENERATOR_DEVICE=cuda

# Exports a model into the volume /models; downloads go to /tmp.
FROM runtime AS export
COPY --from=build-export /opt/trivium /opt/trivium
ENV HF_HOME=/tmp/huggingface
VOLUME /models
ENTRYPOINT ["trivium", "export"]
CMD ["smollm2-135m-instruct", "--out", "/models/smollm2-135m-instruct"]
