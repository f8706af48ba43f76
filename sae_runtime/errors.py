"""Errors that callers of the library tell apart; each message says what was found and what was expected."""


class DictionaryFormatError(ValueError):
    """A dictionary's files are unknown, truncated, of the wrong shape, or fail their checksum."""


class FingerprintMismatch(DictionaryFormatError):
    """A dictionary was trained on another backbone or tokenizer than the one at hand; names both."""


class UnknownDictionary(KeyError):
    """No dictionary has that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class CatalogueError(ValueError):
    """A catalogue of features or a file of labels is missing, damaged, or of another dictionary; names the file."""


class EditConflict(ValueError):
    """Two edits write the same feature at the same positions; names both."""
