"""Installs `keysync_jax` and the `keysync` command. Tests are not installed.

`configs`, `converters` and `data_pipeline` stand at the top of the repository and are installed inside the package, as
`keysync_jax.configs` and so on: under their own general names they would overwrite, or be overwritten by, other people's packages.
"""

from setuptools import find_packages, setup

FOLDERS = ("configs", "converters", "data_pipeline")

# Everything else about the package stands in pyproject.toml.
setup(
    packages=[
        *find_packages(include=["keysync_jax*"]),
        *(f"keysync_jax.{name}" for name in find_packages(include=[f"{folder}*" for folder in FOLDERS])),
    ],
    package_dir={f"keysync_jax.{folder}": folder for folder in FOLDERS},
    package_data={"keysync_jax": ["py.typed", "assets/*/*", "assets/*/*/*", "assets/*/*/*/*"]},
)
