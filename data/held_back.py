"""Which documents are held back for validation: decided by the hash of each document's own text."""

import math
from collections import Counter
from collections.abc import Iterator

import xxhash

from openmoe.data.shards import Split

Document = tuple[Split | None, str]

# The documents of a source's first shard among which at least one is held back and one is not: the first
# ones, up to this many and to this much text (they are kept in memory).
_FIRST_DOCUMENTS = 256
_FIRST_CHARACTERS = 1 << 26

# One hash for each purpose: a sample of the training text must not be cut short by the held-back share.
_SEEDS = {"split": 1, "sample": 2}


def hash_place(purpose: str, text: str) -> float:
    """A number in [0, 1) that only depends on the purpose and the text."""
    return xxhash.xxh3_64_intdigest(text.encode(), _SEEDS[purpose]) / 2**64


def split_documents(
    documents: Iterator[Document], validation_fraction: float, first_shard: bool = True
) -> Iterator[tuple[Split, str]]:
    """The documents with their split, empty ones left out.

    Where the source has no split of its own, a document is held back if the hash of its text falls below
    `validation_fraction`, so adding documents moves no other. Of the first 256 of a source (`first_shard`) at
    least one is held back and one is not. Where these are a single document, or copies of one, the end of it
    is held back.
    """
    documents = (document for document in documents if document[1])
    if first_shard:
        yield from _split_first(_take_first(documents), validation_fraction)
    for split, text in documents:
        yield split or ("valid" if hash_place("split", text) < validation_fraction else "train"), text


def _take_first(documents: Iterator[Document]) -> list[Document]:
    first: list[Document] = []
    characters = 0
    for document in documents:
        first.append(document)
        characters += len(document[1])
        # At least two, so that a single one is known to be the only one.
        if len(first) == _FIRST_DOCUMENTS or (characters >= _FIRST_CHARACTERS and len(first) > 1):
            break
    return first


def _split_first(first: list[Document], validation_fraction: float) -> Iterator[tuple[Split, str]]:
    places = [hash_place("split", text) for _, text in first]
    copies = Counter(places)
    if len(copies) == 1 and first[0][0] is None:
        text = first[0][1]
        cut = _cut_place(text, validation_fraction)
        yield "train", text[:cut]
        if text[cut:]:
            yield "valid", text[cut:]
        yield from (("train", text) for _, text in first[1:])
        return
    held_back = {place for place in copies if place < validation_fraction}
    # What must change sides is what moves least text to validation.
    if not held_back and copies:
        held_back = {min(copies, key=lambda place: (copies[place], place))}
    elif held_back == set(copies) and copies:
        held_back.discard(max(copies, key=lambda place: (copies[place], place)))
    for (split, text), place in zip(first, places, strict=True):
        yield split or ("valid" if place in held_back else "train"), text


def _cut_place(text: str, validation_fraction: float) -> int:
    """Where the held-back end of a single document begins: at a line's start, if there is one just before."""
    cut = max(1, min(len(text) - 1, math.ceil(len(text) * (1 - validation_fraction))))
    before = min(len(text) - cut, cut // 2)
    return text.rfind("\n", max(1, cut - before), cut) + 1 or cut
