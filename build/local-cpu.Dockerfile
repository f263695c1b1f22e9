# syntax=docker/dockerfile:1
# The image for trying out without a GPU: the embedded engine, the shipped models, Triton from the nvidia-pytriton wheel,
# and Locust, which the load test in k8s/ runs too.
#     docker build -f build/local-cpu.Dockerfile -t roundhouse:local .
ARG IMAGE=python:3.12-slim-bookworm
FROM ${IMAGE}

WORKDIR /opt/roundhouse
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY scripts scripts
COPY src src
RUN export PIP_NO_CACHE_DIR=1 \
 && scripts/setup \
 && .venv/bin/python -m pip install --disable-pip-version-check \
        --constraint requirements.lock --editable '.[cpu,bench]'
COPY model_repository model_repository
COPY deployments deployments
COPY models models
COPY loadtests loadtests

# Triton is put together once, while the environment can be written to.
RUN .venv/bin/python -c "from roundhouse import tritonserver; tritonserver.find()" \
 && groupadd --gid 10001 roundhouse \
 && useradd --uid 10001 --gid 10001 --create-home roundhouse
ENV PATH=/opt/roundhouse/.venv/bin:$PATH
USER 10001:10001
