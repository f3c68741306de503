"""The lead of the signal to stop, compared with what a run measures."""

from raptr_ds.runtime.signal_lead import ShortLead, SignalLead


def measured(lead: float | None, save: float = 20.0) -> SignalLead:
    found = SignalLead(lead)
    for seconds in (90.0, 2.0, 2.0, 2.0):  # the first step compiles
        found.step_done(seconds)
    found.evaluated(12.0, 4)
    found.saved(save)
    return found


def test_two_steps_a_batch_and_two_saves_must_fit() -> None:
    needed = 2 * 2.0 + 3.0 + 2 * 20.0
    assert measured(needed).shortage() is None
    assert measured(46.0).shortage() == ShortLead(46.0, needed, 80)
    assert "--signal-lead 80" in str(measured(46.0).shortage())
    assert measured(1.0, save=0.001).shortage() == ShortLead(1.0, 7.002, 30)  # Slurm counts in tens of seconds
    assert measured(80.0).shortage() is None


def test_it_is_found_once_and_only_when_all_is_known() -> None:
    lead = measured(10.0)
    assert lead.shortage() is not None
    assert lead.shortage() is None
    assert measured(None).shortage() is None
    early = SignalLead(10.0)
    early.step_done(50.0)
    assert early.shortage() is None
    early.saved(1.0)
    assert early.shortage() is not None
