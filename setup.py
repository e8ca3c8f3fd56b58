"""Publish the top-level folders as one namespace package: cluster/ -> diptych.cluster."""

from setuptools import find_namespace_packages, setup

FOLDERS = ("cluster", "prefill", "decode", "kvtransfer", "agents", "kernels", "protos")
setup(
    packages=[f"diptych.{p}" for f in FOLDERS for p in find_namespace_packages(include=[f, f"{f}.*"])],
    package_dir={f"diptych.{f}": f for f in FOLDERS},
)
