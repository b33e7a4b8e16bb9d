import math

import fedsim
from fedsim.strategies.fedbuff import FedBuff


def test_the_next_checkpoint_is_due_so_many_seconds_and_events_after_the_last_one():
    assert fedsim.CheckpointSchedule(seconds=60, events=7).after(1000.5, 20) == (1060.5, 27)
    assert fedsim.CheckpointSchedule(seconds=None, events=7).after(1000.5, 20) == (math.inf, 27)
    assert fedsim.CheckpointSchedule(seconds=60, events=None).after(1000.5, 20) == (1060.5, math.inf)


def written(tmp_path, keeps):
    class Keeping(FedBuff):
        def start(self, fed):
            super().start(fed)
            self.kept = keeps

    parts = []

    def watch(sim):
        parts.append(len(list((tmp_path / "run" / "events.parquet").glob("part-*"))))

    fedsim.simulate(
        Keeping(concurrency=4, buffer_size=2),
        fedsim.ScheduleOnly(),
        stop=fedsim.Stop(updates=40),
        clients=40,
        cohort=2,
        eval_every=0,
        out=tmp_path / "run",
        observer=watch,
        checkpoint=fedsim.CheckpointSchedule(seconds=None, events=1),
    )
    return max(parts)


def test_a_run_that_can_be_saved_writes_its_rows_with_every_checkpoint(tmp_path):
    assert written(tmp_path, keeps=1) >= 5


def test_a_run_that_cannot_be_saved_does_not_write_its_rows_whenever_a_checkpoint_would_have_been_due(tmp_path):
    assert written(tmp_path, keeps=open) == 0  # in less time than rows are left to wait for
