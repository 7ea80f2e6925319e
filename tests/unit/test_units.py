"""Numbers as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestq.common.planner.plan import Figure
from ingestq.common.sizes import byte_size
from ingestq.producer.units import beside, duration, rounded, shown


def figure(value=None, low=None, high=None, unit="", exact=True) -> Figure:
    return Figure(name="x", value=value, low=low, high=high, unit=unit, formula="f", source="s", exact=exact)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (20, "20"),
        (63.284, "63.3"),
        (9364, "9,360"),
        (99_960, "100,000"),
        (392_345, "392k"),
        (999_700, "1000k"),
        (16.7e6, "16.7M"),
        (9.36e9, "9.36G"),
        (3.672e15, "3.67P"),
    ],
)
def test_a_number_has_three_digits(number, text):
    assert rounded(number) == text


@pytest.mark.parametrize(
    ("size", "text"), [(1000, "1,000 B"), (10_240, "10 KiB"), (100 * 2**20, "100 MiB"), (51.66 * 2**30, "51.7 GiB")]
)
def test_bytes_have_binary_units(size, text):
    assert byte_size(size, rounded) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1536, "1.50 KiB"), (3 * 2**20, "3.00 MiB"), (63.28 * 2**30, "63.28 GiB")]
)
def test_bytes_in_a_sentence_have_two_places(size, text):
    assert byte_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (2.5, "2.5 s"), (150, "2.5 min"), (5400, "90 min"), (9000, "2.5 h"), (864_000, "10 days")],
)
def test_durations_have_the_unit_that_suits_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (figure(386_912, unit="tokens"), "386,912 tokens"),
        (figure(386_912, unit="tokens", exact=False), "387k tokens"),
        (figure(low=120_000, high=160_000, unit="tokens/s", exact=False), "120k - 160k tokens/s"),
        (figure(low=1.5, high=3.0, unit="h", exact=False), "1.5 - 3 h"),
        (figure(143_360, unit="bytes/token"), "143,360 bytes/token"),
        (figure(104_857_600, unit="bytes/sequence"), "100 MiB/sequence"),
        (figure(1250, unit="ms"), "1.25 s"),
        (figure(low=8.154, high=12.96, unit="currency", exact=False), "8.15 - 12.96"),
        (figure(23, unit="sequences"), "23"),
        (figure(1.0, low=1, high=1, unit="1 is yes"), "met"),
        (figure(0.0, low=0, high=0, unit="1 is yes"), "missed"),
        (figure(low=0, high=1, unit="1 is yes"), "met at the best rate only"),
        (figure(low=5, high=5.001, unit="", exact=False), "5"),
        (figure(), "unknown"),
    ],
)
def test_a_figure_shows_the_precision_that_it_has(one, text):
    assert shown(one) == text


@given(st.text("ab ", min_size=1), st.integers(30, 60))
def test_text_stays_in_its_column(text, width):
    lines = beside("head  ", text, width).splitlines()
    assert lines[0].startswith("head")
    assert all(line.startswith(" " * 6) for line in lines[1:])
    assert "".join("".join(line[6:] for line in lines).split()) == "".join(text.split())
