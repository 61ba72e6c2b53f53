"""Engines that read the text in a picture, installed or not."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from flowalign.rewards.base import RewardError


class Reader(Protocol):
    """picture (H, W, 3) uint8 → the pieces of text in it with a confidence in [0, 1] each, in reading order."""

    def __call__(self, picture: np.ndarray) -> list[tuple[str, float]]: ...


class RapidOCR:
    """PP-OCR by onnxruntime, the models that PaddleOCR runs; its wheel holds them, so nothing is downloaded."""

    def __init__(self) -> None:
        if missing := [name for name in ("rapidocr", "onnxruntime") if find_spec(name) is None]:
            raise RewardError(f"engine rapidocr needs {' and '.join(missing)}: pip install 'flowalign[ocr]'.")
        from rapidocr import RapidOCR

        threads = int(os.environ.get("OMP_NUM_THREADS", "-1"))
        self._engine: Any = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,  # which turns upside-down lines, as Flow-GRPO does not either
                "Global.text_score": 0.0,  # confidence is ours to judge
                # PaddleOCR's own limits, by which small pictures are not enlarged: seven times as quick at 256 pixels
                "Det.limit_type": "max",
                "Det.limit_side_len": 960,
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def __call__(self, picture: np.ndarray) -> list[tuple[str, float]]:
        found = self._engine(np.ascontiguousarray(picture[..., ::-1]))  # it takes BGR
        return list(zip(found.txts or (), (float(score) for score in found.scores or ()), strict=True))


class Tesseract:
    """The system's tesseract; layout 11, sparse text, finds words wherever they are."""

    def __init__(self) -> None:
        if shutil.which("tesseract") is None:
            raise RewardError("engine tesseract needs the program: apt install tesseract-ocr, or use engine=rapidocr.")
        if find_spec("pytesseract") is None:
            raise RewardError("engine tesseract needs pytesseract: pip install 'flowalign[ocr]'.")
        os.environ.setdefault("OMP_THREAD_LIMIT", "1")  # its threads cost more than they bring

    def __call__(self, picture: np.ndarray) -> list[tuple[str, float]]:
        import pytesseract

        found = pytesseract.image_to_data(picture, config="--psm 11", output_type=pytesseract.Output.DICT)
        words = zip(found["text"], found["conf"], strict=True)
        return [(word, float(sure) / 100) for word, sure in words if word.strip()]


READERS = {"rapidocr": RapidOCR, "tesseract": Tesseract}
