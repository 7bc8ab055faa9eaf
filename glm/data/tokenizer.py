"""The tokenizer: SentencePiece with byte fallback and GLM's special tokens at fixed numbers.

Training fits unigram pieces (Kudo 2018) to a sample of the corpus; bytes spell whatever the pieces cannot, so no text is lost. In a
vocabulary too small for the text's alphabet only the commonest characters are pieces. The special tokens are control symbols:
encoding a text never yields them, even where the text spells them.
"""

from __future__ import annotations

import hashlib
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import sentencepiece as spm

from glm.data.build_once import build_once, progress_bar
from glm.data.documents import Corpus, fingerprint, read_meta
from glm.data.special import EOP, EOS, GMASK, MASK, PAD, SOP, UNKNOWN, SpecialTokens
from glm.errors import InputError

SMALLEST = 300  # bytes, special tokens and the alphabet must fit
BYTES_AND_SPECIAL = 263
ROOMY = 4096  # from this many pieces on, an alphabet of Chinese leaves enough for words
SENTENCE = 1024


class Tokenizer:
    """A trained tokenizer.

    Args:
        path: a ``tokenizer.model`` file or a folder that holds one.

    Raises:
        InputError: the file is missing, is no SentencePiece model, or lacks GLM's special tokens.
    """

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.model" if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"{path} holds no tokenizer.model: make one with glm tokenizer")
        content = file.read_bytes()
        try:
            self._model = spm.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise InputError(f"{file} is not a SentencePiece model, or is damaged: make it again") from None
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        names = {
            "pad": PAD,
            "eos": EOS,
            "unknown": UNKNOWN,
            "mask": MASK,
            "gmask": GMASK,
            "sop": SOP,
            "eop": EOP,
        }
        numbers = {field: self._model.piece_to_id(piece) for field, piece in names.items()}
        missing = [
            piece for field, piece in names.items() if self._model.id_to_piece(numbers[field]) != piece
        ]
        if missing:
            raise InputError(
                f"{file} lacks GLM's special tokens {', '.join(missing)}: make it with glm tokenizer"
            )
        self.special = SpecialTokens(**numbers)

    @property
    def vocabulary(self) -> int:
        """Number of pieces."""
        return int(self._model.get_piece_size())

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text; spells special tokens out and does not interpret them."""
        return list(self._model.encode(text))

    def encode_all(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Several texts at once."""
        return list(self._model.encode(texts, num_threads=threads))

    def decode(self, tokens: list[int]) -> str:
        """Text of token numbers; special tokens have none."""
        return str(self._model.decode(tokens))

    def piece(self, token: int) -> str:
        """How one token is written, special tokens included."""
        return str(self._model.id_to_piece(token))


def train_tokenizer(corpus_path: Path, out: Path, *, vocabulary: int, sample_characters: int) -> Tokenizer:
    """Train on a sample of the corpus, or open the tokenizer at ``out``. Raises InputError for wrong input."""
    if vocabulary < SMALLEST:
        raise InputError(
            f"--vocabulary must be at least {SMALLEST} (256 bytes, 7 special tokens, letters), got {vocabulary}"
        )
    corpus = Corpus.open(corpus_path)
    identity = fingerprint([corpus.fingerprint, vocabulary, sample_characters])

    def work(folder: Path) -> dict[str, Any]:
        model = io.BytesIO()
        with progress_bar() as progress:
            bar = progress.add_task(
                "tokenizer", total=min(sample_characters, corpus.characters), said="reading"
            )
            sample = list(_sample(corpus, sample_characters, lambda n: progress.update(bar, advance=n)))
            progress.update(bar, said=f"training {vocabulary:,} pieces on {len(sample):,} sentences")
            try:
                spm.SentencePieceTrainer.train(
                    sentence_iterator=iter(_within_alphabet(sample, vocabulary)),
                    model_writer=model,
                    vocab_size=vocabulary,
                    model_type="unigram",
                    byte_fallback=True,
                    character_coverage=0.9995,
                    normalization_rule_name="identity",
                    remove_extra_whitespaces=False,
                    max_sentence_length=4 * SENTENCE + 8,
                    pad_id=0,
                    pad_piece=PAD,
                    eos_id=1,
                    eos_piece=EOS,
                    unk_id=2,
                    unk_piece=UNKNOWN,
                    bos_id=-1,
                    control_symbols=[MASK, GMASK, SOP, EOP],
                    num_threads=2,
                    minloglevel=2,
                )
            except RuntimeError as error:
                raise InputError(
                    f"the corpus has too little text for {vocabulary} pieces: lower --vocabulary ({str(error).strip()[-160:]})"
                ) from None
            progress.update(bar, said=f"{vocabulary:,} pieces")
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        return {"vocabulary": vocabulary}

    build_once(out, what="tokenizer", made_by="glm tokenizer", fingerprint=identity, work=work)
    read_meta(out, what="tokenizer", made_by="glm tokenizer")
    return Tokenizer(out)


def _within_alphabet(sample: list[str], vocabulary: int) -> list[str]:
    """Cut the sample at characters that a small vocabulary has no room for: the commonest may take half of its pieces."""
    counts = Counter(chain.from_iterable(sample))
    room = max(1, (vocabulary - BYTES_AND_SPECIAL) // 2)
    if len(counts) <= room or vocabulary >= ROOMY:
        return sample
    kept = {character for character, _ in counts.most_common(room)}
    rare = re.compile(f"[{re.escape(''.join(sorted(counts.keys() - kept)))}]+")
    return [run for line in sample for run in rare.split(line) if run.strip()]


def _sample(corpus: Corpus, characters: int, tell: Any) -> Iterator[str]:
    """Sentences from documents spread over the corpus, about ``characters`` in all, in a fixed order."""
    share = min(1.0, characters / max(1, corpus.characters))
    threshold = int(share * 2**32)
    for number, document in enumerate(corpus):
        if share < 1 and zlib.crc32(f"{document.group} {number}".encode()) >= threshold:
            continue
        tell(len(document.text))
        for line in document.text.splitlines():
            for first in range(0, len(line), SENTENCE):
                if piece := line[first : first + SENTENCE].strip():
                    yield piece
