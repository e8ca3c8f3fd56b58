"""What the floors import is installed with them. Guards against a package that only the tests' environment has."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from sources import FLOORS, ROOT, imported_modules, python_files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SERVING_EXTRAS = ("gpu", "xgrammar", "google", "aws", "litellm", "mcp")
SHARED = {"google": {"protobuf", "google-auth"}}  # by several distributions
PART_OF = {"pydantic_core": {"pydantic"}}  # which pins it


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


DECLARED = {name_of(one) for one in PROJECT["dependencies"]}
DECLARED |= {name_of(one) for extra in SERVING_EXTRAS for one in PROJECT["optional-dependencies"][extra]}
FOREIGN = {
    top
    for path in python_files(*FLOORS)
    for _, module in imported_modules(path)
    if (top := module.partition(".")[0]) != "diptych" and top not in sys.stdlib_module_names
}


@pytest.mark.parametrize("module", sorted(FOREIGN))
def test_what_is_imported_is_declared(module: str) -> None:
    known = packages_distributions().get(module, [module])  # an extra that is not installed has its module's name
    found = SHARED.get(module) or PART_OF.get(module) or {name_of(one) for one in known}
    assert found & DECLARED, f"pyproject.toml names none of {sorted(found)}"
