"""CLIP's tokenizer: a prompt -> the ids of its text, with the vocabulary that a model brings.

text -> lower case, words, single digits, runs of signs -> bytes -> merged pairs -> ids

"!" is a word like others to open_clip, whose networks SD 2 and SDXL have: 256 alone, 995 in "!!!".
transformers pads the text of those encoders with id 0, which is the token "!" within a word, and
takes every "!" typed for it: "wow!!!" becomes wow, 0, 0, 0. It does so for SD 2's encoder and for
SDXL's second one only. Here open_clip is followed, for `a1111` and `comfyui` too, as both programs
do; `ClipTokenizer.exclamation = "transformers"` is the other way, for pictures like diffusers'.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, final

from headstart.checkpoint.header import read_json
from headstart.errors import CheckpointError, InputError
from headstart.networks.prompt_style import Exclamation
from headstart.networks.vocabulary import BOS, EOS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TEXT_BYTES = 16 * 2**20

# CLIP's own splitting rule (arXiv:2103.00020, the released simple_tokenizer): words, single digits,
# runs of anything else.
_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Word(NamedTuple):
    """The ids of a word, of a run of signs, or of a learned token."""

    ids: tuple[int, ...]
    is_embedding: bool = False


@final
class ClipTokenizer:
    """Prompts -> ids [B, L] with begin, end and padding, for a vocabulary in CLIP's form."""

    def __init__(self, tokenizer: Tokenizer, source: str = "the tokenizer") -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
        if bos is None or eos is None:
            raise CheckpointError(
                f"{source} has no {BOS} or no {EOS}: expected CLIP's vocabulary or one like it"
            )
        self.bos, self.eos = bos, eos
        self.embeddings: Mapping[str, tuple[int, ...]] = {}
        """Added token -> the ids of its vectors, below 0: see `tower.Tower`."""
        self._token: re.Pattern[str] = _NOTHING
        self._longest_first: list[str] = []
        self.exclamation: Exclamation = "openclip"
        """What "!" becomes for an encoder whose text is padded with id 0."""

    @classmethod
    def from_json(cls, text: str, source: str = "the tokenizer") -> ClipTokenizer:
        """From the text of a `tokenizer.json` of the tokenizers library."""
        from tokenizers import Tokenizer

        try:
            return cls(Tokenizer.from_str(text), source)
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{source}: its JSON cannot be read: {error!s:.200}") from error

    @classmethod
    def from_vocabulary(
        cls,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        source: str = "the tokenizer",
    ) -> ClipTokenizer:
        """From CLIP's `vocab.json` and `merges.txt`: byte-level pairs of lower-cased text."""
        from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
        from tokenizers.models import BPE

        try:
            model = BPE(dict(vocabulary), list(merges), end_of_word_suffix="</w>", unk_token=EOS)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"{source}: vocabulary and merges do not fit: {error!s:.200}"
            ) from error
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        special: list[str] = [token for token in (BOS, EOS) if token in vocabulary]
        tokenizer.add_special_tokens(special)  # pyright: ignore[reportUnknownMemberType]
        return cls(tokenizer, source)

    @classmethod
    def load(cls, path: str | Path) -> ClipTokenizer:
        """A `tokenizer.json`, a folder with it or with vocab.json and merges.txt, or its parent."""
        path = Path(path)
        for folder in (path / "tokenizer", path):
            if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                return cls.from_vocabulary(*_read_vocabulary(folder), str(folder))
            if (file := folder / "tokenizer.json").is_file():
                return cls.from_json(_read_text(file), str(file))
        if path.is_file():
            return cls.from_json(_read_text(path), str(path))
        raise CheckpointError(
            f"{path}: expected a tokenizer.json, or a folder with vocab.json and merges.txt"
        )

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def comma(self) -> int | None:
        """The id of a comma that is a word, or None where the vocabulary has none."""
        return self._tokenizer.token_to_id(",</w>")

    def tokens(self, prompt: str, *, zero_pad: bool = False) -> list[int]:
        """The ids of the text alone; arguments and errors are those of `words`."""
        return [id for word in self.words(prompt, zero_pad=zero_pad) for id in word.ids]

    def words(self, prompt: str, *, zero_pad: bool = False) -> list[Word]:
        """The words of a text, for an encoder whose text is padded with id 0, or with the end.

        Raises InputError for text that has no ids.
        """
        # Whether id 0 is "!", as in CLIP's own vocabulary.
        is_padding = zero_pad and self._tokenizer.token_to_id("!") == 0
        is_special = is_padding and self.exclamation == "transformers"
        tokenizer = self._with_special_exclamation if is_special else self._tokenizer
        try:
            return [
                word
                for text, token in self._split_at_tokens(prompt)
                for word in (*_words(tokenizer, text), *([Word(token, True)] if token else []))
            ]
        except Exception as error:  # the library raises bare Exception
            raise InputError(
                f"prompt {prompt!r:.60} cannot be read by this tokenizer: {error!s:.200}: it is no "
                "text, or the vocabulary is damaged"
            ) from error

    @cached_property
    def _with_special_exclamation(self) -> Tokenizer:
        """A copy in which "!" is a special token, as the padding token is."""
        from tokenizers import Tokenizer

        copied = Tokenizer.from_str(self._tokenizer.to_str())
        copied.add_special_tokens(["!"])  # pyright: ignore[reportUnknownMemberType]
        return copied

    def knows(self, token: str) -> bool:
        """Whether the token has a meaning already: a word, begin, end, or an added token."""
        names = {*self.embeddings, BOS, EOS}
        return _spaced(token) in names or len(self.tokens(token)) < 2

    def with_tokens(self, tokens: Mapping[str, tuple[int, ...]]) -> ClipTokenizer:
        """A tokenizer that also reads these tokens, as these ids; this one does not change.

        A token is read in any case, as words are and as AUTOMATIC1111 reads it (modules/
        textual_inversion); with any white space for its own; and where it begins or ends with a
        letter or digit, no other may be next to it. Of two the longer one is read. Raises
        InputError for a token that has a meaning already, if only in another case.
        """
        cases = Counter(token.lower() for token in tokens)
        for token in tokens:
            if self.knows(token) or cases[token.lower()] > 1:
                raise InputError(
                    f"the token {token!r:.80} means something already: give another, as "
                    f"<{token:.80}>"
                )
        grown = copy(self)
        grown.embeddings = {**self.embeddings, **{_spaced(t): ids for t, ids in tokens.items()}}
        grown._longest_first = sorted(grown.embeddings, key=len, reverse=True)
        pattern = "|".join(f"({_pattern_of(token)})" for token in grown._longest_first)
        grown._token = re.compile(pattern, re.IGNORECASE)
        return grown

    def _split_at_tokens(self, prompt: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(text, the ids of the added token after it); the last text has none.

        The prompt is cut before it is tokenized: a token may be spelled as a piece of a word is,
        and then has the id of that piece in a vocabulary.
        """
        end = 0
        for match in self._token.finditer(prompt):
            token = self._longest_first[(match.lastindex or 1) - 1]
            yield prompt[end : match.start()], self.embeddings[token]
            end = match.end()
        yield prompt[end:], ()


_NOTHING = re.compile(r"(?!)")


def _words(tokenizer: Tokenizer, text: str) -> Iterator[Word]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    pairs = zip(encoding.word_ids, encoding.ids, strict=True)
    for _, token_ids in groupby(pairs, lambda pair: pair[0]):
        yield Word(tuple(id for _, id in token_ids))


def _spaced(token: str) -> str:
    return " ".join(token.split())


def _pattern_of(token: str) -> str:
    """The pattern of a token: whole words where it begins or ends as one."""
    before, after = (r"\w" if end.isalnum() else "(?!)" for end in (token[0], token[-1]))
    words = r"\s+".join(map(re.escape, token.split()))
    return f"(?<!{before}){words}(?!{after})"


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise ValueError(f"larger than {MAX_TEXT_BYTES} bytes, so it is no tokenizer")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected UTF-8 text ({error})") from error


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    table = read_json(folder / "vocab.json")
    vocabulary = {token: id for token, id in table.items() if type(id) is int}
    if len(vocabulary) != len(table):
        raise CheckpointError(f"{folder / 'vocab.json'}: expected token: integer pairs")
    lines = _read_text(folder / "merges.txt").splitlines()
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    if not all(len(pair) == 2 for pair in pairs):
        raise CheckpointError(f"{folder / 'merges.txt'}: expected two tokens on each line")
    return vocabulary, [(left, right) for left, right in pairs]
