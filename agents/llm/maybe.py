"""A result that may not be there: what a model answers when the text does not tell what it was asked for."""

from __future__ import annotations

from typing import Generic, Self, TypeVar

from pydantic import BaseModel, Field, model_validator

T = TypeVar("T")


class Maybe(BaseModel, Generic[T]):
    """For `output=llm.Maybe[User]`: the value, or why there is none, so that nothing has to be made up. True where it
    is known. The model says first whether it knows.
    """

    is_known: bool = Field(description="true if the value can be told, false if it cannot be found or is not certain")
    why: str = Field(description="one sentence: where the value is found, or what is missing")
    value: T | None = Field(description="the value; null if is_known is false")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.is_known and self.value is None:
            raise ValueError("is_known is true, and value is null: tell the value, or say is_known false and why")
        if not self.is_known and self.value is not None:
            raise ValueError("is_known is false, and there is a value: leave it null, or say is_known true")
        return self

    def __bool__(self) -> bool:
        return self.is_known

    def or_raise(self) -> T:
        """The value. Raises LookupError that says why there is none."""
        if self.value is None:
            raise LookupError(self.why)
        return self.value
