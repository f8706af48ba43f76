import logging

import pytest
from pydantic import ValidationError

from service.engine.settings import GONE, EngineSettings


@pytest.mark.parametrize("name", GONE)
def test_a_setting_that_is_gone_is_left_out_with_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        settings = EngineSettings.model_validate({name: 2, "torch_threads": 3})
    assert settings == EngineSettings(torch_threads=3)
    assert [record.getMessage() for record in caplog.records] == [
        f"the setting engine.{name} is gone and does nothing; remove it: {GONE[name]}"
    ]


def test_other_unknown_settings_are_errors() -> None:
    with pytest.raises(ValidationError, match="max_batch"):
        EngineSettings.model_validate({"max_batch": 2})
