import pytest

from switchtitan.regions import observe_regions, region, stop_observing_regions


class Record:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin(self, name: str) -> None:
        self.calls.append(name)

    def end(self) -> None:
        self.calls.append("end")


@pytest.fixture
def record():
    observer = Record()
    observe_regions(observer)
    yield observer
    stop_observing_regions(observer)


def test_an_observer_sees_the_begin_and_the_end_of_nested_regions(record):
    with region("outer"), region("inner"):
        record.calls.append("work")
    assert record.calls == ["outer", "inner", "work", "end", "end"]


def test_a_region_ends_with_an_error(record):
    with pytest.raises(ValueError, match="within"), region("fails"):
        raise ValueError("within")
    assert record.calls == ["fails", "end"]


def test_an_observer_that_starts_or_stops_inside_a_region_sees_pairs(record):
    late = Record()
    with region("first"):
        observe_regions(late)
        stop_observing_regions(record)
        with region("second"):
            pass
    stop_observing_regions(late)
    assert record.calls == ["first", "end"]
    assert late.calls == ["second", "end"]


def test_an_unobserved_region_is_one_object_for_all_names():
    assert region("a") is region("b")
