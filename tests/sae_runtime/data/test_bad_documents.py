"""Bad documents end a job, or are counted once each and told at its end."""

import warnings

import pytest

from sae_runtime.data.bad_documents import BadDocuments

pytestmark = pytest.mark.any_cpu


def test_stop_names_the_place_and_the_reason() -> None:
    bad = BadDocuments("stop")
    with pytest.raises(ValueError, match=r"^a\.jsonl:3: no text$"), bad.at("a.jsonl:3"):
        raise ValueError("no text")


def test_skip_counts_a_document_once_and_tells_the_first() -> None:
    bad = BadDocuments("skip")
    for _ in range(2):
        for line in range(5):
            bad.refuse(f"a:{line}", "no")
    told = r"^skipped 5 documents that cannot be used: a:0: no; a:1: no; a:2: no; \.\.\.$"
    with pytest.warns(UserWarning, match=told), bad:
        pass


def test_skipped_documents_are_told_when_the_job_fails_too() -> None:
    def job() -> None:
        with BadDocuments("skip") as bad:
            bad.refuse("a:1", "no")
            raise OSError("the disk is full")

    with pytest.warns(UserWarning, match="skipped 1 document that"), pytest.raises(OSError, match="disk"):
        job()


def test_nothing_is_told_of_clean_text() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with BadDocuments("skip") as bad:
            pass
    assert bad.summary == ""
