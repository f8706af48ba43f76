"""The blocking client follows from the asyncio one, or the generator says why not."""

from __future__ import annotations

import pytest

from protos.generate_sync import OUTPUT, SOURCE, translate


def test_the_blocking_client_is_fresh() -> None:
    assert translate(SOURCE.read_text()) == OUTPUT.read_text()


def test_a_phrase_that_is_gone_is_an_error() -> None:
    changed = SOURCE.read_text().replace("self._channel.close(None)", "self._channel.close(1.0)")
    with pytest.raises(SystemExit, match=r"found 0 times in aio\.py, expected once: self\._channel\.close"):
        translate(changed)


@pytest.mark.parametrize("left", ["# Calls from asyncio", "# Awaits a reply", "LOOP = asyncio.get_event_loop()"])
def test_a_word_of_asyncio_that_is_left_is_an_error(left: str) -> None:
    changed = SOURCE.read_text().replace("\n\nclass AsyncGeneration", f"\n\n{left}\n\n\nclass AsyncGeneration")
    with pytest.raises(SystemExit, match=r"of sync\.py still speaks of asyncio"):
        translate(changed)
