"""The table of parameters is the config's."""

from pathlib import Path

from conftest import script

from dpo_tutorial import config

PAGE = Path(__file__).parents[2] / "docs" / "parameters.md"


def test_the_page_is_the_one_that_the_config_gives():
    assert PAGE.read_text(encoding="utf-8") == script("scripts/parameters.py").page()


def test_every_parameter_has_its_row():
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in config.known_parameters() if name != "PROFILE")
