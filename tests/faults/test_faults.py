"""Whatever happens to a run, the same command ends in the parameters of an undisturbed one, or says what to do.

`pytest tests/faults --faults 200 -s` tries more than the usual twenty, `--fault_seed 1` others.
"""

from pathlib import Path

import pytest
import tiny
from faults import harness


@pytest.mark.slow
def test_faults(tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture) -> None:
    data = tiny.prepare_domains(tmp_path / "data")
    words = ["--config=tests/faults/recipe.py:folder", f"--config.data_dir={data['data_dir']}"]
    words += [f"--config.{domain}.path={data[domain]}" for domain in ("source", "target")]
    faults, seed = request.config.getoption("--faults"), request.config.getoption("--fault_seed")
    with harness.Server(tmp_path) as server:
        campaign = harness.Campaign(server, words, tmp_path, seed)
        campaign.run(faults)
    with capsys.disabled():
        print(f"\n{campaign.report()}")
    assert campaign.counts["tried"] >= faults and campaign.counts["kill"]
