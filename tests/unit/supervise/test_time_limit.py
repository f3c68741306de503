"""Time limits as Slurm takes and prints them, and those that leave a start no time."""

import pytest

from raptr_ds.errors import ConfigError
from raptr_ds.supervise.time_limit import limit_seconds, short_limit


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:0:1", 7201),
        ("2-0", 172800),
        ("1-1:1", 90060),
        ("0-0:0:5", 5),
        ("infinite", None),
        ("0", None),  # scontrol shows UNLIMITED
        ("0-0", None),
        ("UNLIMITED", None),
        ("1-02:03:04", 93784),
    ],
)
def test_time_limits_are_slurm_s(text: str, seconds: int | None) -> None:
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "Partition_Limit", "2h", "1:2:3:4", "-1", "1:", "2-", "1-1:1:1:1", "$(x)"])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a time limit"):
        limit_seconds(text)


def test_a_limit_of_twice_the_lead_is_too_short() -> None:
    assert short_limit(241, 120) is None
    problem = short_limit(240, 120)
    assert problem is not None
    for part in ("240 s", "120 s before its end", "trains 120 s at most", "--time=20", "48 s"):
        assert part in problem
    assert "trains 0 s at most" in (short_limit(60, 120) or "")
