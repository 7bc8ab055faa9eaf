"""Puts logs in other languages into English, before they are read as any trainer's text.

    第 3 轮 | 训练损失：2.31，学习率：1e-4        epoch 3 | train loss: 2.31, lr: 1e-4
    Époque 3 : perte 2,31                         epoch 3 : loss 2.31

It replaces the words of a table, East Asian punctuation, and decimal commas where the text has hardly a decimal point. A text
counts as being in another language when such words, or such numbers, come again and again at its beginning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from stabilitylab.logs.source import LogFile

_EAST_ASIAN = {
    **dict.fromkeys(("损失", "損失", "ロス", "손실"), "loss"),
    **dict.fromkeys(("训练集", "訓練集", "训练", "訓練", "学習", "훈련", "학습"), "train"),
    **dict.fromkeys(("验证集", "驗證集", "验证", "驗證", "検証", "검증"), "val"),
    **dict.fromkeys(("测试集", "測試集", "测试", "測試", "テスト", "테스트"), "test"),
    **dict.fromkeys(("学习率", "學習率", "学習率", "학습률"), "lr"),
    **dict.fromkeys(("梯度范数", "梯度範數", "勾配ノルム"), "grad_norm"),
    **dict.fromkeys(("轮次", "輪次", "轮数", "周期", "エポック", "에폭", "에포크"), "epoch"),
    **dict.fromkeys(("步骤", "步驟", "步数", "步數", "步", "ステップ", "스텝"), "step"),
    **dict.fromkeys(("迭代次数", "迭代", "イテレーション", "反復"), "iteration"),
    **dict.fromkeys(("批次", "バッチ", "배치"), "batch"),
    **dict.fromkeys(("平均", "평균"), "avg"),
    **dict.fromkeys(("最佳", "最小", "最低"), "best"),
    **dict.fromkeys(("最终", "最終"), "final"),
    **dict.fromkeys(("总", "總"), "total"),
    **dict.fromkeys(("平滑",), "smooth"),
}
_ALPHABETIC = {
    "trainingsverlust": "train loss",
    "validierungsverlust": "val loss",
    "gesamtverlust": "total loss",
    "perte d'entraînement": "train loss",
    "perte d'apprentissage": "train loss",
    "taux d'apprentissage": "lr",
    "tasa de aprendizaje": "lr",
    "taxa de aprendizado": "lr",
    "скорость обучения": "lr",
    **dict.fromkeys(
        ("perte", "perda", "pérdida", "perdida", "perdita", "verlust", "потери", "потеря", "втрати", "kayıp"),
        "loss",
    ),
    **dict.fromkeys(("entraînement", "entrenamiento", "treinamento", "treino", "addestramento"), "train"),
    **dict.fromkeys(("обучение", "обучения", "eğitim"), "train"),
    **dict.fromkeys(("validación", "validação", "validazione", "validierung", "валидация"), "val"),
    **dict.fromkeys(("валидации", "doğrulama"), "val"),
    **dict.fromkeys(("prueba", "teste", "тест"), "test"),
    **dict.fromkeys(("época", "epoca", "époque", "epoche", "эпоха", "епоха"), "epoch"),
    **dict.fromkeys(("étape", "paso", "passo", "schritt", "шаг", "крок", "adım"), "step"),
    **dict.fromkeys(("itération", "iteración", "iteração", "iterazione", "итерация"), "iteration"),
    "lernrate": "lr",
    "gradientennorm": "grad_norm",
    "lote": "batch",
}
_WORDS = {**_EAST_ASIAN, **_ALPHABETIC}


def _any_of(words: dict[str, str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_WORD = re.compile(rf"(?:{_any_of(_EAST_ASIAN)})+|\b(?:{_any_of(_ALPHABETIC)})\b", re.IGNORECASE)
_ONE = re.compile(_any_of(_WORDS), re.IGNORECASE)
# 第 3 轮, 第3/10轮, 第 100 步, 第 5 次迭代
_PLACE = re.compile(r"第\s*(\d+)\s*(/\s*\d+)?\s*(轮|輪|步|次迭代|次反復|批)(?:次)?")
_PLACES = {
    "轮": "epoch",
    "輪": "epoch",
    "步": "step",
    "次迭代": "iteration",
    "次反復": "iteration",
    "批": "batch",
}
_SIGNS = str.maketrans(
    {"：": ": ", "，": ", ", "（": " (", "）": ") ", "；": "; ", "。": ". ", "｜": "|", "＝": "="}
)
_COMMA = re.compile(r"(?<![\w.,])([-+]?\d+),(\d+(?:[eE][-+]?\d+)?)(?![\w,.]*\d)")
_SURELY_COMMA = re.compile(r"(?<![\w.,])[-+]?(?:0,\d+|\d+,(?:\d{1,2}|\d{4,}))(?![\d,.])")
_POINT = re.compile(r"(?<![\d.:])\d+\.\d+(?![\d.])")
_FEWEST_WORDS = 2
_FEWEST_NUMBERS = 3


def is_foreign(head: str) -> bool:
    """Whether the text must be put into English."""
    several = len({m.start() for m in _WORD.finditer(head)}) + len(_PLACE.findall(head))
    return several >= _FEWEST_WORDS or has_decimal_commas(head)


def is_english(name: str) -> bool:
    """Whether no word of the table, and no sign of East Asia, is in a column's name."""
    return _WORD.search(name) is None and (name.isascii() or name.translate(_SIGNS) == name)


def has_decimal_commas(text: str) -> bool:
    """Whether the text writes numbers as 2,31: some that are not thousands, and more of them than with a point."""
    commas = len(_SURELY_COMMA.findall(text))
    return commas >= _FEWEST_NUMBERS and commas > len(_POINT.findall(text))


def in_english(text: str) -> str:
    """The text with the words, signs and numbers of the table put into English."""
    text = _PLACE.sub(lambda m: f" {_PLACES[m[3]]} {m[1]}{m[2] or ''} ", text.translate(_SIGNS))
    text = _WORD.sub(_translated, text)
    return _COMMA.sub(r"\1.\2", text) if has_decimal_commas(text) else text


def _translated(found: re.Match[str]) -> str:
    words = " ".join(_WORDS[word.lower()] for word in _ONE.findall(found[0]))
    text, start, end = found.string, found.start(), found.end()
    before = " " if start and text[start - 1].isalnum() else ""
    after = " " if end < len(text) and text[end].isalnum() else ""
    return f"{before}{words}{after}"


class EnglishSource(LogFile):
    """A source whose text is put into English."""

    def __init__(self, source: LogFile) -> None:
        super().__init__(source.path, source.name)
        self._inner = source

    def head(self, size: int = 1 << 16) -> bytes:
        """The first bytes."""
        return in_english(self._inner.head(size).decode("utf-8", "replace")).encode()

    def chunks(self) -> Iterator[bytes]:
        """All bytes."""
        for chunk in self._inner.chunks():
            yield in_english(chunk.decode("utf-8", "replace")).encode()
