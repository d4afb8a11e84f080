"""Packages are named here because the kernels live in the top-level folder `kernels` and import as `attnx.kernels`."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["attnx", "attnx.*"]),
        "attnx.kernels",
        "attnx.kernels.cpu",
        "attnx.kernels.hopper",
        "attnx.kernels.inspect",
    ],
    package_dir={"attnx": "attnx", "attnx.kernels": "kernels"},
    package_data={
        "attnx.demo": ["weights.safetensors", "pair.safetensors"],
        "attnx.kernels.cpu": ["*.cpp", "*.h"],
        "attnx.models": ["table.json"],
        "attnx.page": ["*.html", "*.css", "*.js"],
    },
)
