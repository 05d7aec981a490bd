"""Do the ranks that a program starts hear signals, and does one that fails end them all?"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import PROMPT_S, environment

from cs336_systems.train import rank_launcher
from cs336_systems.train.rank_launcher import Ended, launch

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]

# Ranks that import nothing heavy; each says that it is there by a file.
SAYS = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n"
WAITS = "open(f'{sys.argv[1]}/{rank}', 'w').close()\ntime.sleep(60)\n"
SAVES = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"


def launched(code: str, folder: Path, num_ranks: int = 2) -> rank_launcher.Launched:
    return launch([sys.executable, "-c", SAYS + code, str(folder)], num_ranks, grace_s=0.5)


def signal_when_there(folder: Path, number: signal.Signals) -> threading.Thread:
    def send() -> None:
        while len(list(folder.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def test_ranks_are_told_who_they_are(tmp_path: Path) -> None:
    code = "names = ('LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'TORCHELASTIC_USE_AGENT_STORE')\n"
    code += "open(f'{sys.argv[1]}/{rank}', 'w').write(' '.join(os.environ[n] for n in names))\n"
    code += "print('port', os.environ['MASTER_PORT'])"
    done = launched(code, tmp_path, 3)
    assert done.stopped_by is None
    assert [ended.status for ended in done.ranks] == [0, 0, 0]
    for rank in range(3):
        assert (tmp_path / str(rank)).read_text() == f"{rank} 3 127.0.0.1 True"
    # Rank 0 prints to the caller's terminal, all others are kept.
    assert done.ranks[0].printed == ""
    assert done.ranks[1].printed == done.ranks[2].printed
    assert done.ranks[1].printed.startswith("port ")


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = launched("if rank: sys.exit('nothing at 42')\ntime.sleep(60)", tmp_path)
    assert time.monotonic() - begin < PROMPT_S
    assert done.ranks == [Ended(0, -signal.SIGKILL, ""), Ended(1, 1, "nothing at 42")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_rank_and_ending_well_is_success(
    tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    thread = signal_when_there(tmp_path, number)
    code = SAVES.replace("SIGTERM", number.name) + WAITS
    done = launched(code, tmp_path)
    thread.join()
    assert done.stopped_by == number
    assert [ended.status for ended in done.ranks] == [0, 0]
    assert signal.getsignal(number) is before


def test_a_rank_that_does_not_heed_the_signal_shows(tmp_path: Path) -> None:
    thread = signal_when_there(tmp_path, signal.SIGTERM)
    done = launched(f"if not rank:\n    {SAVES}{WAITS}", tmp_path)
    thread.join()
    assert done.stopped_by == signal.SIGTERM
    assert [ended.status for ended in done.ranks] == [0, -signal.SIGTERM]


def test_only_the_end_of_what_a_rank_printed_is_kept(tmp_path: Path) -> None:
    done = launched("print('x' * 100_000, 'last words')", tmp_path)
    assert done.ranks[1].printed.endswith("x last words")
    assert len(done.ranks[1].printed) <= rank_launcher._SHOWN_BYTES


TURN = """
from cs336_systems.parallel.environment import init_from_environment
from cs336_systems.train.rank_turn import RankTurn
import torch, torch.distributed as dist
turn = RankTurn()
assert turn.rank == rank
if rank == 0:
    time.sleep(0.3)
    open(f'{sys.argv[1]}/prepared', 'w').close()
    turn.say('train')
else:
    assert turn.hear() == 'train'
    assert os.path.exists(f'{sys.argv[1]}/prepared')
with init_from_environment('gloo'):
    total = torch.ones(1)
    dist.all_reduce(total)
    open(f'{sys.argv[1]}/{rank}', 'w').write(str(total.item()))
"""


def test_the_others_wait_for_rank_0_and_join_it_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"] + os.pathsep + "cs336-basics")
    done = launched(TURN, tmp_path)
    assert [ended.status for ended in done.ranks] == [0, 0], done.ranks[1].printed
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["2.0", "2.0"]
