"""kill -9 of a random worker at random moments, again and again; the run comes to its end all the same.

`python -m tests.launcher.kills 30 [SEED]` prints each kill as it happens and then the table; exit code 0
where every run that was killed ended with the lines and the weights of an undisturbed one.

Half of the kills come at any time, half when a worker has got to a place that is drawn and stays there for a
moment, as some places last less than a millisecond. The workers write where they are into a file, with two
entries: of the training, and of the save in the background.
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .commands import Command, Commands
from .conftest import MARK, SMALL, lines, made_up_documents, write_source
from .test_whole_runs import run, start_run

RANKS = 2
EVERY = 4  # steps between saves, none of them at the mark
PLACE_BYTES = 80
STAY_SECONDS = 0.1
START_SECONDS = 240.0
# Runs in each worker first.
WATCHED = f"""
import os, time
from openmoe.checkpoint import course, manager
from openmoe.launcher import train
from openmoe.train import loop, metrics

def write_places(path, target):
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def note(entry, text):
        os.pwrite(file, text.encode()[:{PLACE_BYTES}].ljust({PLACE_BYTES}), entry * {PLACE_BYTES})
        if target and target in text:
            time.sleep({STAY_SECONDS})

    def around(owner, name, before, after=None):
        original = getattr(owner, name)
        def call(*args, **kwargs):
            note(0, before())
            result = original(*args, **kwargs)
            if after:
                note(0, after())
            return result
        setattr(owner, name, call)

    def in_save(name):
        original = getattr(course.Course, name)
        def call(self, place):
            note(1, "save: " + place)
            return original(self, place)
        setattr(course.Course, name, call)

    step = [0]
    def next_step():
        step[0] += 1
        return f"step {{step[0]}}: update"

    fit = loop.fit
    def begin(run, stop):
        step[0] = run.step
        note(0, f"step {{run.step}}: training begins")
        result = fit(run, stop)
        note(0, "the end")
        return result
    train.fit = begin
    note(0, "start")
    note(1, "")
    around(loop, "train_step", next_step, lambda: f"step {{step[0]}}: after the update")
    at = lambda what: lambda: f"step {{step[0]}}: {{what}}"
    around(loop, "validate", at("validation"), at("after validation"))
    around(train, "_save", at("save begins"), at("save goes on"))
    in_save("at")
    in_save("go_on")
    written = manager.CheckpointManager._write
    def write(self, *args, **kwargs):
        written(self, *args, **kwargs)
        note(1, "")
    manager.CheckpointManager._write = write
"""
# What a worker's file has to say before a kill that is meant for a place.
TARGETS = [
    "training begins",
    ": update",
    "after the update",
    "validation",
    "save begins",
    f"{EVERY}: after the update",
    "save: copying",
    "save: writing",
    "save: syncing",
    "save: finishing",
    "save: renaming",
    "save: deleting",
    "save: waiting",
]
AT_THE_MARK = [f"step {MARK}: after the update", f"step {MARK}: validation", f"step {MARK}: after validation"]
STEPS = 24


# Of a save, by how the place begins.
STAGES = {
    "copying": "copying",
    "making": "making the folder",
    "writing": "writing",
    "syncing": "writing",
    "finishing": "manifest and renaming",
    "renaming": "manifest and renaming",
    "deleting": "deleting old ones",
}


@dataclass(frozen=True)
class Kill:
    life: int
    rank: int
    training: str
    save: str

    @property
    def place(self) -> str:
        """One of few words for the table."""
        step, _, what = self.training.removeprefix("step ").partition(": ")
        if self.save:
            begins = self.save.removeprefix("save: ")
            stage = next((of for word, of in STAGES.items() if begins.startswith(word)), "waiting for others")
            return f"in a save, {stage}"
        if what == "validation":
            return "in validation at the mark" if step == str(MARK) else "in validation"
        if step == str(MARK) and what.startswith("after"):
            return "at the mark, outside validation"
        if what in ("save begins", "save goes on") or (
            step.isdecimal() and int(step) % EVERY == 0 and what.startswith("after")
        ):
            return "before a save, its update done"
        if step.isdecimal() and int(step) % EVERY == 1 and int(step) > 1:
            return "after a save, in the next step"
        return {"start": "at the start of the processes", "the end": "at the end"}.get(
            self.training, "in other steps"
        )


class Campaign:
    """Runs that are killed, in `folder`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.draw = random.Random(seed)
        self.commands = Commands(folder)
        for name, documents in (
            ("alpha", made_up_documents(1, 60, 80)),
            ("beta", made_up_documents(2, 20, 300)),
        ):
            write_source(folder / "corpus" / name, documents)
        start = time.monotonic()
        run(self.commands, RANKS, self.arguments("undisturbed"))
        self.seconds = time.monotonic() - start
        self.expected = self.outcome("undisturbed")

    def arguments(self, name: str) -> list[str]:
        return [
            *SMALL,
            f"run.dir={self.folder / name}",
            f"data.root={self.folder / 'corpus'}",
            f"data.cache_dir={self.folder / 'cache'}",
            f"train.steps={STEPS}",
            "train.validate_every_steps=5",
            f"checkpoint.every_steps={EVERY}",
            "checkpoint.keep=2",
            "checkpoint.resume=auto",
            "parallel.expert=2",
        ]

    def outcome(self, name: str) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
        """Lines of the run, and its last tensors."""
        last = max((self.folder / name / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))
        return lines(self.folder / name), {
            path.name: path.read_bytes() for path in last.glob("*.safetensors")
        }

    def kill_one(self, name: str, life: int) -> Kill | None:
        """Starts the run and kills one of its workers; None where it came to its end before."""
        places = [self.folder / f"place_{rank}" for rank in range(RANKS)]
        for path in places:
            path.write_bytes(b"")
        rank = self.draw.randrange(RANKS)
        metrics = self.folder / name / "metrics.jsonl"
        before_mark = not metrics.exists() or metrics.read_bytes().count(b"\n") < MARK
        targets = [self.draw.choice(TARGETS), *([self.draw.choice(AT_THE_MARK)] if before_mark else [])]
        target = self.draw.choice([None, self.draw.choice(targets)])

        def prelude(of: int) -> str:
            stays = target if of == rank else None
            return f"{WATCHED}\nwrite_places({str(places[of])!r}, {stays!r})"

        started = start_run(self.commands, RANKS, self.arguments(name), prelude_of=prelude)
        victim = started[rank]
        if target is None:
            victim.sleep(self.draw.uniform(0.1, 0.6) * self.seconds)
        else:
            self._await(victim, places[rank], target)
            victim.sleep(self.draw.choice([0, self.draw.uniform(0, 2 * STAY_SECONDS)]))
        killed = not victim.exited
        victim.kill(signal.SIGKILL)
        text = places[rank].read_bytes().decode()
        good = [0, 3]
        if killed and text.startswith("start "):  # nobody else knows it yet: a launcher ends the others
            started[1 - rank].sleep(1)
            started[1 - rank].kill(signal.SIGKILL)
            good += [-signal.SIGKILL]
        codes = [command.wait(START_SECONDS) for command in started]
        if codes == [0] * RANKS:
            return None
        if codes[rank] != -signal.SIGKILL or not killed or codes[1 - rank] not in good:
            raise AssertionError(f"{codes}: " + "".join(command.stderr for command in started))
        return Kill(life, rank, text[:PLACE_BYTES].strip(), text[PLACE_BYTES:].strip())

    def _await(self, victim: Command, path: Path, target: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        file = os.open(path, os.O_RDONLY)
        try:
            while target.encode() not in os.pread(file, 2 * PLACE_BYTES, 0) and time.monotonic() < deadline:
                if victim.exited:
                    return
                time.sleep(0.0005)
        finally:
            os.close(file)

    def run(self, kills: int) -> list[Kill]:
        """Runs from start to end with kills on the way, until there are so many."""
        found: list[Kill] = []
        life = 0
        while len(found) < kills:
            life += 1
            name, restarts, ended = f"life_{life}", 0, False
            while not ended and len(found) < kills and restarts < 12:
                kill = self.kill_one(name, life)
                restarts += 1
                ended = kill is None
                if kill is not None:
                    found.append(kill)
                    where = f"{kill.place}: {kill.training}; {kill.save}".rstrip("; ")
                    print(f"{len(found):3} life {life} rank {kill.rank} {where}", flush=True)
            if not ended:
                run(self.commands, RANKS, self.arguments(name))
            wanted, got = self.expected, self.outcome(name)
            assert got[0] == wanted[0], f"{name}: other lines than the undisturbed run"
            assert got[1] == wanted[1], f"{name}: other weights than the undisturbed run"
            print(f"    life {life}: the lines and the weights of the undisturbed run", flush=True)
        return found

    def close(self) -> None:
        self.commands.close()


def table(kills: list[Kill]) -> str:
    counted = Counter(kill.place for kill in kills)
    rows = [f"| {place} | {count} |" for place, count in sorted(counted.items(), key=lambda item: -item[1])]
    return "\n".join(
        ["| killed | times |", "|---|---|", *rows, f"| all, {len(counted)} places | {len(kills)} |"]
    )


def main(kills: int, seed: int) -> int:
    """Exit code 1 where so many kills hit too few places to say much."""
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), seed)
        try:
            found = campaign.run(kills)
        finally:
            campaign.close()
    print(table(found), flush=True)
    return 1 if kills >= 30 and len({kill.place for kill in found}) < 5 else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
