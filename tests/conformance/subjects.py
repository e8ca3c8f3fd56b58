"""The models of the matrix: a tiny checkpoint of every family, loaded once with its reference."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from reference import Reference

from diptych.kernels.model import LoadedModel, load_model
from diptych.kernels.testing import ARCHITECTURES


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model in float32, and what its tokens must be."""

    name: str
    model: LoadedModel
    reference: Reference


@cache
def subject_of(architecture: str) -> Subject:
    """A name of ARCHITECTURES; the same object every time."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = ARCHITECTURES[architecture].make(Path(scratch) / architecture)
        return Subject(architecture, load_model(folder, dtype="float32"), Reference(folder))
