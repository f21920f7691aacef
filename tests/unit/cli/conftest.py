"""One trained run and its export, which tests of commands read."""

import pytest
from support.trained import train_and_export


@pytest.fixture(scope="session")
def trained(corpora):
    return train_and_export(corpora / "commands")
