"""The command `prepare` as a user types it: its page, its exit codes, and training on what it made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import openmoe.conf
from openmoe.data.prepare_config import PrepareConfig

from .conftest import Commands, Small, made_up_documents, write_source


def prepare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "openmoe.launcher.prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
def test_text_is_prepared_and_trained_on(tmp_path: Path, small: Small, commands: Commands) -> None:
    """Catches a command that only works from a script, and a folder that training takes for raw text."""
    write_source(tmp_path / "raw" / "alpha", made_up_documents(1, 60, 80))
    write_source(tmp_path / "raw" / "beta", made_up_documents(2, 20, 300))
    arguments = [f"data.input={tmp_path / 'raw'}", f"data.output={tmp_path / 'out'}", "data.workers=2"]
    done = prepare(*arguments, "data.shard_bytes=5000", "tokenizer.vocab_size=512")
    assert done.returncode == 0, done.stderr
    assert "tokens to train on" in done.stdout
    assert "Traceback" not in done.stderr
    assert not list(Path.cwd().glob("outputs"))

    code, stderr = commands.run(*small(tmp_path / "run", f"data.root={tmp_path / 'out'}"))
    assert code == 0, stderr
    assert "training a tokenizer" not in stderr

    (tmp_path / "raw" / "alpha" / "more.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    failed = prepare(*arguments)
    assert failed.returncode == 2
    line = failed.stderr.strip().splitlines()[-1]
    assert line == f'error: {tmp_path}/raw/alpha/more.jsonl:2: expected a JSON object with a string "text"'


def test_the_page_has_every_key() -> None:
    """Catches a key that a user can't find on the page, or that the page has and the schema lacks."""
    text = (Path(next(iter(openmoe.conf.__path__))) / "prepare.yaml").read_text()
    page = yaml.safe_load(text)
    fields = PrepareConfig.model_fields
    for section in ("data", "tokenizer"):
        section_fields = fields[section].annotation.model_fields  # type: ignore[union-attr]
        assert set(page[section]) == set(section_fields)
    for key in ("workers", "on_corrupt", "shard_bytes", "validation_fraction", "text_field", "dataset_split"):
        assert page["data"][key] == fields["data"].annotation.model_fields[key].default  # type: ignore[union-attr]
    assert json.dumps(page["tokenizer"]["path"]) == "null"
