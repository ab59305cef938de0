"""The generate command: what it prints, what it writes, what it refuses."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from openmoe.checkpoint.load_model import load_model
from openmoe.checkpoint.manifest import read_manifest
from openmoe.checkpoint.state import model_tensors
from openmoe.checkpoint.storage import write_checkpoint
from openmoe.data.config import TokenizerConfig
from openmoe.data.prepare import open_tokenizer
from openmoe.data.tokenizer import Tokenizer, TrainingStyle, load_tokenizer, train_tokenizer
from openmoe.launcher import generate as command
from openmoe.launcher.entry import load_config
from openmoe.launcher.train import model_identity
from openmoe.model.decoder import Decoder
from openmoe.model.generation import Generated, NewToken, generate
from openmoe.model.sampling import SamplingConfig
from openmoe.parallel.build import build_decoder
from tests.model.test_kv_cache import check

from .conftest import Small, made_up_documents

WORDS = " ".join(made_up_documents(8, 300, 80))
Run = Callable[..., tuple[str, str]]
Refused = Callable[..., str]
NASTY = "a, [b] {c: d} \"e\" 'f' ${g} \\${h} k=l, \\ $m #n ??? \u2028\nö"


@pytest.fixture(scope="module")
def run_dir(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of initial weights and something of an optimizer."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    config = load_config(small(folder))
    model = build_decoder(config.model, "fp32", torch.device("cpu"), seed=3)
    write_checkpoint(
        folder / "checkpoints" / "step_5",
        model_tensors(model) | {"optimizer/step": torch.zeros(3)},
        step=5,
        tokens_seen=9,
        milestone=False,
        model=model_identity(config),
        metadata={"config": config.model_dump()},
    )
    return folder


@pytest.fixture(scope="module")
def loaded(run_dir: Path, small: Small) -> tuple[Decoder, Tokenizer]:
    model, _ = load_model(run_dir / "checkpoints" / "step_5", torch.float32, torch.device("cpu"))
    return model, open_tokenizer(load_config(small(run_dir)).data, ["alpha", "beta"])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_dir: Path) -> Run:
    """run("key=value", ...) -> stdout and stderr."""

    def run(*arguments: str) -> tuple[str, str]:
        where = [] if any(a.startswith("checkpoint=") for a in arguments) else [f"checkpoint={run_dir}"]
        monkeypatch.setattr(sys, "argv", ["openmoe-generate", "device=cpu", *where, *arguments])
        command.main()
        return capsys.readouterr()

    return run


@pytest.fixture
def refused(run: Run, capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused("key=value", ...) -> the one line of an exit with code 2."""

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        captured = capsys.readouterr()
        assert ended.value.code == 2, captured.err
        assert len(captured.err.splitlines()) == 1, captured.err
        assert captured.err.startswith("error: ")
        assert not captured.out
        return captured.err

    return refused


@pytest.mark.parametrize("experiment", ["tiny", "tiny_released"])
def test_the_experiments_models(experiment: str) -> None:
    """The models that users have: prompt and steps through the cache equal the whole row without dropping."""
    config = load_config([f"experiment={experiment}"]).model.model_copy(update={"dropless": True})
    check(build_decoder(config, "fp32", torch.device("cpu"), seed=0).eval(), torch.float32)


@pytest.mark.parametrize("prompt", ["kam no", "", NASTY])
def test_one_prompt(prompt: str, run: Run, loaded: tuple[Decoder, Tokenizer]) -> None:
    """Catches a prompt that Hydra reads as its own language, text that is printed twice or lost between two
    tokens, other settings than those asked for."""
    model, tokenizer = loaded
    out, err = run(f"prompt={prompt}", "max_new_tokens=12", "temperature=0.9", "top_k=50", "seed=4")
    sampling = SamplingConfig(temperature=0.9, top_k=50)
    expected = generate(model, [tokenizer.encode(prompt)], 12, sampling, seed=4)[0]
    text = prompt + tokenizer.decode(expected.tokens) + "\n"
    assert out == command._harmless(text)
    assert "step 5, fp32 on cpu" in err
    assert f"{len(expected.tokens)} tokens to " in err


def test_a_file_of_prompts(
    run: Run, loaded: tuple[Decoder, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches results in the order of the batches, a seed that depends on the window, keys that are lost."""
    monkeypatch.setattr(command, "WINDOW_BATCHES", 1)
    model, tokenizer = loaded
    texts = ["kam", "a longer one of them", "", NASTY, "no"]
    lines = [json.dumps({"prompt": text, "id": i}) for i, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("\n\n".join(lines) + "\n")
    output = tmp_path / "out.jsonl"
    asked = ("max_new_tokens=6", "batch_rows=2", "seed=9", "top_p=0.9")
    out, _ = run(f"prompts_file={tmp_path}/in.jsonl", f"output={output}", *asked)
    assert not out
    found = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
    for i, (text, result) in enumerate(zip(texts, found, strict=True)):
        alone = generate(model, [tokenizer.encode(text)], 6, SamplingConfig(top_p=0.9), seed=9 + i)[0]
        assert result.pop("logprobs") == pytest.approx(alone.logprobs, abs=1e-4)
        assert result == {
            "prompt": text,
            "id": i,
            "text": tokenizer.decode(alone.tokens),
            "tokens": alone.tokens,
            "ended": alone.ended,
            "seed": 9 + i,
        }


def test_a_file_of_text(run: Run, tmp_path: Path) -> None:
    """Catches a blank line taken for a prompt, an end of line in one, and lines of another alphabet."""
    (tmp_path / "in.txt").write_bytes("kam\r\n\nnö\u2028x\n".encode())
    out, _ = run(f"prompts_file={tmp_path}/in.txt", "max_new_tokens=2", "special_tokens=true")
    assert [json.loads(line)["prompt"] for line in out.split("\n")[:-1]] == ["kam", "nö\u2028x"]


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_dtypes(dtype: str, run: Run) -> None:
    out, _ = run("prompt=kam", f"dtype={dtype}", "max_new_tokens=3", "capacity=model", "temperature=0")
    assert out.startswith("kam")


def test_length_beyond_training(run: Run) -> None:
    """Catches text without a word of warning from positions that the model has never seen."""
    assert "warning" not in run("prompt=", "max_new_tokens=64")[1]
    assert (
        "rows of up to 65 positions; the model was trained on rows of 64"
        in run("prompt=", "max_new_tokens=65")[1]
    )


def test_characters_of_several_tokens(
    run: Run, loaded: tuple[Decoder, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches half a character on the terminal, one that never comes, and text behind broken bytes that is
    lost."""
    tokenizer = loaded[1]
    tokens = tokenizer.encode("kö€x🜁")
    assert len(tokens) > 10
    for made in (tokens, tokens[:-1], [*tokens[:-1], *tokens[:3]]):
        steps = [NewToken(0, token, 0.0) for token in made]
        monkeypatch.setattr(command, "stream", lambda *_, steps=steps: iter(steps))
        assert run("prompt=k")[0] == "k" + tokenizer.decode(made) + "\n"


def test_the_space_between_prompt_and_text(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches "the cat" printed as "thecat" with a tokenizer that puts a space before each text, as
    umT5's and LLaMA's do, and a space put where a word goes on."""
    style = TrainingStyle(dummy_prefix=True, squeeze_spaces=True)
    tokenizer = train_tokenizer([WORDS], TokenizerConfig(vocab_size=520), style)
    (tmp_path / "t.model").write_bytes(tokenizer.model)
    first, second = WORDS.split()[:2]
    for prompt, goes_on in ((first, f" {second} {first}"), ("", first), (f"{first}</s>", f" {second}")):
        tokens = tokenizer.encode(goes_on)
        end = tokenizer.encode(prompt.removesuffix("</s>"))
        assert tokenizer.decode_after(end, tokens) == goes_on
        steps = [NewToken(0, token, 0.0) for token in tokens]
        made = Generated(tokens, [0.0] * len(tokens), ended=False)
        monkeypatch.setattr(command, "stream", lambda *_, steps=steps: iter(steps))
        monkeypatch.setattr(command, "generate", lambda *_, made=made: iter([made]))
        asked = (f"prompt={prompt}", f"tokenizer={tmp_path}/t.model", "special_tokens=true")
        assert run(*asked)[0] == f"{prompt}{goes_on}\n"
        output = tmp_path / f"{len(prompt)}.jsonl"
        run(*asked, f"output={output}")
        assert json.loads(output.read_text())["text"] == goes_on


def test_no_text_commands_the_terminal() -> None:
    assert command._harmless("a\x1b[31m\u202eb\n\tü") == "a\\x1b[31m\\u202eb\n\tü"


BAD: list[tuple[list[str], str]] = [
    ([], "prompt, prompts_file: both are null; give one of them"),
    (["prompt=a", "prompts_file=b"], "both are given"),
    (["prompts_file={tmp}/none"], "none: can't be read: No such file"),
    (["prompts_file={tmp}/empty.txt"], "holds no prompt"),
    (["prompts_file={tmp}/latin.txt"], "not UTF-8"),
    (["prompts_file={tmp}/bad.jsonl"], "bad.jsonl: line 2: not JSON"),
    (["prompts_file={tmp}/keys.jsonl"], 'line 1: allowed an object with a text "prompt"'),
    (["prompts_file={tmp}/half.jsonl"], "line 1: not UTF-8"),
    (["prompt=\udc80"], "prompt: not UTF-8"),
    (["prompt=a", "output={tmp}/empty.txt"], "exists already"),
    (["prompt=a", "output={tmp}/no/where"], "can't be written"),
    (["prompt=a", "checkpoint={tmp}"], "no checkpoint there"),
    (["prompt=a", "checkpoint={tmp}/damaged"], "damaged"),
    (["prompt=a", "tokenizer={tmp}/empty.txt"], "not a sentencepiece model"),
    (["prompt=<extra_id_300>", "special_tokens=true"], "no such sentinel"),
    (["prompt=a", "top_k=0"], "top_k=0: "),
    (["prompt=a", "top_p=1.5"], "top_p=1.5: "),
    (["prompt=a", "temperature=-1"], "temperature=-1: "),
    (["prompt=a", "max_new_tokens=0"], "max_new_tokens=0: "),
    (["prompt=a", "dtype=fp16"], "dtype='fp16': "),
    (["prompt=a", "capacity=some"], "capacity='some': "),
    (["prompt=a", "beams=4"], "beams"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int, refused: Refused, run_dir: Path, tmp_path: Path) -> None:
    """Any fault of the input is one line and exit code 2, and leaves no file behind."""
    files = {
        "empty.txt": b"",
        "latin.txt": b"caf\xe9\n",
        "bad.jsonl": b'{"prompt": "a"}\n{"prompt": \n',
        "keys.jsonl": b'{"text": "a"}\n',
        "half.jsonl": b'{"prompt": "\\ud800"}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    source = run_dir / "checkpoints" / "step_5"
    (tmp_path / "damaged").mkdir()
    for file in source.iterdir():
        content = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            content[-9] ^= 1
        (tmp_path / "damaged" / file.name).write_bytes(content)
    arguments, says = BAD[case]
    assert says in refused(*[argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    assert {path.name for path in tmp_path.iterdir()} == {*files, "damaged"}


def test_another_tokenizer(run: Run, refused: Refused, tmp_path: Path) -> None:
    """Catches ids that the embedding does not have, and a tokenizer that is asked for and not used."""
    for pieces in (520, 900):
        tokenizer = train_tokenizer([WORDS], TokenizerConfig(vocab_size=pieces))
        (tmp_path / f"{pieces}.model").write_bytes(tokenizer.model)
    asked = ("prompt=kam", "max_new_tokens=1", f"output={tmp_path}/out")
    run(*asked, f"tokenizer={tmp_path}/520.model")
    small = load_tokenizer(f"{tmp_path}/520.model")
    result = json.loads((tmp_path / "out").read_text())
    assert result["text"] == small.decode(result["tokens"])
    assert "ids with its sentinels, and the model's" in refused("prompt=a", f"tokenizer={tmp_path}/900.model")


def test_the_tokenizer_has_changed(
    run: Run, refused: Refused, run_dir: Path, small: Small, tmp_path: Path
) -> None:
    """Catches text through another tokenizer than the model's, when the run's data are others by now."""
    stored = run_dir / "checkpoints" / "step_5"
    manifest = read_manifest(stored)
    sha256 = open_tokenizer(load_config(small(run_dir)).data, ["alpha", "beta"]).sha256
    for name, stated in (("same", sha256), ("other", "abc")):
        shutil.copytree(stored, tmp_path / name)
        data = {"data": {"identity": {"tokenizer": stated}}}
        changed = manifest.model_copy(update={"metadata": manifest.metadata | data})
        (tmp_path / name / "manifest.json").write_text(changed.text())
    run(f"checkpoint={tmp_path / 'same'}", "prompt=kam", "max_new_tokens=1")
    line = refused(f"checkpoint={tmp_path / 'other'}", "prompt=kam")
    assert "SHA-256 abc, the one of data.root=" in line
    assert f"is now {sha256}; give it with tokenizer=FILE" in line
