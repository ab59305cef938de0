"""A model with the shape of umT5's, which can't be shipped: 256,000 pieces, byte fallback, pad 0, eos 1."""

from sentencepiece import sentencepiece_model_pb2

PIECES = 256_000
# Two private characters each, which no text has: filling up changes no tokenisation.
_FIRST_PRIVATE, _PRIVATE = 0xF0000, 512


def umt5_standin(trained: bytes | None = None) -> bytes:
    """The pieces of the serialised model `trained` (null: letters and digits), then synthetic ones.

    `trained` must have pad 0 and eos 1 and no sentinels.
    """
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    if trained is not None:
        proto.ParseFromString(trained)
    else:
        kinds = proto.SentencePiece
        proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
        proto.trainer_spec.byte_fallback = True
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
        proto.pieces.add(piece="<pad>", type=kinds.CONTROL)
        proto.pieces.add(piece="</s>", type=kinds.CONTROL)
        proto.pieces.add(piece="<unk>", type=kinds.UNKNOWN)
        for byte in range(256):
            proto.pieces.add(piece=f"<0x{byte:02X}>", type=kinds.BYTE)
        for rank, letter in enumerate("\u2581etaoinshrdlucmfwypvbgkjqxz0123456789[]NLUGS"):
            proto.pieces.add(piece=letter, score=-3 - 0.1 * rank)
    missing = PIECES - len(proto.pieces)
    proto.pieces.extend(
        proto.SentencePiece(
            piece=chr(_FIRST_PRIVATE + index // _PRIVATE) + chr(_FIRST_PRIVATE + index % _PRIVATE),
            score=-100.0 - index * 1e-6,
        )
        for index in range(missing)
    )
    return proto.SerializeToString()
