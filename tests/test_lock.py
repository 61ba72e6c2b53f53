import os
from pathlib import Path

import pytest

from flowalign.checks import ConfigError
from flowalign.lock import locked


def test_a_folder_has_one_run_at_a_time(tmp_path: Path):
    with locked(tmp_path):
        says = rf"still going \(process {os.getpid()} on .*hydra\.run\.dir"
        with pytest.raises(ConfigError, match=says), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_lock_of_a_killed_process_is_open(tmp_path: Path):
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    with locked(tmp_path):
        pass
