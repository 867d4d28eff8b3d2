"""The cache is called by no name that the installed transformers is to drop, not even inside transformers."""

import logging

import pytest
from transformers.utils import logging as transformers_logging


class _Messages(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture(autouse=True)
def _no_old_name_of_the_cache():
    """Of an output's old name transformers warns in its log alone; of an argument's see pyproject.toml."""
    transformers_logging.warning_once.cache_clear()  # each test hears it again
    logger, messages = logging.getLogger("transformers"), _Messages()
    logger.addHandler(messages)
    yield
    logger.removeHandler(messages)
    assert not [text for text in messages.texts if "past_key_values" in text]
