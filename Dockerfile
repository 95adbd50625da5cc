# GPU image: PyTorch's own wheels bring CUDA, so the base needs none; the host needs the NVIDIA container toolkit.
#   docker build -t samg .
#   docker run --gpus all -v "$PWD/runs:/samg/runs" samg algorithms/awac_samg.py --config configs/awac/quickstart.yaml
FROM python:3.11-slim

RUN apt-get update && apt-get install -y --no-install-recommends libegl1 libgl1 libosmesa6 && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 samg && mkdir -p /samg/runs && chown -R samg /samg
WORKDIR /samg

# The dependencies are a layer of their own, so that a change of the code does not install them again.
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt

COPY --chown=samg . .
USER samg
ENV MUJOCO_GL=egl PYTHONUNBUFFERED=1
RUN python -c "import torch, gymnasium, mujoco, h5py, pyrallis, wandb" && python algorithms/awac_samg.py --help > /dev/null
ENTRYPOINT ["python"]
CMD ["algorithms/awac_samg.py", "--help"]
