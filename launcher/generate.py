"""Continue text: `python -m openmoe.launcher.generate checkpoint=RUN prompt=TEXT`, or `openmoe-generate`."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, TextIO

from pydantic import Field

from openmoe.checkpoint.load_model import load_model
from openmoe.checkpoint.manager import checkpoint_at
from openmoe.checkpoint.manifest import Manifest
from openmoe.checkpoint.origin import tokenizer_of
from openmoe.data.config import PathText
from openmoe.data.prompts import encode_prompt
from openmoe.data.tokenizer import EOS, Tokenizer, load_tokenizer
from openmoe.launcher.entry import run_command
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.processes import pick_device
from openmoe.model.decoder import Decoder, GenerationCapacity
from openmoe.model.generation import generate, stream
from openmoe.model.sampling import SamplingConfig
from openmoe.parallel.build import DTYPES

# Of a file, so many batches are generated before their results are written.
WINDOW_BATCHES = 8


class GeneratePage(SamplingConfig):
    checkpoint: PathText
    tokenizer: PathText
    prompt: str | None
    prompts_file: PathText | None
    output: PathText | None
    special_tokens: bool
    max_new_tokens: int = Field(ge=1, le=1_000_000)
    seed: int = Field(ge=0, lt=2**63)
    capacity: GenerationCapacity
    batch_rows: int = Field(ge=1, le=65_536)
    dtype: Literal["fp64", "fp32", "bf16"]
    device: Literal["auto", "cpu", "cuda"]

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


@dataclass(frozen=True)
class Prompt:
    text: str
    tokens: list[int]
    other: dict[str, Any]  # what stands beside it in its line


def main() -> None:
    # Taken out first: Hydra reads commas, brackets and quotes in a value as its own language.
    given = [argument for argument in sys.argv[1:] if argument.startswith("prompt=")]
    sys.argv = [argument for argument in sys.argv if argument not in given]
    text = {"prompt": given[-1].removeprefix("prompt=")} if given else {}
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal that lacks a letter gets its number
        sys.stdout.reconfigure(errors="backslashreplace")
    run_command(lambda page: continue_prompts(page.model_copy(update=text)), GeneratePage, "generate")


def continue_prompts(page: GeneratePage) -> None:
    """Load the model, continue what is asked for, print it or write it."""
    texts = _texts(page)
    folder = checkpoint_at("checkpoint", page.checkpoint)
    device = pick_device(page.device, None)
    if page.output is not None and Path(page.output).exists():
        raise ConfigError(f"output={page.output}: exists already; choose another")
    model, manifest = load_model(folder, DTYPES[page.dtype][1], device)
    tokenizer = _tokenizer(page, folder, manifest, model.config.vocab_size)
    prompts = _encoded(page, texts, tokenizer, manifest)
    output = None if page.output is None else _new_file(page.output)
    _say(f"{folder}: step {manifest.step}, {page.dtype} on {device}")
    _warn_of_length(page, prompts, manifest)
    if output is None and page.prompt is not None:
        _print_stream(page, model, tokenizer, prompts[0])
        return
    with output or nullcontext(sys.stdout) as file:
        _write_lines(page, model, tokenizer, prompts, file)


def _print_stream(page: GeneratePage, model: Decoder, tokenizer: Tokenizer, prompt: Prompt) -> None:
    """The prompt and, as it is made, what follows."""
    begin = time.perf_counter()
    print(_harmless(prompt.text), end="", flush=True)
    tokens: list[int] = []
    shown, first = "", begin
    asked = (page.max_new_tokens, page.sampling, page.seed, page.capacity)
    for new in stream(model, [prompt.tokens], *asked):
        if not tokens:
            first = time.perf_counter()
        tokens.append(new.token)
        text = tokenizer.decode_after(prompt.tokens, tokens)
        # The bytes of a character may come in several tokens, and it is a substitute until then.
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and text.startswith(shown):
            print(_harmless(text[len(shown) :]), end="", flush=True)
            shown = text
    print(_harmless(tokenizer.decode_after(prompt.tokens, tokens)[len(shown) :]), flush=True)
    end = "the end token" if tokens[-1] == EOS else "max_new_tokens"
    line = f"{len(tokens)} tokens to {end}; {1 + len(prompt.tokens)} read in {first - begin:.2f} s"
    if len(tokens) > 1:
        line += f", then {(len(tokens) - 1) / (time.perf_counter() - first):.1f} tokens/s"
    _say(line)


def _write_lines(
    page: GeneratePage, model: Decoder, tokenizer: Tokenizer, prompts: Sequence[Prompt], file: TextIO
) -> None:
    """A JSON object for each prompt, in their order; of a run that is cut short all lines are whole."""
    begin, made = time.perf_counter(), 0
    window = page.batch_rows * WINDOW_BATCHES
    for start in range(0, len(prompts), window):
        some, seed = prompts[start : start + window], page.seed + start
        asked = (page.max_new_tokens, page.sampling, seed, page.capacity, page.batch_rows)
        for i, new in enumerate(generate(model, [prompt.tokens for prompt in some], *asked)):
            result = {
                "prompt": some[i].text,
                "text": tokenizer.decode_after(some[i].tokens, new.tokens),
                "tokens": new.tokens,
                "logprobs": new.logprobs,
                "ended": new.ended,
                "seed": seed + i,
            }
            file.write(json.dumps(some[i].other | result, ensure_ascii=False) + "\n")
            made += len(new.tokens)
        file.flush()
    seconds = time.perf_counter() - begin
    place = f" -> {page.output}" if page.output else ""
    _say(f"{len(prompts)} prompts, {made} tokens, {made / seconds:.1f} a second{place}")


def _texts(page: GeneratePage) -> list[tuple[str, dict[str, Any]]]:
    """The prompts' texts, each with what stands beside it. Raises ConfigError."""
    if (page.prompt is None) == (page.prompts_file is None):
        both = "both are given" if page.prompt is not None else "both are null"
        raise ConfigError(f"prompt, prompts_file: {both}; give one of them")
    if page.prompt is not None:
        return [(_utf8("prompt", page.prompt), {})]
    assert page.prompts_file is not None
    texts = list(_lines(page.prompts_file))
    if not texts:
        raise ConfigError(f"prompts_file={page.prompts_file}: holds no prompt")
    return texts


def _lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = Path(path).read_bytes().decode().split("\n")
    except OSError as error:
        raise ConfigError(f"prompts_file={path}: can't be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"prompts_file={path}: not UTF-8: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"prompts_file={path}: line {number}"
            yield _object(where, line) if path.endswith(".jsonl") else (line.removesuffix("\r"), {})


def _object(where: str, line: str) -> tuple[str, dict[str, Any]]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise ConfigError(f'{where}: allowed an object with a text "prompt"')
    return _utf8(where, values["prompt"]), values


def _utf8(where: str, text: str) -> str:
    """Python keeps half characters of a command line and of JSON; no tokenizer takes them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: not UTF-8") from None
    return text


def _encoded(
    page: GeneratePage, texts: Sequence[tuple[str, dict[str, Any]]], tokenizer: Tokenizer, manifest: Manifest
) -> list[Prompt]:
    data = manifest.metadata.get("config", {}).get("data", {})
    denoisers = data.get("denoisers", []) if data.get("mode_strings", True) else []
    modes = [denoiser["mode"] for denoiser in denoisers]
    return [
        Prompt(text, encode_prompt(tokenizer, text, page.special_tokens, modes), other)
        for text, other in texts
    ]


def _tokenizer(page: GeneratePage, folder: Path, manifest: Manifest, vocab_size: int) -> Tokenizer:
    if page.tokenizer == "auto":
        tokenizer = tokenizer_of(folder, manifest)
    else:
        tokenizer = load_tokenizer(page.tokenizer, "tokenizer")
    if tokenizer.size > vocab_size:
        raise ConfigError(
            f"tokenizer={page.tokenizer}: {tokenizer.size} ids with its sentinels, and the model's "
            f"vocabulary has {vocab_size} rows"
        )
    return tokenizer


def _warn_of_length(page: GeneratePage, prompts: Sequence[Prompt], manifest: Manifest) -> None:
    trained = manifest.metadata.get("config", {}).get("train", {}).get("seq_len")
    longest = max(len(prompt.tokens) for prompt in prompts) + page.max_new_tokens
    if trained is not None and longest > trained:
        _say(f"warning: rows of up to {longest} positions; the model was trained on rows of {trained}")


def _new_file(path: str) -> TextIO:
    try:
        return Path(path).open("x", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"output={path}: can't be written: {error.strerror}") from None


def _harmless(text: str) -> str:
    """Nothing that commands a terminal: control characters and marks that turn the direction of writing
    become escapes."""
    return "".join(
        sign if sign.isprintable() or sign in "\n\t" else sign.encode("unicode_escape").decode()
        for sign in text
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
