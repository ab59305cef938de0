"""What can't be run ends with exit code 2 and one line that says why; nothing is written, nothing lost."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openmoe.launcher import train

from .commands import Commands
from .conftest import MARK, STEPS, Small, lines, made_up_documents, write_source

Refused = Callable[..., str]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check(code: int, stderr: str, fragments: tuple[str, ...]) -> str:
    printed = stderr.splitlines()
    assert code == 2, stderr
    assert [line.startswith("error: ") for line in printed] == [False] * (len(printed) - 1) + [True], stderr
    # Before the error at most what the preparation of the data has to say.
    assert all(line.startswith(("training a tokenizer", "tokenising")) for line in printed[:-1]), stderr
    for fragment in fragments:
        assert fragment in printed[-1]
    return printed[-1]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused(arguments, "named", ...) runs the command in this process; returns the line."""

    def run(arguments: list[str], *fragments: str) -> str:
        before = tree(tmp_path)
        monkeypatch.setattr(sys, "argv", ["openmoe-train", *arguments])
        with pytest.raises(SystemExit) as ended:
            train.main()
        assert tree(tmp_path) == before
        return check(int(ended.value.code or 0), capsys.readouterr().err, fragments)

    return run


def phases(*marked: str) -> str:
    return f"curriculum=[{', '.join(f'{{{phase}, objective: causal_lm}}' for phase in marked)}]"


MIX = "mix: {alpha: 1}"
UL2 = f"curriculum=[{{{MIX}, until_steps: 9, objective: ul2}}]"
OVERRIDES = [
    (["train.steps=0"], ["train.steps=0", "greater than 0"]),
    (["train.stepz=3"], ["stepz"]),
    (["+train.stepz=3"], ["train.stepz", "unknown key", "steps, tokens"]),
    (["optimizer=adamw"], ["optimizer"]),
    (["experiment=huge"], ["experiment/huge", "openmoe_8b"]),
    (["optim=sgd"], ["optim/sgd", "adafactor", "adamw"]),
    (["optim.schedule.name=cosine"], ["optim.schedule.base", "unknown key", "peak"]),
    (["train.steps=[1,"], ["train.steps=[1,"]),
    (["train.steps"], ["train.steps"]),
    (["train.steps=${train.nothing}"], ["train.nothing"]),
    (["train.steps=${oc.env:NO_SUCH_VARIABLE}"], ["NO_SUCH_VARIABLE"]),
    (["train.global_batch_rows=???"], ["train.global_batch_rows"]),
    (["train.steps=1,2"], ["train.steps"]),
    (["train.precision=fp16"], ["train.precision='fp16'", "'bf16'"]),
    (["train.steps=3", "train.tokens=512"], ["steps=3", "tokens=512"]),
    (["train.micro_batch_rows=3"], ["train.micro_batch_rows=3", "4 rows of a data rank: 1, 2, 4"]),
    (["train.micro_batch_rows=0"], ["micro_batch_rows=0"]),
    (["parallel.compile=true", "parallel.recompute=selective"], ["recompute=selective", "none or full"]),
    (["model.group_rows=3", "train.validation_rows=3"], ["global_batch_rows=4", "model.group_rows = 3"]),
    (["model.group_rows=2", "train.micro_batch_rows=1"], ["micro_batch_rows=1", "model.group_rows=2"]),
    (["model.group_rows=4"], ["train.validation_rows=2", "model.group_rows=4"]),
    (["train.seq_len=4", phases(f"{MIX}, until_steps: 9")], ["train.seq_len=4"]),
    (["train.seq_len=16", UL2], ["train.seq_len=16", "UL2"]),
    (["train.seq_len=4096", UL2], ["train.seq_len=4096", "300"]),
    (["model.top_k=5"], ["top_k=5", "num_experts=4"]),
    (["model.moe_every=3"], ["moe_every=3", "n_layers=2"]),
    (["model.d_model=null"], ["model.d_model=None"]),
    (["model.vocab_size=811"], ["811"]),
    (["run.dir=''"], ["run.dir=''"]),
    (["run.dir=/dev/null/run"], ["run.dir=/dev/null/run"]),
    (["run.dir=" + "long" * 100], ["run.dir=longlong"]),
    (["data.root=/nowhere"], ["data.root=/nowhere"]),
    (["data.root=null"], ["alpha", "manual"]),
    (["data.cache_dir=/dev/null/cache"], ["data.cache_dir=/dev/null/cache"]),
    (["data.cache_dir=" + "long" * 100], ["data.cache_dir=longlong"]),
    (["data.tokenizer.path=/nowhere"], ["data.tokenizer.path=/nowhere"]),
    (["data.tokenizer.path=/etc/hostname"], ["data.tokenizer.path=/etc/hostname"]),
    (["data.tokenizer.sample_bytes_per_source=1"], ["tokenizer"]),
    (["checkpoint.resume=/nowhere"], ["checkpoint.resume=/nowhere", "auto"]),
    (["checkpoint.resume=" + "long" * 100], ["checkpoint.resume=longlong"]),
    (["checkpoint.resume=/etc/hostname"], ["checkpoint.resume=/etc/hostname"]),
    (["parallel.engine=xla"], ["parallel.engine=xla"]),
    (["parallel.engine=deepspeed"], ["parallel.engine=deepspeed", "torchrun"]),
    (["parallel.shard=0"], ["parallel.shard=0"]),
    (["parallel.shard=2"], ["parallel.shard=2"]),
    (["parallel.expert=2"], ["parallel.expert=2"]),
    ([phases(f"{MIX}, until_steps: 9", f"{MIX}, until_steps: 9")], ["curriculum[1]", "until_steps=9"]),
    # 2000 tokens are 8 steps of 256.
    ([phases(f"{MIX}, until_tokens: 2000", f"{MIX}, until_steps: 8")], ["curriculum[1]", "tokens=2000"]),
    ([phases(MIX, f"{MIX}, until_steps: 9")], ["curriculum[0]", "no mark"]),
    ([phases(MIX)], ["last phase", "train.steps"]),
    ([phases(f"{MIX}, until_steps: 9, until_tokens: 9")], ["curriculum[0]", "until_tokens or until_steps"]),
    ([phases("mix: {alpha: 1, beta: -2}")], ["curriculum[0].mix.beta=-2"]),
    ([phases("mix: {alpha: 0, beta: 0}, until_steps: 3")], ["curriculum[0]", "sum to 0"]),
    ([phases("mix: {}, until_steps: 3")], ["curriculum[0].mix={}"]),
    ([phases("mix: {alpha: 1, gamma: 1}, until_steps: 3")], ["gamma", "alpha, beta"]),
    (["curriculum=[{mix: {alpha: 1}, objective: mlm}]"], ["curriculum[0].objective='mlm'", "'ul2'"]),
    (["curriculum=[{until_steps: 3, objective: ul2}]"], ["curriculum[0].mix", "missing"]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "fragments"), OVERRIDES, ids=[" ".join(o)[:60] for o, _ in OVERRIDES])
def test_what_cannot_be_run_is_refused(
    overrides: list[str], fragments: list[str], small: Small, refused: Refused, tmp_path: Path
) -> None:
    """Bug: a traceback, a page of help, a run that starts with something else than was asked for."""
    arguments = [argument for argument in small(tmp_path / "run") if not _replaced(argument, overrides)]
    refused([*arguments, *overrides], *fragments)


def _replaced(argument: str, overrides: list[str]) -> bool:
    """Hydra refuses two values for one group."""
    groups = {override.partition("=")[0] for override in overrides} & {"experiment", "model", "optim"}
    return argument.partition("=")[0] in groups


@pytest.mark.parametrize("overrides", [["train.seq_len=16", UL2], ["run.dir=" + os.fsdecode(b"\xff")]])
def test_refused_by_a_process_of_its_own(
    overrides: list[str], small: Small, commands: Commands, tmp_path: Path
) -> None:
    """Bug: the command line takes another way than the tests above."""
    check(*commands.run(*small(tmp_path / "run"), *overrides), ())
    assert not any(tmp_path.iterdir())


BROKEN: dict[str, tuple[str, bytes]] = {
    "not UTF-8": ("part.jsonl", b'{"text": "fine"}\n{"text": "\xff\xfe"}\n'),
    "not JSON": ("part.jsonl", b'{"text": "fine"}\n{"text": \n'),
    "without text": ("part.jsonl", b'{"text": "fine"}\n{"body": "x"}\n'),
    "text not UTF-8": ("part.txt", b"fine\n\xff\xfe"),
    "no parquet": ("part.parquet", b"PAR1 but nothing else"),
    "only blanks": ("part.jsonl", b"\n\n"),
    "empty": ("part.txt", b""),
    "another kind": ("part.pdf", b"%PDF"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_source_is_named(case: str, small: Small, refused: Refused, tmp_path: Path) -> None:
    """Bug: a source that can't be read is left out in silence, or ends in a traceback."""
    name, content = BROKEN[case]
    root = tmp_path / "corpus"
    write_source(root / "alpha", made_up_documents(3, 50, 80))
    (root / "beta").mkdir()
    (root / "beta" / name).write_bytes(content)
    line = refused(small(tmp_path / "run", f"data.root={root}"), "beta")
    assert "part" in line or "empty" in line


@pytest.fixture(scope="module")
def finished(small: Small, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended at the mark, with checkpoints at steps 3 and 6; not to be changed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    code, stderr = commands.run(*small(run_dir, f"train.steps={MARK}"))
    assert code == 0, stderr
    return run_dir


@pytest.fixture
def used(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_used_folder_is_not_written_over(used: Path, small: Small, refused: Refused) -> None:
    """Bug: a forgotten run.dir costs a training of weeks."""
    refused(small(used), f"run.dir={used}", "checkpoint.resume=auto")
    shutil.rmtree(used / "checkpoints")
    refused(small(used), f"run.dir={used}")
    (used / "metrics.jsonl").unlink()
    (used / "checkpoints/step_3").mkdir(parents=True)
    refused(small(used), f"run.dir={used}")


def test_another_runs_checkpoint_does_not_open_a_used_folder(
    used: Path, finished: Path, small: Small, refused: Refused
) -> None:
    """Bug: resuming elsewhere's checkpoint in a used folder mixes two runs."""
    refused(small(used, f"checkpoint.resume={finished}"), f"run.dir={used}")


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("model.d_ff=64", "model.d_ff is 32"),
        ("model.top_k=1", "model.top_k is 2"),
        ("model.num_experts=8", "model.num_experts is 4"),
        ("train.precision=fp64", "float32"),
        ("optim=adamw", "optimizer/"),
        ("run.seed=1", "run.seed"),
        ("train.seq_len=128", "train.seq_len"),
        ("train.global_batch_rows=8", "train.global_batch_rows"),
        ("data.tokenizer.vocab_size=520", "tokenizer"),
        ("data.mode_strings=false", "data.mode_strings"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    override: str, fragment: str, used: Path, small: Small, refused: Refused
) -> None:
    """Bug: a checkpoint that does not fit is loaded in part, or fails inside torch."""
    refused(small(used, "checkpoint.resume=auto", override), fragment)


def damage(file: Path, kind: str) -> None:
    content = bytearray(file.read_bytes())
    if kind == "truncated":
        del content[len(content) // 2 :]
    elif kind == "one bit flipped":
        content[len(content) // 2] ^= 1
    else:
        content.clear()
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "one bit flipped", "empty"])
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_offered(
    kind: str, suffix: str, used: Path, small: Small, refused: Refused, commands: Commands, undisturbed: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Bug: a damaged checkpoint is trained on; or a user is left without a way to go on."""
    folder = used / f"checkpoints/step_{MARK}"
    damage(next(folder.glob(f"*{suffix}")), kind)
    earlier = used / "checkpoints/step_3"
    line = refused(small(used, "checkpoint.resume=auto"), str(folder))
    assert line.endswith(f"use checkpoint.resume={earlier}")
    if (kind, suffix) == ("one bit flipped", ".safetensors"):
        code, stderr = commands.run(*small(used, f"checkpoint.resume={earlier}"))
        assert code == 0, stderr
        assert lines(used) == undisturbed
        assert len(undisturbed) == STEPS


def test_a_missing_file_of_a_checkpoint(used: Path, small: Small, refused: Refused) -> None:
    """Bug: as above, for files that have gone."""
    folder = used / f"checkpoints/step_{MARK}"
    next(folder.glob("*.safetensors")).unlink()
    refused(small(used, "checkpoint.resume=auto"), str(folder), "missing", "step_3")
    (folder / "manifest.json").unlink()
    refused(small(used, "checkpoint.resume=auto"), str(folder), "step_3")
    refused(small(used, f"checkpoint.resume={folder}"), str(folder))
