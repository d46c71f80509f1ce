"""Server configurations that nobody should write: read or refused by name, soon.

`python -m fuzz.configs` tries 20,000.
"""

import pytest

from fuzz.configs import BOMB, run
from loramux.server.config import ServerConfigError, load_config


def test_five_hundred_mutated_configurations_are_read_or_refused_with_one_kind_of_error():
    result = run(500, seed=1)
    assert result["faults"] == []
    assert result["refused"] > 200 and result["read"] > 20


@pytest.mark.parametrize("key", ["limits", "base", "uploads", "model_name"])
def test_a_few_lines_that_stand_for_a_billion_entries_make_a_short_error(key, tmp_path):
    (tmp_path / "a.yaml").write_text(f"{BOMB}{key}: *l\n")
    with pytest.raises(ServerConfigError) as error:
        load_config(tmp_path / "a.yaml")
    assert len(str(error.value)) < 5000


@pytest.mark.parametrize(
    "value", ["2001-99-99", "!!int x", "!!timestamp x", "9" * 5000, "[" * 1200, "!!int ''"]
)
def test_what_yaml_itself_trips_over_is_a_wrong_configuration(value, tmp_path):
    (tmp_path / "a.yaml").write_text(f"base: pico\nport: {value}\n")
    with pytest.raises(ServerConfigError, match="YAML"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("base: pico\n")
    with pytest.raises(ServerConfigError, match="YAML"):
        load_config(tmp_path / "b.yaml", [f"port={value}"])


@pytest.mark.parametrize(
    "text",
    [f"base: {'a' * 5000}", "base: x\nregistry: {root: ~who-is-that/x}"],
    ids=["long", "home"],
)
def test_a_folder_that_cannot_be_is_a_wrong_configuration(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ServerConfigError, match="cannot be"):
        load_config(tmp_path / "a.yaml")
