import logging

import pytest
from pydantic import ValidationError

from service.engine.settings import EngineSettings
from service.settings import load_settings


@pytest.mark.parametrize("name", ["decode_threads"])
def test_a_setting_of_an_earlier_version_works_and_says_that_it_is_gone(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_settings(flags={f"engine.{name}": "2"}, environment={})
        load_settings(environment={f"SAESERVE_ENGINE__{name.upper()}": "2"})
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all(message.startswith(f"the setting engine.{name} is gone: Does nothing") for message in messages)


def test_the_defaults_warn_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    EngineSettings()
    assert not caplog.records


def test_other_unknown_settings_are_errors() -> None:
    with pytest.raises(ValidationError, match="max_batch"):
        EngineSettings.model_validate({"max_batch": 2})
