"""Configuration of the data room: where the text comes from, how it is prepared, and the phases of a run."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

ObjectiveName = Literal["ul2", "causal_lm", "prefix_lm", "span_corruption"]

# A path as text: not empty and without the NUL byte that no file system accepts.
PathText = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]

# A source's name is a folder's name and part of metric names.
SourceName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$")]

LARGEST_COUNT = 2**53  # exact in every JSON reader


class _Section(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    pass


class TokenizerConfig(_Section):
    """The sentencepiece model, or how to train one on the run's own sources."""

    # A sentencepiece model file; null trains one and keeps it in the cache.
    path: PathText | None = None
    # Pieces of a trained tokenizer, before the 300 sentinels; a small corpus may yield fewer.
    vocab_size: int = Field(default=4096, ge=512, le=1_000_000)
    # Algorithm of a trained tokenizer; bpe trains about 25 times faster and compresses as well.
    model_type: Literal["bpe", "unigram"] = "bpe"
    # Text a trained tokenizer sees of each source, bytes (whole documents, drawn by hash).
    sample_bytes_per_source: int = Field(default=1_500_000, ge=1, le=2**31)


class DenoiserConfig(_Section):
    """One kind of UL2 example (a row of Table 2)."""

    # Put before the inputs, as ordinary text.
    mode: Annotated[str, Field(max_length=64)]
    # Mean length of a corrupted span, tokens; null is the prefix language model.
    mean_span: float | None = Field(ge=1, le=1e6)
    # Share of the tokens that is corrupted; 0 for the prefix language model.
    density: float = Field(ge=0, lt=1)
    # Relative share of the examples; need not sum to one.
    rate: float = Field(ge=0, le=1e9)

    @model_validator(mode="after")
    def _check(self) -> "DenoiserConfig":
        if (self.mean_span is None) != (self.density == 0):
            raise ValueError(
                f"mean_span={self.mean_span} with density={self.density}; a prefix LM has mean_span null and "
                "density 0, a span denoiser a mean_span and a density above 0"
            )
        return self


# Table 2 (Tay et al. 2022).
TABLE_2 = (
    DenoiserConfig(mode="[NLU] ", mean_span=3.0, density=0.15, rate=0.1),
    DenoiserConfig(mode="[NLU] ", mean_span=8.0, density=0.15, rate=0.1),
    DenoiserConfig(mode="[NLG] ", mean_span=3.0, density=0.5, rate=0.1),
    DenoiserConfig(mode="[NLG] ", mean_span=8.0, density=0.5, rate=0.1),
    DenoiserConfig(mode="[NLG] ", mean_span=64.0, density=0.5, rate=0.1),
    DenoiserConfig(mode="[S2S] ", mean_span=None, density=0.0, rate=0.5),
)


class DataConfig(_Section):
    """Sources, cache, tokenizer and the choices that the paper leaves open."""

    # Folder with one sub-folder per source; null reads the embedded data of the running Python.
    root: PathText | None = None
    # Where prepared tokens are kept; null is $XDG_CACHE_HOME/openmoe or ~/.cache/openmoe.
    cache_dir: PathText | None = None
    # Threads that build rows ahead of the training step; 0 builds them in the step. Never changes the rows.
    workers: int = Field(default=1, ge=0, le=64)
    # Share of the documents held back for validation where a source has no valid/ folder.
    validation_fraction: float = Field(default=0.05, gt=0, le=0.5)
    tokenizer: TokenizerConfig = TokenizerConfig()
    # What a mix's rates count: text tokens read, or examples (the released way). Every source's text is cut
    # into the same kinds of example, so that both give the same rows; kept as the record of what was meant.
    mix_rates: Literal["per_token", "per_example"] = "per_token"
    # One random aligned chunk of at most this many tokens is used of a document per epoch.
    document_chunk_tokens: int = Field(default=65_536, gt=0, le=2**31 - 1)
    # Causal LM: replace the last token of every row by EOS, as the released pre-processing does.
    row_end_eos: bool = False
    # UL2: put each denoiser's mode string before its inputs.
    mode_strings: bool = True
    # The kinds of UL2 example and their shares.
    denoisers: list[DenoiserConfig] = Field(default=list(TABLE_2), min_length=1, max_length=64)
    # Positions an example may take; null is train.seq_len. Packing `dense` needs a part of train.seq_len.
    example_tokens: int | None = Field(default=None, gt=0, le=2**31 - 1)
    # released: next-fit, which is one example a row; dense: as many examples as fit into a long row.
    packing: Literal["released", "dense"] = "released"
    # What to do where a run reads a source more than once: nothing, say so at the start, or refuse to start.
    repetition: Literal["allow", "warn", "forbid"] = "warn"


class PhaseConfig(_Section):
    """One stretch of a run with a fixed mix and objective."""

    # The phase ends at the first step boundary at or after this many row positions of the whole run ...
    until_tokens: int | None = Field(default=None, gt=0, le=LARGEST_COUNT)
    # ... or after this many steps of the whole run. One of the two; the last phase may have neither.
    until_steps: int | None = Field(default=None, gt=0, le=LARGEST_COUNT)
    # Steps over which the rates go linearly from the previous phase's mix to this one's; 0 switches at once.
    ramp_steps: int = Field(default=0, ge=0, le=LARGEST_COUNT)
    # Relative rate of each source; need not sum to one.
    mix: dict[SourceName, Annotated[float, Field(ge=0, le=1e9)]] = Field(min_length=1)
    objective: ObjectiveName

    @model_validator(mode="after")
    def _check(self) -> "PhaseConfig":
        if self.until_tokens is not None and self.until_steps is not None:
            raise ValueError("give until_tokens or until_steps, not both")
        if sum(self.mix.values()) <= 0:
            raise ValueError("the rates of mix sum to 0; at least one must be above 0")
        return self
