"""Runs that lose workers at random end as undisturbed ones; `python -m tests.launcher.kills 30` does more."""

from pathlib import Path

import pytest

from tests.launcher.kills import Campaign, table


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_killed_runs_end_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Bug: a moment at which a kill costs a line, a step or a checkpoint."""
    campaign = Campaign(tmp_path, seed=0)
    try:
        print(table(campaign.run(4)))
    finally:
        campaign.close()
