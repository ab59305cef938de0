"""The pages that the tokenizer command prints."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from openmoe.data.tokenizer import EOS, PAD, SENTINELS, Tokenizer, parse_model
from openmoe.data.tokenizer_measures import RoundTrip, Usage

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # sentencepiece's numbers


@dataclass(frozen=True)
class Comparison:
    """Table 10 of any tokenizers (columns) and subsets (rows)."""

    # By subset and tokenizer; ratios are to the first tokenizer.
    subsets: Mapping[str, Mapping[str, Usage]]
    # Ids of each tokenizer's file.
    vocabulary: Mapping[str, int]

    @property
    def tokenizers(self) -> list[str]:
        return list(self.vocabulary)

    def ratio(self, subset: str, tokenizer: str) -> float:
        """Tokens, over those of the first tokenizer for the same text (the paper's umT5/LLaMA)."""
        usage = self.subsets[subset]
        return usage[tokenizer].tokens / max(1, usage[self.tokenizers[0]].tokens)

    def rows(self) -> list[dict[str, Any]]:
        """One flat record for each subset and tokenizer."""
        return [
            {
                "subset": subset,
                "tokenizer": tokenizer,
                "documents": usage.documents,
                "text_bytes": usage.text_bytes,
                "tokens": usage.tokens,
                "vocabulary_used": usage.vocabulary_used,
                "ratio": self.ratio(subset, tokenizer),
                "bytes_per_token": usage.bytes_per_token,
                "unknown_tokens": usage.unknown_tokens,
            }
            for subset, usages in self.subsets.items()
            for tokenizer, usage in usages.items()
        ]


def comparison_table(comparison: Comparison) -> str:
    """A block for each measure, in it a line for each subset and a column for each tokenizer."""
    base = comparison.tokenizers[0]
    blocks: list[tuple[str, Callable[[Usage, float], str]]] = [
        ("tokens", lambda usage, ratio: f"{usage.tokens:,}"),
        ("vocabulary used", lambda usage, ratio: f"{usage.vocabulary_used:,}"),
        (f"ratio: tokens over those of {base}", lambda usage, ratio: f"{ratio:.3f}"),
        ("bytes per token", lambda usage, ratio: f"{usage.bytes_per_token:.2f}"),
        ("unknown tokens", lambda usage, ratio: f"{usage.unknown_tokens / max(1, usage.tokens):.2%}"),
    ]
    first = max(len(subset) for subset in comparison.subsets)
    widths = {name: max(len(name), 13) + 2 for name in comparison.tokenizers}
    header = " " * first + "".join(f"{name:>{width}}" for name, width in widths.items())
    lines = []
    for title, cell in blocks:
        lines += [title, header]
        for subset, usages in comparison.subsets.items():
            cells = [cell(usage, comparison.ratio(subset, name)) for name, usage in usages.items()]
            columns = (f"{text:>{width}}" for text, width in zip(cells, widths.values(), strict=True))
            lines.append(f"{subset:<{first}}" + "".join(columns))
        lines.append("")
    sizes = ", ".join(f"{name} {size:,}" for name, size in comparison.vocabulary.items())
    return "\n".join([*lines, f"vocabularies: {sizes}"])


def description(path: str, model: bytes, tokenizer: Tokenizer) -> str:
    """What the model file is and which ids its pieces have here."""
    given, used = parse_model(model, path), parse_model(tokenizer.model, path)
    place = {piece.piece: index for index, piece in enumerate(given.pieces)}
    sentinels = len(place.keys() & {piece.piece for piece in used.pieces[-SENTINELS:]})
    unk = next(index for index, piece in enumerate(used.pieces) if piece.type == piece.UNKNOWN)
    special = []
    for role, index in (("pad", PAD), ("eos", EOS), ("unk", unk)):
        piece = used.pieces[index].piece
        special.append(f"{role} {index} {piece} ({_before(place.get(piece), index)})")
    rules, trained = given.normalizer_spec, given.trainer_spec
    kind = MODEL_TYPES.get(trained.model_type, "other")
    dummy = "a space" if rules.add_dummy_prefix else "nothing"
    spaces = "become one" if rules.remove_extra_whitespaces else "stay"
    return "\n".join(
        [
            f"tokenizer    {path}",
            f"file         {kind}, {len(given.pieces) - sentinels:,} pieces and {sentinels} sentinels",
            f"special      {', '.join(special)}",
            f"sentinels    <extra_id_0> {tokenizer.first_sentinel:,} down to "
            f"<extra_id_{SENTINELS - 1}> {tokenizer.size - SENTINELS:,}",
            f"ids          {tokenizer.size:,}; model.vocab_size={-(-tokenizer.size // 128) * 128} or more",
            f"normaliser   {rules.name or 'identity'}; {dummy} before each text; runs of spaces {spaces}",
            f"fallback     {'the bytes of the character' if trained.byte_fallback else 'unk'}",
            f"sha256       {tokenizer.sha256}",
        ]
    )


def _before(before: int | None, now: int) -> str:
    return "added" if before is None else "as in the file" if before == now else f"{before} in the file"


def trip_table(trips: Mapping[str, RoundTrip]) -> str:
    """The share of each source's documents that comes back exactly, and the first difference."""
    width = max(len(name) for name in trips)
    lines = ["round trip   documents that come back exactly"]
    for name, trip in trips.items():
        share = int(1e4 * trip.exact / trip.documents) / 100  # never rounded up to 100%
        lines.append(f"  {name:<{width}}{trip.exact:>12,} of {trip.documents:>10,}{share:>9.2f}%")
    differences = [(name, trip.first_difference) for name, trip in trips.items() if trip.first_difference]
    for name, (number, before, after) in differences[:1]:
        lines.append(f"first other  {name}, document {number}: {before!r} came back as {after!r}")
    return "\n".join(lines)


def speed_line(trips: Mapping[str, RoundTrip], load_seconds: float, threads: int) -> str:
    text_bytes = sum(trip.text_bytes for trip in trips.values())
    tokens = sum(trip.tokens for trip in trips.values())
    encode_seconds = sum(trip.encode_seconds for trip in trips.values())
    decode_seconds = sum(trip.decode_seconds for trip in trips.values())
    return (
        f"speed        loading {load_seconds:.2f} s; encoding {text_bytes / encode_seconds / 1e6:.1f} MB/s, "
        f"{tokens / encode_seconds / 1e6:.2f} million tokens/s with {threads} threads; "
        f"decoding {tokens / decode_seconds / 1e6:.2f} million tokens/s"
    )
