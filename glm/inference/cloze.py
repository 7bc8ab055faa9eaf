"""The last word of held-out sentences, in the manner of LAMBADA (Paperno et al., 1606.06031), in Chinese and English.

The model sees a sentence up to its last word and goes on from there: [gMASK], [MASK] at the end, or next tokens, as it was trained.
It is right where greedy decoding gives the word, that is, where each of the word's tokens is the most probable one. Chinese has no
spaces: there the word is the last two characters before the final mark.

Limits: people chose LAMBADA's sentences such that they could guess the word from the passage and not from the sentence; nobody
chose these. A held-out document may hold a sentence that training documents hold too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from glm.data.shards import Shard, TokenData
from glm.inference.loading import OpenedModel
from glm.inference.log_probabilities import log_probabilities
from glm.inference.multiple_choice import wilson
from glm.inference.prompt import continuation

# Everything up to the last word, the word, and the marks behind it.
_SENTENCES = {
    "en": re.compile(r"(?P<before>[A-Z][^.!?\n]{30,240})(?P<word> [A-Za-z]{3,})[.!?](?=\s|$)"),
    "zh": re.compile(r"(?P<before>[^。！？\n]{10,100})(?P<word>[\u4e00-\u9fff]{2})[。！？]"),
}
# Sentences come from this many documents of a language, spread over all of them.
_DOCUMENTS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class ClozeResult:
    """Last words of one language.

    Attributes:
        language: "zh" or "en".
        examples: sentences.
        correct: last words that greedy decoding gives.
        low, high: 95 % interval (Wilson) of the accuracy.
        loss: mean -log P of a last word, in nats.
    """

    language: str
    examples: int
    correct: int
    low: float
    high: float
    loss: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.examples


def last_words(opened: OpenedModel, data: TokenData, *, most: int) -> list[ClozeResult]:
    """Accuracy on the last words of ``most`` held-out sentences of each language; languages without sentences are left out."""
    results = []
    for language in _SENTENCES:
        sentences = held_out_sentences(data, language, most)
        prompts, words = [], []
        for before, word in sentences:
            prompt = continuation(before, opened.tokenizer, opened.config.objective)
            if len(prompt.layout()) + len(opened.tokenizer.encode(word)) + 1 < opened.model.config.length:
                prompts.append(prompt)
                words.append(word)
        if not prompts:
            continue
        scores = log_probabilities(opened, prompts, words)
        correct = sum(score.is_greedy for score in scores)
        low, high = wilson(correct, len(scores))
        results.append(
            ClozeResult(
                language=language,
                examples=len(scores),
                correct=correct,
                low=low,
                high=high,
                loss=-sum(score.total for score in scores) / len(scores),
            )
        )
    return results


def held_out_sentences(data: TokenData, language: str, most: int) -> list[tuple[str, str]]:
    """``most`` different sentences as (up to the last word, the last word), always the same ones."""
    shards = [shard for shard in data.shards["heldout"] if shard.language == language]
    found: dict[tuple[str, str], bytes] = {}
    for text in _texts(data, shards):
        for match in _SENTENCES[language].finditer(text):
            before, word = match["before"].strip(), match["word"]
            found[before, word] = hashlib.sha256(f"{before}{word}".encode()).digest()
    return sorted(found, key=found.__getitem__)[:most]


def _texts(data: TokenData, shards: list[Shard]) -> Iterator[str]:
    documents = sum(len(shard.offsets) - 1 for shard in shards)
    every = max(1, documents // _DOCUMENTS)
    for shard in shards:
        offsets = shard.offsets.tolist()
        for number in range(0, len(offsets) - 1, every):
            # The last token of a document is its EOS.
            yield data.tokenizer.decode(shard.stream[offsets[number] : offsets[number + 1] - 1].tolist())
