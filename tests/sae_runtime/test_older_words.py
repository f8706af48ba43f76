"""Names of other projects lead to ours."""

import subprocess
import sys

import pytest

import sae_runtime
from sae_runtime.older_words import BACKBONE, DICTIONARY, SITE, TRAINING, OurWord, our_word


@pytest.mark.parametrize(
    ("older", "ours"),
    [
        ("Autoencoder", DICTIONARY),
        ("SAE", DICTIONARY),
        ("load_pretrained", DICTIONARY),
        ("from_pretrained", DICTIONARY),
        ("HookedTransformer", BACKBONE),
        ("--model-path", BACKBONE),
        ("--hook-point", SITE),
        ("--layer", SITE),
        ("SAETrainingRunner", TRAINING),
    ],
)
def test_an_older_word_in_any_spelling(older: str, ours: OurWord) -> None:
    assert our_word(older) is ours
    assert our_word(older.lower()) is ours


def test_our_own_names_are_none_of_theirs() -> None:
    assert [name for name in sae_runtime.__all__ if our_word(name)] == []
    assert our_word("anything") is None


def test_import_of_an_older_name_says_what_to_use() -> None:
    with pytest.raises(ImportError, match=r"sae_runtime has no Autoencoder; use load_dictionary\(path_or_name\)"):
        from sae_runtime import Autoencoder  # noqa: F401
    with pytest.raises(ImportError, match=r"use Backbone\.load\(path_or_name\)"):
        _ = sae_runtime.HookedTransformer
    with pytest.raises(AttributeError, match="module 'sae_runtime' has no attribute 'nonsense'"):
        _ = sae_runtime.nonsense


def test_files_of_the_package_are_not_taken_for_older_words() -> None:
    code = (
        "import importlib, pkgutil, sae_runtime\n"
        "for module in pkgutil.iter_modules(sae_runtime.__path__):\n"
        "    assert hasattr(sae_runtime, module.name) in (True, False)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hints_need_no_torch() -> None:
    code = (
        "import sys\n"
        "try: from sae_runtime import SAE\n"
        "except ImportError as error: assert 'load_dictionary' in str(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
