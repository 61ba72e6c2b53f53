from pathlib import Path

import pytest

import flowalign
from flowalign.prompts import PromptSet, read_prompts
from flowalign.shapes.prompts import main
from flowalign.shapes.world import KINDS, RELATIONS, SPLITS, Spec

FOLDER = Path(flowalign.__file__).parent / "assets" / "shapes"


def test_the_committed_files_are_what_the_program_writes(tmp_path):
    main(str(tmp_path))
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()


@pytest.mark.parametrize("split", SPLITS)
def test_every_line_says_what_its_metadata_say(split):
    prompts = read_prompts(FOLDER / f"{split}.jsonl")
    scenes = [Spec.from_metadata(p.metadata) for p in prompts]
    assert all(p.text in s.captions() and s.split == split for p, s in zip(prompts, scenes, strict=True))
    assert {s.kind for s in scenes} == set(KINDS)
    assert {s.relation for s in scenes} == {None, *RELATIONS}
    assert len({p.text for p in prompts}) == len(prompts)


def test_the_test_file_balances_the_kinds():
    prompts = PromptSet(read_prompts(FOLDER / "test.jsonl"), balance="tag")
    kinds = [prompts[i].metadata["tag"] for i in prompts.fixed(64)]
    assert all(kinds.count(kind) == 16 for kind in KINDS)
