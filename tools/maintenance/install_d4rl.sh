#!/usr/bin/env bash
# D4RL's own simulators (gym 0.23.1, d4rl 1.1, MuJoCo 2.1) in a virtual environment of their own, on Linux:
#   tools/maintenance/install_d4rl.sh [folder]      .venv-d4rl if none is given; PYTHON names the Python, python3.11 by default
#   .venv-d4rl/bin/python algorithms/awac_samg.py --config configs/awac/hopper_medium.yaml
# Needs a C compiler, Python's headers and the headers of OSMesa and OpenGL; as root on Debian it installs the latter.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
venv=${1:-$here/.venv-d4rl}
python=${PYTHON:-python3.11}

fail() { echo "error: $1" >&2; exit 1; }
[ "$(uname -s)" = Linux ] || fail "MuJoCo 2.1 is built here for Linux only; use d4rl_envs instead"
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2> /dev/null ||
    fail "$python is not Python 3.11, the version that this stack was tried on: name one with PYTHON=..."

# --- What the build needs
missing=()
command -v gcc > /dev/null || missing+=(gcc libc6-dev)
[ -e /usr/include/GL/osmesa.h ] || missing+=(libosmesa6-dev)
[ -e /usr/include/GL/gl.h ] || missing+=(libgl-dev)
if [ ${#missing[@]} -gt 0 ]; then
    [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null ||
        fail "first install the headers: apt-get install ${missing[*]} (or what your system calls them)"
    apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"
fi

# --- Python packages
"$python" -m venv "$venv"
"$venv/bin/pip" install -r "$here/requirements-d4rl.txt"
"$venv/bin/pip" install --no-deps d4rl==1.1
"$venv/bin/pip" install --no-deps --ignore-requires-python free-mujoco-py==2.1.6
"$venv/bin/pip" install --no-deps "$here/d4rl_envs"  # its own simulators, and their packages, are not needed here

# --- What no package brings
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Of mjrl, which is on no index, D4RL's hands use one class, and that is gym's.
mkdir -p "$site/mjrl/envs"
touch "$site/mjrl/__init__.py" "$site/mjrl/envs/__init__.py"
echo "from gym.envs.mujoco.mujoco_env import MujocoEnv" > "$site/mjrl/envs/mujoco_env.py"
# mujoco-py would build against an NVIDIA driver's libraries where it finds one; the simulation needs none.
echo 'import os; os.environ.setdefault("MUJOCO_PY_FORCE_CPU", "1")' > "$site/mujoco_py_cpu.pth"

# --- Compile, about a minute and a half, and try one task of each kind
PATH="$(cd "$venv" && pwd)/bin:$PATH" "$venv/bin/python" -c "import mujoco_py" ||
    fail "mujoco-py does not compile; its messages are above"
chmod a+rw "$site/mujoco_py/generated/mujocopy-buildlock"  # every import opens it, as whatever user
D4RL_SUPPRESS_IMPORT_ERROR=1 "$venv/bin/python" -c '
import d4rl_envs
for name in ("hopper-medium-v2", "antmaze-umaze-v2", "door-binary-v0"):
    env = d4rl_envs.make(name)
    assert isinstance(env, d4rl_envs.environments.OldStack)
    env.reset(seed=0)
    env.step(env.action_space.sample())'
echo "D4RL's stack is ready: $venv/bin/python"
