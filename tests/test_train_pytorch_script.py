"""scripts/train_pytorch.py: the same training in PyTorch, which comes to the same."""

from __future__ import annotations

import re

from commands import assert_refused, run


def test_an_epoch(fashion_mnist, tmp_path):
    process = run("train_pytorch.py", "--epochs", "1", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    ((loss, accuracy, _),) = re.findall(
        r"^ +1  (\d\.\d{4}) +(\d\.\d{4}) +(\d\.\d{4})$", process.stdout, re.MULTILINE
    )
    assert 0.65 < float(loss) < 0.85  # as in test_train_script.py
    assert 0.68 < float(accuracy) < 0.78


def test_without_a_gpu_it_says_so(tmp_path):
    prelude = "import torch\ntorch.cuda.is_available = lambda: False\n"
    process = run("train_pytorch.py", "--device", "cuda", cwd=tmp_path, prelude=prelude)
    assert_refused(process, "train_pytorch.py: error: this PyTorch finds no GPU")
