"""Which documents are held back for validation: decided by the hash of each document's own text."""

import math
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
    least one is held back and one is not; of a shard that is a single document, the end of it.
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
    if len(first) == 1 and first[0][0] is None:
        text = first[0][1]
        cut = math.ceil(len(text) * (1 - validation_fraction))
        cut = text.rfind("\n", 1, cut) + 1 or cut
        first = [("train", text[:cut]), ("valid", text[cut:])]
    places = [hash_place("split", text) for _, text in first]
    lowest, highest = min(places, default=0.0), max(places, default=0.0)
    for (split, text), place in zip(first, places, strict=True):
        held_back = place == lowest or (place < validation_fraction and place != highest)
        yield split or ("valid" if held_back else "train"), text
