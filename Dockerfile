# GPU image: PyTorch's own wheels bring CUDA 13, so the base needs none; the host needs the NVIDIA container toolkit and
# a driver of 580 or newer.
#   docker build -t samg .          with --build-arg TOOLS=1 for sweeps, reports and films, too
#   docker run --gpus all -v "$PWD/runs:/samg/runs" samg algorithms/awac_samg.py --device cuda --config configs/awac/quickstart.yaml
# With D4RL's own simulators (gym, mujoco-py) in the place of Gymnasium's:
#   docker build --target d4rl -t samg-d4rl .
# bookworm: the gcc of Debian 13 takes mujoco-py's pointers for errors
FROM python:3.11-slim-bookworm AS d4rl

RUN useradd --create-home --uid 1000 samg && mkdir -p /samg/runs && chown -R samg /samg
WORKDIR /samg

COPY requirements-d4rl.txt .
COPY tools/maintenance/install_d4rl.sh tools/maintenance/
COPY d4rl_envs d4rl_envs
RUN tools/maintenance/install_d4rl.sh /opt/d4rl && rm -rf /var/lib/apt/lists/* /root/.cache d4rl_envs

COPY --chown=samg . .
USER samg
ENV PYTHONUNBUFFERED=1
RUN /opt/d4rl/bin/python -c "import torch, gym, mujoco_py, d4rl_envs" && /opt/d4rl/bin/python algorithms/awac_samg.py --help > /dev/null
ENTRYPOINT ["/opt/d4rl/bin/python"]
CMD ["algorithms/awac_samg.py", "--help"]


# The default: the last stage is what "docker build" makes.
FROM python:3.11-slim

# g++ for torch.compile (--compile), the other three for rendering
RUN apt-get update && apt-get install -y --no-install-recommends g++ libegl1 libgl1 libosmesa6 \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 samg && mkdir -p /samg/runs && chown -R samg /samg
WORKDIR /samg

# The dependencies are a layer of their own, so that only a change of d4rl_envs installs them again.
COPY requirements.txt .
COPY d4rl_envs d4rl_envs
RUN pip install --no-cache-dir -r requirements.txt && rm -rf d4rl_envs
ARG TOOLS=
COPY requirements-dev.txt .
RUN if [ -n "$TOOLS" ]; then grep -v "^-r" requirements-dev.txt > /tmp/tools.txt && pip install --no-cache-dir -r /tmp/tools.txt; fi

COPY --chown=samg . .
USER samg
ENV MUJOCO_GL=egl PYTHONUNBUFFERED=1
RUN python -c "import torch, gymnasium, mujoco, h5py, pyrallis, wandb, d4rl_envs.adroit" && python algorithms/awac_samg.py --help > /dev/null
ENTRYPOINT ["python"]
CMD ["algorithms/awac_samg.py", "--help"]
