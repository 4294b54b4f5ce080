"""The threat model in words: true of the settings that it is made of."""

import pytest
from conftest import resolved

from judge.assumptions import BATCH_NORM, assumptions


def said(*words, **others):
    rows = assumptions(vars(resolved(*words)) | {"device": "cpu"} | others)
    return {row["topic"]: row["here"] for row in rows}


def test_of_a_single_step():
    assert said()["Local training"] == "One step of plain SGD on the whole batch; these settings are known."


def test_of_local_training():
    here = said(local_steps=4, local_lr=0.1, local_batches=2)["Local training"]
    assert here == "4 steps of plain SGD at rate 0.1, through 2 minibatches in turn; these settings are known."


@pytest.mark.parametrize("mode", BATCH_NORM)
def test_of_batch_norm(mode):
    assert ("eval mode" in said(bn=mode)["BatchNorm"]) == (mode == "eval")


def test_of_labels_and_defences():
    assert "Granted" in said("--label_strategy", "known")["Labels"]
    assert "not the images' own" in said("--labels", "random")["Labels"]
    assert "not the images' own" not in said("--labels", "dataset")["Labels"]
    assert said("--defence", "float16")["Defence"].startswith("float16, applied by the client")
    assert "is not known" in said("--update", "u.npz")["Defence"]
    assert "float16 was applied here" in said("--update", "u.npz", "--defence", "float16")["Defence"]
