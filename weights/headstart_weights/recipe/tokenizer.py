"""Captions -> a byte-pair vocabulary in CLIP's form, small enough to travel inside a checkpoint.

Ids: 256 bytes, 256 bytes that end a word (`</w>`), merges, <|startoftext|>, <|endoftext|>. Every
byte is present, so any text tokenises; the end token has the highest id, as CLIP's pooling wants.
Source: Radford et al., arXiv:2103.00020, section 2.4 (lower-cased byte-pair encoding).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from headstart_weights.recipe import StageOptions
from headstart_weights.recipe.artwork import write_text
from headstart_weights.recipe.concepts import CONCEPTS
from headstart_weights.recipe.dataset import PALETTE, STYLES, compose_caption

START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"
MERGES = 400

WORDS = Regex(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)

Merge = tuple[str, str]

log = logging.getLogger(__name__)


def caption_corpus() -> Iterator[str]:
    """Every noun with every style and every background."""
    for concept, style, colour in product(CONCEPTS, STYLES.values(), PALETTE):
        yield compose_caption(concept.name, style=style, colour=colour)


def fit_tokenizer(texts: Iterable[str], *, merges: int = MERGES) -> Tokenizer:
    """The tokenizer of the texts' own merges; the same texts give the same bytes."""
    rules = build_tokenizer([])
    counts: Counter[str] = Counter()
    for text in texts:
        normal = rules.normalizer.normalize_str(text)
        counts.update(word for word, _ in rules.pre_tokenizer.pre_tokenize_str(normal))
    return build_tokenizer(learn_merges(counts, limit=merges))


def learn_merges(counts: Mapping[str, int], *, limit: int) -> list[Merge]:
    """The most frequent neighbours, again and again, until every word is whole or `limit`.

    Ties go to the alphabetically first pair. The tokenizers library's own trainer breaks them by
    the order of a randomly seeded hash map: three runs gave three vocabularies.
    """
    words = {word: (*word[:-1], word[-1] + WORD_END) for word in counts}
    merges: list[Merge] = []
    while len(merges) < limit:
        pairs: Counter[Merge] = Counter()
        for word, pieces in words.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: _merged(pieces, best) for word, pieces in words.items()}
    return merges


def build_tokenizer(merges: Sequence[Merge]) -> Tokenizer:
    """The tokenizer of these merges; start and end tokens are added around every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + WORD_END for letter in alphabet)]
    tokens += [left + right for left, right in merges]
    tokens += [START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocabulary, merges=list(merges), end_of_word_suffix=WORD_END, unk_token=END
    )
    tokenizer = _with_text_rules(Tokenizer(model))
    tokenizer.add_special_tokens([START, END])  # pyright: ignore[reportUnknownMemberType]
    ends = (END, vocabulary[END]), (START, vocabulary[START])
    tokenizer.post_processor = processors.RobertaProcessing(
        *ends, trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def main(options: StageOptions) -> None:
    """The `tokenizer` stage: writes tokenizer.json."""
    tokenizer = fit_tokenizer(caption_corpus())
    write_text(options.work / "tokenizer.json", tokenizer.to_str())
    log.info("%d tokens", tokenizer.get_vocab_size())


def load_tokenizer(folder: Path) -> Tokenizer:
    """What the `tokenizer` stage wrote."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _with_text_rules(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merged(pieces: tuple[str, ...], pair: Merge) -> tuple[str, ...]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return tuple(joined)
