"""The tables of docs/scale.md are the script's, and follow the package's memory plan."""

import pytest
import scale
from harness import with_tables


@pytest.fixture(scope="module")
def made():
    return scale.tables()


def test_the_page_has_the_tables_that_the_script_makes(made):
    text = scale.PAGE.read_text(encoding="utf-8")
    assert text == with_tables(text, made)
    assert len(text.splitlines()) <= 150


@pytest.mark.parametrize(("name", "billions"), [("0.5B", 0.494), ("7B", 7.616), ("32B", 32.76), ("70B", 70.55)])
def test_shapes_have_the_weights_of_their_models(tmp_path, name, billions):
    assert scale.memory_of(name, tmp_path, 1)["parameters"] / 1e9 == pytest.approx(billions, rel=1e-3)


def test_slices_take_less_than_the_whole_and_more_than_their_share(tmp_path):
    large = scale.memory_of("70B", tmp_path, 1)
    assert large["weights"] / 8 < scale.sliced(large, 8) < scale.sliced(large, 2) < scale.whole(large)


def test_seconds_are_the_measured_ones_where_there_are_any():
    parameters, known = {"0.5B": 1.0, "1.5B": 2.0, "7B": 3.0, "70B": 30.0}, {"0.5B": (10.0, 1.0), "7B": (2.0, 1.0)}
    found = [scale.seconds_a_pair(name, parameters, known) for name in parameters]
    assert found == pytest.approx([0.1, 0.3, 0.5, 5.0])


def test_another_price_is_another_table(made):
    assert scale.tables(1.5)["money"] != made["money"] and "US$ at 1.5 an hour" in scale.tables(1.5)["money"]
