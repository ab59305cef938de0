"""How predictable a text is without a model: the bars that a trained one must pass. All in nats per token."""

import numpy as np


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy of the tokens' own frequencies: the best loss on this very text without any context."""
    _, counts = np.unique(tokens, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def bigram_cross_entropy(train_tokens: np.ndarray, tokens: np.ndarray, vocab_size: int) -> float:
    """Loss on `tokens` of a bigram model counted on `train_tokens`.

    Witten-Bell smoothing: after a token seen n times with d different followers, weight d / (n + d) goes to
    the unigram shares (one added to every count), so that nothing has probability 0.
    """
    train = np.asarray(train_tokens, np.int64)
    text = np.asarray(tokens, np.int64)
    unigram = np.bincount(train, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    pairs, pair_counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    seen = np.bincount(train[:-1], minlength=vocab_size)
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)

    before, after = text[:-1], text[1:]
    wanted = before * vocab_size + after
    places = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    counts = np.where(pairs[places] == wanted, pair_counts[places], 0)
    # A token never seen before anything has seen = followers = 0: all weight goes to the unigram shares.
    backoff = np.maximum(followers[before], 1)
    probabilities = (counts + backoff * unigram[after]) / (seen[before] + backoff)
    return float(-np.log(probabilities).mean())
