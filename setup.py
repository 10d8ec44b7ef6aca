"""Which folder holds which package. Everything else about the project is in pyproject.toml.

The map stands in for the links in torch_ps/. Those serve tools that read the tree itself (editors, mypy); a zip of the
tree, or a clone with core.symlinks=false, has short text files in their place.
"""

from setuptools import find_packages, setup

FOLDERS = ("common", "compare", "ps", "worker")

setup(
    package_dir={"torch_ps": "torch_ps", **{f"torch_ps.{folder}": folder for folder in FOLDERS}},
    packages=[
        "torch_ps",
        *(f"torch_ps.{name}" for name in find_packages(include=[*FOLDERS, *(f"{folder}.*" for folder in FOLDERS)])),
    ],
)
