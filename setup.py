"""Installs `keysync_jax` and the `keysync` command. Tests are not installed.

`configs`, `converters` and `data_pipeline` stand at the top of the repository and are installed inside the package, as
`keysync_jax.configs` and so on: under their own general names they would overwrite, or be overwritten by, other people's packages.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
FOLDERS = ("configs", "converters", "data_pipeline")
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "keysync_jax" / "version.py").read_text(encoding="utf-8")).group(1)

# Floors are versions the tests were run on; jax 0.10.2 is the newest for Python 3.11.
CORE = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "ml-collections>=1.1.0",
    "absl-py>=2.5",
    "etils[epath]>=1.15",
    "numpy>=2.2",
    "scipy>=1.17",
    "safetensors>=0.8.0",
    "huggingface-hub>=2.0",
    "av>=18.1",
    "pillow>=12.0",
    "opencv-python-headless>=4.11.0.86",
    "soundfile>=0.14",
    "soxr>=1.1",
    "rich>=15",
    # What mediapipe 0.10.21 itself needs at run time; the package is installed with --no-deps (see README).
    "protobuf<7",
    "attrs",
    "flatbuffers",
    "matplotlib",
]
# click, platformdirs and tqdm: what PySceneDetect needs at run time; it is installed with --no-deps too.
DATA = [
    "grain>=0.2.18", "array-record>=0.8.6", "tensorflow-datasets>=4.9.10", "importlib-resources", "apache-beam>=2.77",
    "click>=8", "platformdirs>=4", "tqdm>=4.70",
]  # fmt: skip
EXTRAS = {
    "cuda": ["jax[cuda13]"],
    # The hosts of a pod share no disk: data, weights and checkpoints lie on gs://, which etils reads through gcsfs.
    "tpu": ["jax[tpu]", "gcsfs>=2026.10.1"],
    "data": DATA,
    "torch": ["torch==2.13.0", "transformers>=5.17", "diffusers>=0.42", "numba", "scikit-image", "hydra-core", "iopath"],
    "web": ["gradio>=6.30"],
    "log": ["tensorboardX>=2.6.5"],
    "dev": ["pytest>=8", "setuptools>=77", "pytest-xdist", "ruff", "psutil", "tensorboardX>=2.6.5"],
}

setup(
    name="keysync-jax",
    version=VERSION,
    description="KeySync lip-sync in JAX: two-stage latent video diffusion that dubs real files",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["keysync_jax*"]),
        *(f"keysync_jax.{name}" for name in find_packages(include=[f"{folder}*" for folder in FOLDERS])),
    ],
    package_dir={f"keysync_jax.{folder}": folder for folder in FOLDERS},
    package_data={"keysync_jax": ["py.typed"], "keysync_jax.assets": ["demo/*", "demo/*/*", "demo/*/*/*"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["keysync = keysync_jax.cli.main:main"]},
)
