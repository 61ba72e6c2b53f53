"""OCR engines, which are optional dependencies."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from flowalign.rewards.base import RewardError


class Reader(Protocol):
    """Image (H, W, 3) uint8 → pieces of text in reading order, each with a confidence in [0, 1]."""

    def __call__(self, picture: np.ndarray) -> list[tuple[str, float]]: ...


class RapidOCR:
    """PP-OCR, the models of PaddleOCR, run by onnxruntime. The wheel contains them, so nothing is downloaded."""

    def __init__(self) -> None:
        if missing := [name for name in ("rapidocr", "onnxruntime") if find_spec(name) is None]:
            raise RewardError(f"engine rapidocr needs {' and '.join(missing)}: pip install 'flowalign[ocr]'.")
        from rapidocr import RapidOCR

        threads = int(os.environ.get("OMP_NUM_THREADS", "-1"))
        self._engine: Any = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,  # no detection of upside-down text, as in Flow-GRPO
                "Global.text_score": 0.0,  # OCR.min_confidence filters instead
                # PaddleOCR's own limits, which do not enlarge small images: seven times as fast at 256 pixels
                "Det.limit_type": "max",
                "Det.limit_side_len": 960,
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def __call__(self, picture: np.ndarray) -> list[tuple[str, float]]:
        found = self._engine(np.ascontiguousarray(picture[..., ::-1]))  # expects BGR
        return list(zip(found.txts or (), (float(score) for score in found.scores or ()), strict=True))


class Tesseract:
    """The system's tesseract with page segmentation mode 11, sparse text, which finds words anywhere."""

    def __init__(self) -> None:
        if shutil.which("tesseract") is None:
            raise RewardError("engine tesseract needs the program: apt install tesseract-ocr, or use engine=rapidocr.")
        if find_spec("pytesseract") is None:
            raise RewardError("engine tesseract needs pytesseract: pip install 'flowalign[ocr]'.")
        os.environ.setdefault("OMP_THREAD_LIMIT", "1")  # its threading slows it down

    def __call__(self, picture: np.ndarray) -> list[tuple[str, float]]:
        import pytesseract

        found = pytesseract.image_to_data(picture, config="--psm 11", output_type=pytesseract.Output.DICT)
        words = zip(found["text"], found["conf"], strict=True)
        return [(word, float(sure) / 100) for word, sure in words if word.strip()]


READERS = {"rapidocr": RapidOCR, "tesseract": Tesseract}
