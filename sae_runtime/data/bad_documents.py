"""Documents that cannot be read or tokenized: they end a job, or are left out and counted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Literal, Self

from pydantic import Field

BadDocumentRule = Annotated[
    Literal["stop", "skip"],
    Field(
        description="What to do at a document that cannot be read or tokenized, such as a line that is not JSON, has "
        "no text or is not UTF-8: stop with its file and line, or skip it and tell at the end. A stopped job goes on "
        "with the same command, once the text is mended, or with skip."
    ),
]
"""The setting `bad_documents` of every job that reads text."""

_SHOWN = 3


@dataclass
class BadDocuments:
    """The documents that a job could not use. As a context, it warns (UserWarning) of them at the end of the job."""

    rule: BadDocumentRule = "stop"
    reasons: dict[str, str] = field(default_factory=dict)
    """Why each skipped document was not used, by its place. A document that is read in several passes is one."""

    def refuse(self, place: str, reason: object) -> None:
        """Takes note of a document.

        Raises:
            ValueError: the rule is stop; names place and reason.
        """
        if self.rule == "stop":
            raise ValueError(f"{place}: {reason}")
        self.reasons.setdefault(place, str(reason))

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Refuses the document of that place if a ValueError is raised within."""
        try:
            yield
        except ValueError as error:
            self.refuse(place, error)

    @property
    def summary(self) -> str:
        """How many documents were skipped, and the first of them; empty if none was."""
        if not self.reasons:
            return ""
        first = [f"{place}: {reason}" for place, reason in islice(self.reasons.items(), _SHOWN)]
        more = ["..."] if len(self.reasons) > _SHOWN else []
        count = f"{len(self.reasons):,} document{'s' * (len(self.reasons) > 1)}"
        return f"skipped {count} that cannot be used: {'; '.join(first + more)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.summary:
            warnings.warn(self.summary, stacklevel=2)
