"""Publish the top-level folders as parts of one package: cluster/ -> diptych.cluster."""

from setuptools import find_namespace_packages, setup

# `diptych` itself is a package of one file, outside the folders: no __init__.py may lie directly in one of them.
ROOT = "cluster/package"
INSIDE = ROOT.replace("/", ".")
FOLDERS = ("cluster", "prefill", "decode", "kvtransfer", "agents", "kernels", "protos")
setup(
    packages=[
        "diptych",
        "diptych.llm",
        "diptych.llm.testing",
        *(
            f"diptych.{p}"
            for f in FOLDERS
            for p in find_namespace_packages(include=[f, f"{f}.*"], exclude=[INSIDE, f"{INSIDE}.*"])
        ),
    ],
    package_dir={"diptych": ROOT, **{f"diptych.{f}": f for f in FOLDERS}},
)
