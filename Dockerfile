# syntax=docker/dockerfile:1
# The GPU environment of requirements/gpu.lock; on the host only the driver and NVIDIA's container
# toolkit are needed.
#
#   docker build -t rl_lora .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/runs" rl_lora \
#     accelerate launch --num_processes 8 -m rl_lora train deepmath_qwen3_8b run.output_dir=/runs
FROM python:3.12-slim-bookworm

# Triton and the compiler of PyTorch call a C++ compiler while a job runs.
# hadolint ignore=DL3008 # Debian's own versions; what matters is pinned by the lock
RUN apt-get update \
  && apt-get install -y --no-install-recommends g++ make \
  && rm -rf /var/lib/apt/lists/*

# The base image is not NVIDIA's, so that the toolkit has to be asked for the driver's libraries.
ENV NVIDIA_VISIBLE_DEVICES=all \
  NVIDIA_DRIVER_CAPABILITIES=compute,utility \
  PATH=/opt/rl_lora/.venv/bin:$PATH

WORKDIR /opt/rl_lora
COPY LICENSE Makefile README.md pyproject.toml setup.py ./
COPY requirements requirements
COPY configs configs
COPY rewards rewards
COPY rl_lora rl_lora
RUN --mount=type=cache,target=/root/.cache/pip make EXTRA=gpu

CMD ["rl-lora", "--help"]
