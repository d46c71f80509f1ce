"""The maker of variants, shared by the whole run, so that expert folders are written once."""

import pytest

from conformance.cases import Maker


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("experts"))
